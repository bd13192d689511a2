"""Searches by standalone trainings: which to train next, and where they run.

A plan is a file of its own here, a line in `PLANS` and its name in `config.ALONE`; it is what `Plan` asks for and is
created with the layouts and the settings of the search.
"""

from collections.abc import Callable

from ..config import SearchConfig
from ..search_space import SearchSpace
from .brute_force import BruteForce
from .evolution import Evolution
from .halving import Halving
from .protocol import Plan, Trial
from .random_choice import RandomChoice

PLANS: dict[str, Callable[[SearchSpace, SearchConfig], Plan]] = {
    "random": RandomChoice,
    "halving": Halving,
    "evolution": Evolution,
    "brute-force": BruteForce,
}

__all__ = ["PLANS", "Plan", "Trial"]
