"""`Backbone`: the units of a network; `SearchSpace`: all its layouts, in a fixed order. No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from .errors import InputError
from .layout import Layout

_MAX_LAYOUTS = 20_000


@dataclass(frozen=True)
class Backbone:
    """The units of a network, whatever their resolution.

    Unit 0 is a 3x3 stem convolution, every other one a residual block of two 3x3 convolutions, with a 1x1
    convolution on the shortcut where the number of channels changes. A downsampling is a 2x2 max pool on a
    unit's input, so no weight changes shape with the layout (paper, section 3).

    Args:
        channels: output channels of each unit.
        default_layout: where the original network downsamples.
    """

    channels: tuple[int, ...]
    default_layout: Layout

    @property
    def num_units(self) -> int:
        """Units in all, the stem included."""
        return len(self.channels)

    def macs(self, layout: Layout, image_size: int, in_chans: int = 3) -> int:
        """Multiply-accumulates of the convolutions for one square image of `image_size` pixels."""
        layout.check(self.num_units, image_size)
        total, inputs = 0, in_chans
        for unit, (size, outputs) in enumerate(zip(layout.resolutions(image_size), self.channels, strict=True)):
            weights = 9 * inputs * outputs
            if unit > 0:
                weights += 9 * outputs * outputs + (inputs * outputs if inputs != outputs else 0)
            total += weights * size * size
            inputs = outputs
        return total


BACKBONES = {
    "bmsn_resnet20": Backbone((16,) * 4 + (32,) * 3 + (64,) * 3, Layout((4, 3, 3))),
}


class SearchSpace:
    """All layouts of a backbone with a given number of scales, in lexicographic order (1-1-8 first).

    Args:
        backbone: a name in `BACKBONES`.
        default_layout: the layout to compare with; it sets the number of scales. The backbone's own if None.

    Raises:
        InputError: if the backbone is unknown, or the layout does not fit it.
    """

    def __init__(self, backbone: str, default_layout: str | Sequence[int] | Layout | None = None) -> None:
        if backbone not in BACKBONES:
            raise InputError(f"model {backbone!r} has no search space: use one of {', '.join(sorted(BACKBONES))}")
        self.name = backbone
        self.backbone = BACKBONES[backbone]
        self.default_layout = (
            self.backbone.default_layout if default_layout is None else Layout.parse(default_layout)
        ).check(self.backbone.num_units)
        units, downsamplings = self.backbone.num_units, self.num_scales - 1
        if comb(units - 1, downsamplings) > _MAX_LAYOUTS:
            raise InputError(f"{self.num_scales} scales give over {_MAX_LAYOUTS} layouts: use fewer scales")
        self._layouts = sorted(
            Layout(tuple(end - start for start, end in zip((0, *cuts), (*cuts, units), strict=True)))
            for cuts in combinations(range(1, units), downsamplings)
        )
        self._index = {layout: index for index, layout in enumerate(self._layouts)}

    @property
    def num_scales(self) -> int:
        """Resolutions of every layout."""
        return self.default_layout.num_scales

    def __len__(self) -> int:
        return len(self._layouts)

    def __getitem__(self, index: int) -> Layout:
        return self._layouts[index]

    def __iter__(self) -> Iterator[Layout]:
        return iter(self._layouts)

    def index(self, layout: str | Sequence[int] | Layout) -> int:
        """Position of a layout in this space.

        Raises:
            InputError: if the layout is not in it.
        """
        layout = Layout.parse(layout).check(self.backbone.num_units)
        if layout not in self._index:
            raise InputError(f"layout {layout} has {layout.num_scales} scales, this search has {self.num_scales}")
        return self._index[layout]

    def macs(self, layout: Layout, image_size: int, in_chans: int = 3) -> int:
        """Multiply-accumulates of a layout, see `Backbone.macs`."""
        return self.backbone.macs(layout, image_size, in_chans)
