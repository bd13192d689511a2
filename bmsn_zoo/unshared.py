"""A supernet whose units hold a set of weights for each resolution."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import InputError
from .layout import Layout


class UnsharedSupernet(nn.Module):
    """S supernets, the sets, used as one: a unit at level l, where maps are 2^l times smaller, runs with set l.

    A layout trains the sets that it uses and no others; the head is that of set 0. Some sets are never reached (unit 0
    is always at level 0), and stay as they started.

    Args:
        create: makes a supernet, as `Backbone.create` does.
        levels: S.
        same_start: whether all sets start with the weights of set 0, instead of each with its own.
    """

    sets: Any

    def __init__(self, create: Callable[[], Any], levels: int, same_start: bool) -> None:
        super().__init__()
        self.sets = nn.ModuleList(create() for _ in range(levels))
        first = self.sets[0]
        self.num_classes = first.num_classes
        for later in self.sets[1:]:
            later.reset_classifier(0)
            if same_start:
                later.load_state_dict({name: first.state_dict()[name] for name in later.state_dict()})
        self.set_layout((Layout.parse(first.layout).num_units,))  # it may have more scales than there are sets

    @property
    def layout(self) -> str:
        """The present layout, as text."""
        return str(self.sets[0].layout)

    def set_layout(self, layout: str | Sequence[int] | Layout) -> None:
        """Make it run another layout; weights are untouched.

        Raises:
            InputError: if the layout does not fit the units, or has more scales than there are sets.
        """
        parsed = Layout.parse(layout)
        if parsed.num_scales > len(self.sets):
            raise InputError(f"layout {parsed} has {parsed.num_scales} scales, here are weights for {len(self.sets)}")
        self.sets[0].set_layout(parsed)
        self._flags = parsed.flags

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to (B, num_classes) logits."""
        return self.sets[0].forward_head(x)

    def forward(self, x: Tensor) -> Tensor:
        level = 0
        for unit, flag in enumerate(self._flags):
            level += flag
            x = self.sets[level].forward_unit(x, unit, bool(flag))
        return self.forward_head(x)


def weights_at(supernet: Any, level: int) -> Any:
    """The network whose `forward_unit` runs units at a level, 0 being full size: one for all, but of unshared sets."""
    return supernet.sets[level] if isinstance(supernet, UnsharedSupernet) else supernet
