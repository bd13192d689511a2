"""Few-shot search: one supernet first, then a copy of it for each group of layouts that are alike (Zhao, 2021)."""

from ..config import SearchConfig
from ..errors import InputError
from ..search_space import SearchSpace
from .fixed import Fixed
from .protocol import Draw
from .uniform import step_rng, uniform_index


class FewShot(Fixed):
    """Layouts are drawn uniformly: all train the first supernet until the split, then each that of its group.

    Groups hold layouts that follow each other in the order of their mean log resolution; their sizes differ by one at
    most. With the split the learning rate starts anew.

    Args:
        space: of L layouts.
        config: `mixture_size` M, at most L; `seed`, `draws`, and `uniform_share`, which ends with the split.

    Raises:
        InputError: if there are more supernets than layouts, or processes have supernets of their own.
    """

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__(space, config)
        if config.parallel == "mixture":
            raise InputError("strategy few-shot copies one supernet to all others: use --parallel data")
        self.split_at = config.uniform_share
        self.state["split"] = self.table(1)
        levels = [sum(level * units for level, units in enumerate(layout.units_per_scale)) for layout in space]
        place = sorted(range(len(space)), key=lambda layout: (-levels[layout], layout))
        self.own = [place.index(layout) * config.mixture_size // len(space) for layout in range(len(space))]

    def splits(self, progress: float) -> bool:
        """Whether all supernets become copies of the first one now; true once."""
        due = progress >= self.split_at and not self.state["split"].any()
        self.state["split"] += due
        return due

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """Draw uniformly among all layouts."""
        if self.state["split"].any():
            return super().draw(step, progress, owned)
        return Draw(uniform_index(self.config, len(self.space), step, step_rng(self.config, step)), 0)
