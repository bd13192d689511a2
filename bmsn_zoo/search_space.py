"""`Backbone`: what a searchable network offers, by a name; `SearchSpace`: layouts of one, in a fixed order."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from . import cost
from .config import MAX_LAYOUTS
from .errors import InputError
from .layout import Layout, halve_down


@dataclass(frozen=True)
class Backbone:
    """All that a network must offer to be searchable: the units of it, whatever their resolution.

    Args:
        create: makes a supernet from `num_classes`, `in_chans` and `device`: a timm model that has, beside timm's
            `forward_head`, its present `layout`, `set_layout(layout)` for a whole `forward`, and
            `forward_unit(x, unit, downsample)`, which runs one unit and leaves the layout as it is. What runs before
            the first unit belongs to unit 0. No weight changes shape with the layout (paper, section 3).
        channels: output channels of each unit.
        default_layout: where the original network downsamples.
        max_pools: whether a downsampling is a 2x2 max pool on the unit's input, as relaxed searches need it.
        halve: the side in pixels that a downsampling leaves of a side; pools round down, strides up.
        stem: the side that what runs before the first unit leaves of the image's.
        pretrains: whether there are published weights, from which `create` starts with `pretrained=True`.
    """

    create: Callable[..., Any]
    channels: tuple[int, ...]
    default_layout: Layout
    halve: Callable[[int], int] = halve_down
    max_pools: bool = False
    stem: Callable[[int], int] = int
    pretrains: bool = False

    @property
    def num_units(self) -> int:
        """Units in all, the stem included if it is one."""
        return len(self.channels)

    def check(self, layout: str | Sequence[int] | Layout, image_size: int | None = None) -> Layout:
        """The layout, if this backbone can run it (on square images of `image_size` pixels); see `Layout.check`."""
        return Layout.parse(layout).check(self.num_units, image_size, self.halve, self.stem)

    def resolutions(self, layout: Layout, image_size: int) -> tuple[int, ...]:
        """Side of each unit's feature map in pixels, for square images of `image_size` pixels."""
        return layout.resolutions(self.stem(image_size), self.halve)


BACKBONES: dict[str, Backbone] = {}  # by the name of the timm model; each module of models/ enters its own
OTHERS: list[Callable[[str], Backbone | None]] = []  # those of models/ that make one of other names, None if not theirs


def backbone_of(name: str) -> Backbone:
    """The backbone of a name: one of `BACKBONES`, or any ResNet of timm that `relayout` supports.

    Raises:
        InputError: if there is none.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    for other in OTHERS:
        if (backbone := other(name)) is not None:
            return backbone
    names = ", ".join(sorted(BACKBONES))
    raise InputError(f"model {name!r} has no search space: use one of {names}, or a ResNet of timm such as resnet50")


def require_weights(name: str) -> None:
    """Refuse a model that `--pretrained` finds no weights for.

    Raises:
        InputError: if the backbone of this name has none.
    """
    if not backbone_of(name).pretrains:
        raise InputError(
            f"pretrained: there are no weights for the model {name}: use one that timm has weights for, such as "
            "resnet50.a1_in1k, or leave --pretrained out"
        )


class SearchSpace:
    """All layouts of a backbone with a given number of scales, in lexicographic order (1-1-8 first).

    Args:
        backbone: a name for `backbone_of`.
        default_layout: the layout to compare with; it sets the number of scales. The backbone's own if None.

    Raises:
        InputError: if the backbone is unknown, or the layout does not fit it.
    """

    def __init__(self, backbone: str, default_layout: str | Sequence[int] | Layout | None = None) -> None:
        self.name = backbone
        self.backbone = backbone_of(backbone)
        self.default_layout = self.backbone.check(
            self.backbone.default_layout if default_layout is None else default_layout
        )
        units, downsamplings = self.backbone.num_units, self.default_layout.num_scales - 1
        if math.comb(units - 1, downsamplings) > MAX_LAYOUTS:
            raise InputError(f"{downsamplings + 1} scales give over {MAX_LAYOUTS} layouts: use fewer scales")
        self._hold(
            Layout(tuple(end - start for start, end in zip((0, *cuts), (*cuts, units), strict=True)))
            for cuts in combinations(range(1, units), downsamplings)
        )

    def _hold(self, layouts: Iterable[Layout]) -> None:
        self._layouts = sorted(set(layouts))
        self._index = {layout: index for index, layout in enumerate(self._layouts)}

    def subset(self, layouts: Iterable[str | Sequence[int] | Layout]) -> "SearchSpace":
        """A space of some layouts of this backbone, of any number of scales; the default need not be among them.

        Raises:
            InputError: if there is none, or one does not fit the backbone.
        """
        space = copy(self)
        space._hold(self.backbone.check(layout) for layout in layouts)
        if not len(space):
            raise InputError("no layout is left to search: allow more of them")
        return space

    def within(
        self, image_size: int, in_chans: int, max_macs: str | None = None, max_activations: str | None = None
    ) -> "SearchSpace":
        """The layouts that cost no more than allowed for one square image.

        Args:
            image_size: side of the image in pixels.
            in_chans: channels of the image.
            max_macs: multiply-accumulates: a number, "default" for those of the default layout, "0.8x" for a part.
            max_activations: the same of what all convolutions put out, see `cost.activations`.

        Raises:
            InputError: if none is left.
        """
        space = self
        for what, text, count in (("macs", max_macs, cost.macs), ("activations", max_activations, cost.activations)):
            if text is None:
                continue
            costs = {layout: count(self.backbone, layout, image_size, in_chans) for layout in space}
            limit = float(text.replace("default", "1x").rstrip("x"))
            if text.endswith(("x", "default")):
                limit *= count(self.backbone, self.default_layout, image_size, in_chans)
            space = space.at_most(limit, costs, f"max-{what} {text}")
        return space

    def at_most(self, limit: float, costs: Mapping[Layout, float], asked: str, unit: str = "") -> "SearchSpace":
        """The layouts that cost no more than a limit, which messages call as it was asked for.

        Raises:
            InputError: if none is left.
        """
        left = [layout for layout in self if costs[layout] <= limit]
        if not left:
            cheapest = min(self, key=lambda layout: costs[layout])
            least = f"{math.ceil(1000 * costs[cheapest]) / 1000}{unit}" if unit else costs[cheapest]
            raise InputError(
                f"{asked} leaves none of {len(self)} layouts: the cheapest, {cheapest}, costs {least}: allow at least "
                "that, or use smaller images"
            )
        return self.subset(left)

    def __len__(self) -> int:
        return len(self._layouts)

    def __getitem__(self, index: int) -> Layout:
        return self._layouts[index]

    def __iter__(self) -> Iterator[Layout]:
        return iter(self._layouts)

    def __contains__(self, layout: object) -> bool:
        return layout in self._index

    def index(self, layout: str | Sequence[int] | Layout) -> int:
        """Position of a layout in this space.

        Raises:
            InputError: if the layout is not in it.
        """
        layout = self.backbone.check(layout)
        if layout not in self:
            scales = sorted({found.num_scales for found in self})
            if layout.num_scales not in scales:
                found = " or ".join(map(str, scales))
                raise InputError(f"layout {layout} has {layout.num_scales} scales, this search has {found}")
            raise InputError(f"layout {layout} is not among the {len(self)} layouts of this search")
        return self._index[layout]

    def macs(self, layout: Layout, image_size: int, in_chans: int = 3) -> int:
        """Multiply-accumulates of a layout for one square image, see `cost.macs`."""
        return cost.macs(self.backbone, layout, image_size, in_chans)
