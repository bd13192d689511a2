"""Who is trained next: how a search step draws its layout and supernet, and learns from what follows.

A strategy is a file of its own here and a line in `STRATEGIES`; it is what `Strategy` asks for and is created with the
layouts and the settings of the search.
"""

from collections.abc import Callable

from ..config import SearchConfig
from ..errors import InputError
from ..search_space import SearchSpace
from .balanced import BalancedMixture
from .boltzmann import Boltzmann
from .few_shot import FewShot
from .fixed import Fixed
from .mcts import TreeSearch
from .paired import PairedMixture
from .protocol import Draw, Strategy, scorings
from .uniform import Uniform

STRATEGIES: dict[str, Callable[[SearchSpace, SearchConfig], Strategy]] = {
    "balanced": BalancedMixture,
    "uniform": Uniform,
    "fixed": Fixed,
    "boltzmann": Boltzmann,
    "mcts": TreeSearch,
    "few-shot": FewShot,
    "unshared": Uniform,  # of supernets whose units have weights for each resolution, see `config.sharing_of`
}


def create_strategy(space: SearchSpace, config: SearchConfig) -> Strategy:
    """The strategy that a config names, one of `STRATEGIES`.

    Raises:
        InputError: if it does not work with the other settings.
    """
    if config.scores == "pairs":
        if config.strategy != "balanced":
            raise InputError(f"scores pairs: strategy {config.strategy} assigns nothing by scores: use balanced")
        return PairedMixture(space, config)
    return STRATEGIES[config.strategy](space, config)


__all__ = ["STRATEGIES", "BalancedMixture", "Draw", "PairedMixture", "Strategy", "create_strategy", "scorings"]
