"""Regularised evolution (Real 2019): the best of a sample has a child, and the oldest dies."""

from collections import deque
from collections.abc import Mapping

import numpy as np

from ..config import SearchConfig
from ..data import CHOICE, random_stream
from ..layout import Layout
from ..search_space import SearchSpace
from .protocol import Trial

_SIZES = ((400, 25, 6), (50, 12, 3), (0, 10, 3))  # layouts of a space from so many on: population, sample
_IDLE = 1000  # children in a row that are known already, after which the plan ends


class Evolution:
    """`trials` trainings: a random population, then children, each its parent with one cut moved by one unit.

    A child that was trained before costs nothing. The whole history is played again at every call, so that it depends
    on the trials that are done alone.
    """

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        self._space, self._config = space, config
        population, self._sample = next(sizes for least, *sizes in _SIZES if len(space) >= least)
        self._size = min(population, len(space), config.trials)

    def next(self, done: Mapping[Trial, float]) -> list[Trial]:
        """What is missing of the population; then one child at a time."""
        rng, config = random_stream(self._config.seed, CHOICE), self._config

        def trial(layout: Layout) -> Trial:
            return Trial(layout, config.seed, config.epochs or 1)

        population = deque(self._space[int(i)] for i in rng.permutation(len(self._space))[: self._size])
        if missing := [trial(layout) for layout in population if trial(layout) not in done]:
            return missing
        trained, idle = set(population), 0
        while len(trained) < min(config.trials, len(self._space)) and idle < _IDLE:
            sample = rng.choice(len(population), min(self._sample, len(population)), replace=False)
            parent = max((population[int(i)] for i in sample), key=lambda layout: done[trial(layout)])
            child = self._child(parent, rng)
            if trial(child) not in done:
                return [trial(child)]
            idle = idle + 1 if child in trained else 0
            trained.add(child)
            population.append(child)
            population.popleft()
        return []

    def _child(self, parent: Layout, rng: np.random.Generator) -> Layout:
        """A layout of the space with one cut moved by one unit; the parent where there is none."""
        counts, neighbours = tuple(parent.units_per_scale), []
        for scale in range(len(counts) - 1):
            for step in (1, -1):
                moved = (*counts[:scale], counts[scale] + step, counts[scale + 1] - step, *counts[scale + 2 :])
                if min(moved) > 0 and (child := Layout(moved)) in self._space:
                    neighbours.append(child)
        return neighbours[int(rng.integers(len(neighbours)))] if neighbours else parent
