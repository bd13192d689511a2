"""The balanced mixture: every supernet trains the layouts that it serves best, and all are used equally."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..assignment import assign, update_score
from ..config import SearchConfig
from ..errors import InputError
from ..search_space import SearchSpace
from .protocol import Draw
from .uniform import Uniform, step_rng, uniform_index


class BalancedMixture(Uniform):
    """The balanced mixture of supernets (paper, Algorithm 1): uniform over layouts, balanced over supernets.

    With one supernet this is plain single-path one-shot search, in which nothing is scored.

    Args:
        space: of L layouts.
        config: `mixture_size` M, `seed`, `score_momentum`, and `max_sharpness`, to which the sharpness grows.

    Attributes:
        scores: smoothed accuracies, float64 tensor of shape (L, M), starting at 1.
    """

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__(space, config)
        self.scoring = "drawn" if config.mixture_size > 1 else "none"
        self.scores = self.table(len(space), 1.0)
        if config.draws == "permutation" and config.parallel == "mixture":
            raise InputError("draws permutation needs all supernets in one process: use --parallel data")
        # of the last draw: from one step to the next it hardly changes, so balancing starts where it ended
        self._offset = self.table(1)[0]
        self.state = {"scores": self.scores, "offset": self._offset}

    def sharpness(self, progress: float) -> float:
        """Factor on the scores, growing linearly from 1 at progress 0 to the maximum at progress 1."""
        return 1 + (self.config.max_sharpness - 1) * progress

    def logits(self, progress: float) -> Tensor:
        """What the assignment is balanced from, shape (L, M)."""
        return self.scores * self.sharpness(progress)

    def assignment(self, progress: float) -> Tensor:
        """p(supernet given layout) at this point of the search, shape (L, M)."""
        return assign(self.logits(progress), 1.0, offset=self._offset.clone())

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """Draw layout and supernet, jointly p(layout) p(supernet | layout).

        A process that owns only some supernets draws one of them uniformly, which balance makes exact, then the
        layout from p(layout | supernet).
        """
        rng = step_rng(self.config, step)
        assignment = assign(self.logits(progress), 1.0, offset=self._offset).numpy()
        num_layouts, mixture_size = assignment.shape
        if len(owned) == mixture_size:
            layout = uniform_index(self.config, num_layouts, step, rng)
            return Draw(layout, _pick(rng, assignment[layout]))
        supernet = owned[int(rng.integers(len(owned)))]
        return Draw(_pick(rng, assignment[:, supernet]), supernet)

    def update(self, draw: Draw, accuracies: Sequence[float]) -> None:
        """Smooth an accuracy into the score of what was drawn."""
        for accuracy in accuracies:
            update_score(self.scores, draw.layout, draw.supernet, accuracy, self.config.score_momentum)

    def exchange(self, owned: range, gather: Callable[[Tensor], Tensor]) -> None:
        """Take the score columns of all supernets, each from its owner."""
        self.scores.copy_(gather(self.scores[:, owned.start : owned.stop].T.contiguous()).T)
        self._offset.zero_()  # each process had its own

    def report(self, progress: float) -> dict[str, Any]:
        """The sharpness, the expected share of steps of every supernet, 1/M within a thousandth, and each layout's
        most probable one."""
        assignment = self.assignment(progress)
        shown = {"usage": assignment.mean(0).tolist(), "assigned": assignment.argmax(1).tolist()}
        return {"sharpness": self.sharpness(progress), **shown}

    def result(self) -> dict[str, Any]:
        """The assignment at the end of the search and the scores that it comes from, (L, M), if M > 1."""
        if self.scoring == "none":
            return {}
        return {"assignment_matrix": self.assignment(1.0).tolist(), "scores": self.scores.tolist()}


def _pick(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index with probability proportional to its weight."""
    cumulative = np.cumsum(weights)
    return int(min(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"), len(weights) - 1))
