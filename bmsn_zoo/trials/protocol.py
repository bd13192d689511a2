"""What the search asks of a plan; it knows nothing else of one."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from ..layout import Layout


class Trial(NamedTuple):
    """A layout that is trained alone, from this seed, by a schedule that ends after these epochs."""

    layout: Layout
    seed: int
    epochs: int


class Plan(Protocol):
    """Which layouts to train alone next: a function of the trials that are done, whatever their order."""

    def next(self, done: Mapping[Trial, float]) -> list[Trial]:
        """Trials that can be trained side by side, best known first; none when the plan is at its end.

        Args:
            done: accuracy on held-out training images, a fraction, of every trial that this has returned before.
        """
        ...
