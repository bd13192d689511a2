"""What a layout costs: a sum of rows, each counted or timed once per (unit, size of its input, downsampling)."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import InputError, first_line
from .layout import Layout

if TYPE_CHECKING:
    from .search_space import Backbone, SearchSpace

Row = tuple[int, int, bool]  # a unit, the downsamplings before it, whether it is one; the head comes as one more unit
_ROUNDS, _LEAST = 50, 3  # of a measurement, at most and at least


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


# latency


def rows_of(layout: Layout) -> list[Row]:
    """The rows whose latencies are a layout's: those of its units, and that of the head."""
    rows, scale = list[Row](), 0
    for unit, flag in enumerate(layout.flags):
        rows.append((unit, scale, bool(flag)))
        scale += flag
    return [*rows, (layout.num_units, scale, False)]


def deployable(backbone: "Backbone", num_classes: int, in_chans: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A network that runs as a trained one does, and still unit by unit: batch norms use statistics that they hold."""
    with torch.random.fork_rng(devices=[]):
        network = backbone.create(num_classes=num_classes, in_chans=in_chans)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats, norm.affine = True, True
            norm.running_mean, norm.running_var = torch.zeros(norm.num_features), torch.ones(norm.num_features)
            norm.weight, norm.bias = nn.Parameter(torch.ones(norm.num_features)), nn.Parameter(norm.running_mean + 0)
    return network.eval().to(device, dtype, memory_format=torch.channels_last)


@torch.inference_mode()
def time_units(
    network: Any, layouts: Iterable[Layout], sample: Sequence[Layout], images: torch.Tensor, seconds: float = 1.5
) -> tuple[dict[Row, list[float]], dict[Layout, list[float]]]:
    """Time all units as any of some layouts uses them, and some networks from end to end.

    All are timed in turn, in rounds, so that a clock that slows down meets all alike; rounds are as many as the time
    allows, 3 at least and 50 at most, after others that warm the units up for a third of it, at least one.

    Args:
        network: see `deployable`.
        layouts: whose units are timed.
        sample: those to time from end to end.
        images: one batch, (B, C, H, W), on the network's device.
        seconds: that the rounds should take.

    Returns:
        seconds of every row of `rows_of`, and of every layout of the sample, round by round.
    """
    homes: dict[Row, Layout] = {row: layout for layout in layouts for row in rows_of(layout)}
    rows, whole = defaultdict[Row, list[float]](list), defaultdict[Layout, list[float]](list)

    def timed(layout: Layout, run: Callable[..., torch.Tensor], *inputs: Any) -> tuple[torch.Tensor, float]:
        network.set_layout(layout)  # before the clock starts: a unit that changes costs time of the host
        begun = time.perf_counter()
        output = run(*inputs)
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)
        return output, time.perf_counter() - begun

    def run_round(sample: Sequence[Layout]) -> None:
        maps = {0: images}  # what the next unit gets at each resolution
        for unit in sorted({row[0] for row in homes}):
            made: dict[int, torch.Tensor] = {}
            for row, layout in homes.items():
                if row[0] == unit:
                    _, scale, downsamples = row
                    head = unit == layout.num_units
                    run = network.forward_head if head else network.forward_unit
                    more = () if head else (unit, downsamples)
                    made[scale + downsamples], took = timed(layout, run, maps[scale], *more)
                    rows[row].append(took)
            maps = made
        for layout in sample:
            whole[layout].append(timed(layout, network, images)[1])

    for limit, least, whole_ones in ((seconds / 3, 1, ()), (seconds, _LEAST, sample)):
        rows.clear()
        whole.clear()
        done, begun = 0, time.monotonic()
        while done < least or (done < _ROUNDS and time.monotonic() < begun + limit):
            run_round(whole_ones)
            done += 1
    return rows, whole
