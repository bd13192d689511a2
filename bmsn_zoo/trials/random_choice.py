"""Random search: some layouts, each trained alone."""

from collections.abc import Mapping

from ..config import SearchConfig
from ..data import CHOICE, random_stream
from ..search_space import SearchSpace
from .protocol import Trial


class RandomChoice:
    """`trials` layouts drawn without replacement."""

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        order = random_stream(config.seed, CHOICE).permutation(len(space))[: config.trials]
        self._trials = [Trial(space[int(index)], config.seed, config.epochs or 1) for index in order]

    def next(self, done: Mapping[Trial, float]) -> list[Trial]:
        """All that are missing."""
        return [trial for trial in self._trials if trial not in done]
