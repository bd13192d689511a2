"""Boltzmann exploration: layouts that score well are drawn more often, and more decidedly towards the end."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..assignment import update_score
from ..config import SearchConfig
from ..search_space import SearchSpace
from .protocol import Draw, Scoring
from .uniform import Uniform, step_rng


class Boltzmann(Uniform):
    """Draws a layout with probability softmax(sharpness * score), after a uniform phase (the paper's SBE).

    Of M supernets, drawn uniformly, each learns scores of its own: M searches side by side. The paper's has one.

    Args:
        space: of L layouts.
        config: `mixture_size` M, `seed`, `draws` and `uniform_share` of the first phase, `score_momentum`, and
            `max_sharpness`, to which the sharpness grows from 1 after that phase.

    Attributes:
        state: of `Uniform`; scores (L, M), smoothed accuracies that start at 1.
    """

    scoring: Scoring = "drawn"

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__(space, config)
        self.state["scores"] = self.table(len(space), 1.0)

    def sharpness(self, progress: float) -> float:
        """Factor on the scores: 1 until the uniform phase ends, then growing linearly to the maximum."""
        share = self.config.uniform_share
        return 1 + (self.config.max_sharpness - 1) * max(0.0, progress - share) / max(1 - share, 1e-9)

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """Draw a supernet uniformly, then a layout by its scores."""
        if progress < self.config.uniform_share:
            return super().draw(step, progress, owned)
        rng = step_rng(self.config, step)
        supernet = owned[int(rng.integers(len(owned)))]
        logits = self.sharpness(progress) * self.state["scores"][:, supernet].numpy()
        return Draw(int(np.argmax(logits + rng.gumbel(size=len(logits)))), supernet)  # the same as by the softmax

    def update(self, draw: Draw, accuracies: Sequence[float]) -> None:
        """Smooth an accuracy into the score of what was drawn."""
        super().update(draw, accuracies)
        update_score(self.state["scores"], draw.layout, draw.supernet, accuracies[0], self.config.score_momentum)

    def report(self, progress: float) -> dict[str, Any]:
        """The sharpness."""
        return {"sharpness": self.sharpness(progress)}

    def result(self) -> dict[str, Any]:
        """The scores, (L, M), and which layout of every supernet has the highest."""
        found = super().result()
        first = [str(self.space[layout]) for layout in self.state["scores"].argmax(0).tolist()]
        return {"scores": self.state["scores"].tolist(), "details": {**found["details"], "highest_score": first}}
