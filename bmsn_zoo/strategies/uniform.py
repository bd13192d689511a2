"""Uniform draws: plain one-shot search, of M supernets side by side; and what other strategies share with it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import SearchConfig
from ..search_space import SearchSpace
from .protocol import Draw, Scoring


def step_rng(config: SearchConfig, step: int) -> np.random.Generator:
    """Random numbers of one step, the same on every process and after resuming."""
    return np.random.default_rng((config.seed, step, 2))  # no stream of data.random_stream ends so


def uniform_index(config: SearchConfig, count: int, turn: int, rng: np.random.Generator) -> int:
    """One of `count` things: at random, or (`draws` permutation) in rounds that take each of them once.

    Args:
        turn: of this process, from 0; rounds need nothing else, so that no state has to be saved.
    """
    if config.draws != "permutation":
        return int(rng.integers(count))
    cycle, place = divmod(turn, count)
    return int(np.random.default_rng((config.seed, cycle, 7)).permutation(count)[place])


class Uniform:
    """Layouts and supernets are drawn uniformly, independently of each other; with M = 1 this is SPOS (Guo, 2020).

    Args:
        space: of L layouts.
        config: `mixture_size` M, `seed` and `draws`; in rounds, every supernet trains every layout in turn, too.

    Attributes:
        state: float64 tensors that a checkpoint holds: draws (L, M), or what strategies that begin like this one learn.
    """

    scoring: Scoring = "none"
    own: Sequence[int] | None = None

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        self.space, self.config = space, config
        self.state = {"draws": self.table(len(space))}

    def table(self, rows: int, value: float = 0.0) -> Tensor:
        """A new tensor (rows, M) to learn in."""
        return torch.full((rows, self.config.mixture_size), value, dtype=torch.float64)

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """Draw uniformly; in rounds, supernets take turns at a layout, those of one round evenly."""
        rng, turn = step_rng(self.config, step), step * len(owned) // self.config.mixture_size
        layout = uniform_index(self.config, len(self.space), turn, rng)
        if self.config.draws != "permutation":
            return Draw(layout, owned[int(rng.integers(len(owned)))])
        shuffled = np.random.default_rng((self.config.seed, 0, 8)).permutation(len(self.space))
        return Draw(layout, owned[(int(shuffled[layout]) + turn // len(self.space)) % len(owned)])

    def update(self, draw: Draw, accuracies: Sequence[float]) -> None:
        """Count the draw; nothing is learned."""
        self.state["draws"].numpy()[draw] += 1

    def exchange(self, owned: range, gather: Callable[[Tensor], Tensor]) -> None:
        """Take the columns of all supernets, each from its owner; the state's tensors have one for every supernet."""
        for table in self.state.values():
            table.copy_(gather(table[:, owned.start : owned.stop].T.contiguous()).T)

    def report(self, progress: float) -> dict[str, Any]:
        """Nothing that other strategies do not say as well."""
        return {}

    def result(self) -> dict[str, Any]:
        """How often every supernet trained every layout, (L, M)."""
        return {"details": {"draws": self.state["draws"].long().tolist()}}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state."""
        return {name: table.clone() for name, table in self.state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        for name, table in self.state.items():
            if table.shape != state[name].shape:
                raise ValueError(f"a state of shape {tuple(state[name].shape)} is not {tuple(table.shape)}")
            table.copy_(state[name])
