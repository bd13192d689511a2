"""A random fixed assignment: M sets of weights without a learned assignment, the control of the balanced mixture."""

from typing import Any

import numpy as np

from ..config import SearchConfig
from ..errors import InputError
from ..search_space import SearchSpace
from .protocol import Draw
from .uniform import Uniform, step_rng, uniform_index


class Fixed(Uniform):
    """Layouts are drawn uniformly and train the supernet that they were dealt, which alone ranks them in the end.

    The layouts are shuffled and dealt in turn, so that the shares of supernets differ by one layout at most.

    Args:
        space: of L layouts.
        config: `mixture_size` M, at most L; `seed` and `draws`.

    Raises:
        InputError: if there are more supernets than layouts.
    """

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__(space, config)
        if config.mixture_size > len(space):
            raise InputError(f"mixture-size {config.mixture_size} leaves supernets without any of {len(space)} layouts")
        place = np.random.default_rng((config.seed, 0, 6)).permutation(len(space))
        self.own = (place % config.mixture_size).tolist()

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """Draw uniformly among the layouts of the owned supernets."""
        assert self.own is not None
        mine = [layout for layout, supernet in enumerate(self.own) if supernet in owned]
        turn = step * len(owned) // self.config.mixture_size
        layout = mine[uniform_index(self.config, len(mine), turn, step_rng(self.config, step))]
        return Draw(layout, self.own[layout])

    def result(self) -> dict[str, Any]:
        """The assignment, ones and zeros, (L, M), and the draws."""
        assert self.own is not None
        return {"assignment_matrix": np.eye(self.config.mixture_size)[self.own].tolist(), **super().result()}
