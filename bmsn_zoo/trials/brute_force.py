"""Brute force: every layout trained alone, the ground truth of a search space."""

from collections.abc import Mapping

from ..config import SearchConfig
from ..search_space import SearchSpace
from .protocol import Trial


class BruteForce:
    """Every layout with `trial_seeds` seeds, the search's own and those after it."""

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        seeds = range(config.seed, config.seed + config.trial_seeds)
        self._trials = [Trial(layout, seed, config.epochs or 1) for seed in seeds for layout in space]

    def next(self, done: Mapping[Trial, float]) -> list[Trial]:
        """All that are missing."""
        return [trial for trial in self._trials if trial not in done]
