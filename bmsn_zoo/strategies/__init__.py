"""Who is trained next: how a search step draws its layout and supernet, and learns from what follows.

A strategy is a file of its own here and a line in `STRATEGIES`; it has the methods of `Strategy` and is created with
the number of layouts and the settings of the search.
"""

from collections.abc import Callable

from ..config import SearchConfig
from ..errors import InputError
from .balanced import BalancedMixture
from .protocol import Draw, Strategy

STRATEGIES: dict[str, Callable[[int, SearchConfig], Strategy]] = {
    "balanced": BalancedMixture,
}


def create_strategy(num_layouts: int, config: SearchConfig) -> Strategy:
    """The strategy that a config names.

    Raises:
        InputError: if there is none of this name.
    """
    if config.strategy not in STRATEGIES:
        raise InputError(f"strategy {config.strategy!r} is unknown: use {' or '.join(STRATEGIES)}")
    return STRATEGIES[config.strategy](num_layouts, config)


__all__ = ["STRATEGIES", "BalancedMixture", "Draw", "Strategy", "create_strategy"]
