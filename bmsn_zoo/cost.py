"""What a layout costs: a sum of rows, each counted once per (unit, size of its input, downsampling)."""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import InputError, first_line
from .layout import Layout

if TYPE_CHECKING:
    from .search_space import Backbone, SearchSpace


def macs(backbone: "Backbone", layout: Layout, image_size: int, in_chans: int = 3) -> int:
    """Multiply-accumulates of all units for one square image, as torch counts them; the head's are left out.

    Args:
        image_size: side of the image in pixels.
        in_chans: channels of the image.

    Raises:
        InputError: if the layout does not fit the backbone or the image.
    """
    return sum(count for count, _ in _rows(backbone, layout, image_size, in_chans))


def activations(backbone: "Backbone", layout: Layout, image_size: int, in_chans: int = 3) -> int:
    """Numbers in what all convolutions put out for one square image, which memory and time follow; see `macs`."""
    return sum(count for _, count in _rows(backbone, layout, image_size, in_chans))


def _rows(backbone: "Backbone", layout: Layout, image_size: int, in_chans: int) -> Iterator[tuple[int, int]]:
    shape = torch.Size((2, in_chans, image_size, image_size))  # norms want two
    for unit, flag in enumerate(backbone.check(layout, image_size).flags):
        *counts, shape = _row(backbone, in_chans, unit, shape, bool(flag))
        yield counts[0], counts[1]


def tree_macs(space: "SearchSpace", image_size: int, in_chans: int = 3) -> int:
    """Multiply-accumulates of all layouts of a space for one square image, what they share counted once.

    That is what `walk_layouts` computes: layouts are a tree, and units run once for all that downsample alike so far.

    Raises:
        InputError: if a layout does not fit the image.
    """
    tree: dict[tuple[int, ...], int] = {}
    for layout in space:
        for unit, (count, _) in enumerate(_rows(space.backbone, layout, image_size, in_chans)):
            tree[layout.flags[: unit + 1]] = count
    return sum(tree.values())


def relaxed_macs(backbone: "Backbone", levels: int, image_size: int, in_chans: int = 3) -> int:
    """Multiply-accumulates for one square image where all units but the first work at `levels` resolutions, from maps
    of full size, which relaxed searches do."""
    shape, total = torch.Size((2, in_chans, image_size, image_size)), 0
    for unit in range(backbone.num_units):
        two, channels, side, _ = shape
        for level in reversed(range(levels if unit else 1)):  # full size last: the next unit begins with what it makes
            smaller = torch.Size((two, channels, side >> level, side >> level))
            count, _, shape = _row(backbone, in_chans, unit, smaller, False)
            total += count
    return total


@cache
def _row(
    backbone: "Backbone", in_chans: int, unit: int, shape: torch.Size, downsample: bool
) -> tuple[int, int, torch.Size]:
    """Multiply-accumulates and activations of one unit for each of two maps, and the shape of what it makes of both."""
    network, outputs = _network(backbone, in_chans)
    outputs.clear()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            x = network.forward_unit(torch.empty(shape, device="meta"), unit, downsample)
    except RuntimeError as error:  # anti-aliased shortcuts round odd sides up, the main path down
        raise InputError(
            f"unit {unit + 1} of this model cannot take maps of {shape[-1]} x {shape[-1]} pixels "
            f"({first_line(error)}): use an image-size whose half, quarter ... are whole numbers"
        ) from error
    return counter.get_total_flops() // 4, sum(outputs) // 2, x.shape


@cache
def _network(backbone: "Backbone", in_chans: int) -> tuple[Any, list[int]]:
    """A network that computes nothing, and where the sizes of what its convolutions put out are written."""
    network, outputs = backbone.create(num_classes=0, in_chans=in_chans, device="meta"), list[int]()
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.register_forward_hook(lambda *call: outputs.append(call[2].numel()))
    return network, outputs
