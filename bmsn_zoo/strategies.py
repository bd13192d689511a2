"""How a search step draws its layout and supernet, and learns from the accuracy that follows."""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .assignment import assign, update_score, usage


class Draw(NamedTuple):
    """What one search step trains: indices of a layout and of a supernet."""

    layout: int
    supernet: int


class Strategy(Protocol):
    """What the search loop asks of a strategy; it draws the same on every process for the same seed and step."""

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """The layout and supernet of a step; `progress` runs from 0 to 1 over the search, `owned` limits supernets."""
        ...

    def update(self, draw: Draw, accuracy: float) -> None:
        """Learn the score-split accuracy, a fraction, of what was drawn."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BalancedMixture:
    """The balanced mixture of supernets (paper, Algorithm 1): uniform over layouts, balanced over supernets.

    Args:
        num_layouts: L.
        mixture_size: M; 1 is plain single-path one-shot search.
        max_sharpness: sharpness at the end of the search; it grows linearly from 1.
        score_momentum: share of the old score kept at an update, a fraction.
        seed: every draw depends on it and on the step alone.

    Attributes:
        scores: smoothed accuracies, float64 tensor of shape (L, M), starting at 1.
    """

    def __init__(
        self, num_layouts: int, mixture_size: int, max_sharpness: float, score_momentum: float, seed: int
    ) -> None:
        self.scores = torch.ones(num_layouts, mixture_size, dtype=torch.float64)
        self.max_sharpness = max_sharpness
        self.score_momentum = score_momentum
        self.seed = seed

    def sharpness(self, progress: float) -> float:
        """Factor on the scores, from 1 at progress 0 to the maximum at progress 1."""
        return 1 + (self.max_sharpness - 1) * progress

    def assignment(self, progress: float) -> torch.Tensor:
        """p(supernet given layout) at this point of the search, shape (L, M)."""
        return assign(self.scores, self.sharpness(progress))

    def usage(self, progress: float) -> list[float]:
        """Expected share of steps of every supernet; each is 1/M within a thousandth."""
        return usage(self.assignment(progress)).tolist()

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """Draw layout and supernet, jointly p(layout) p(supernet | layout).

        A process that owns only some supernets draws one of them uniformly, which balance makes exact, then the
        layout from p(layout | supernet).
        """
        rng = np.random.default_rng((self.seed, step, 2))  # no stream of data.random_stream ends so
        assignment = self.assignment(progress).numpy()
        num_layouts, mixture_size = assignment.shape
        if len(owned) == mixture_size:
            layout = int(rng.integers(num_layouts))
            return Draw(layout, _pick(rng, assignment[layout]))
        supernet = owned[int(rng.integers(len(owned)))]
        return Draw(_pick(rng, assignment[:, supernet]), supernet)

    def update(self, draw: Draw, accuracy: float) -> None:
        """Smooth an accuracy into the score of what was drawn."""
        update_score(self.scores, draw.layout, draw.supernet, accuracy, self.score_momentum)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["scores"].shape != self.scores.shape:
            raise ValueError(f"scores of shape {tuple(state['scores'].shape)} are not {tuple(self.scores.shape)}")
        self.scores.copy_(state["scores"])


def _pick(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index with probability proportional to its weight."""
    cumulative = np.cumsum(weights)
    return int(min(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"), len(weights) - 1))
