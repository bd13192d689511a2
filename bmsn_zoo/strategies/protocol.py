"""What the search loop asks of a strategy; it knows nothing else of one."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor


class Draw(NamedTuple):
    """What one search step trains: indices of a layout and of a supernet."""

    layout: int
    supernet: int


Scoring = Literal["none", "drawn", "all"]


class Strategy(Protocol):
    """Who is trained next; with the same seed, steps and accuracies it draws the same on every process.

    Attributes:
        scoring: what a step measures on images of the score split, with the drawn layout: nothing, a quarter cheaper;
            the drawn supernet, after its step; or all supernets on the same images, before it.
        own: the supernet that alone says in the end how good each layout is; None if that is the best of all.

    A strategy may also have `split_at`, the progress where its search begins anew, and `splits(progress)`, true once
    from there on: then all supernets become copies of the first one, and learning rates start again.
    """

    scoring: Scoring
    own: Sequence[int] | None

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """The layout and supernet of a step; `progress` runs from 0 to 1 over the search, `owned` limits supernets."""
        ...

    def update(self, draw: Draw, accuracies: Sequence[float]) -> None:
        """Learn the accuracies that `scoring` asks for, fractions: none, of what was drawn, or of every supernet."""
        ...

    def exchange(self, owned: range, gather: Callable[[Tensor], Tensor]) -> None:
        """Learn what the owners of other supernets did; `gather` joins all processes' rows, one for each supernet."""
        ...

    def report(self, progress: float) -> dict[str, Any]:
        """What metrics.jsonl keeps of it after an epoch."""
        ...

    def result(self) -> dict[str, Any]:
        """What search.json keeps of it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that later draws depend on."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        ...


def scorings(strategy: Strategy, mixture_size: int) -> int:
    """How many supernets a step scores."""
    return {"none": 0, "drawn": 1, "all": mixture_size}[strategy.scoring]
