"""Successive halving: all layouts by short trainings, the better ones again by longer ones."""

from collections.abc import Mapping

from ..config import SearchConfig
from ..search_space import SearchSpace
from .protocol import Trial


class Halving:
    """Rungs of trainings, each of 1/eta of the layouts of the rung before, for eta times its epochs.

    The last one trains its layout for `epochs`. Every rung starts anew, by a schedule that ends at its own length: a
    long cosine read early ranks by learning rate, not by layout.
    """

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        self._space, self._config = list(space), config
        counts = [len(space)]
        while counts[-1] >= config.eta:
            counts.append(counts[-1] // config.eta)
        longest, last = config.epochs or 1, len(counts) - 1
        self.rungs = [(n, max(1, round(longest / config.eta ** (last - rung)))) for rung, n in enumerate(counts)]

    def next(self, done: Mapping[Trial, float]) -> list[Trial]:
        """What is missing of the first rung that is not complete; equals go on in the order of the search space."""
        layouts = self._space
        for count, epochs in self.rungs:
            rung = [Trial(layout, self._config.seed, epochs) for layout in layouts[:count]]
            if missing := [trial for trial in rung if trial not in done]:
                return missing
            layouts = [trial.layout for trial in sorted(rung, key=lambda trial: -done[trial])]
        return []
