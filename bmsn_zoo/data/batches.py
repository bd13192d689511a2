"""Batches of an epoch: their order, their images, what augments them, and their way to the device."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..errors import InputError
from .pixels import RowLoader, RowReader

# purposes of random numbers, so that no two streams of one seed are alike
ORDER, AUGMENT, SCORE_ORDER, SPLIT, MIX, CHOICE = range(6)


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """Random numbers that depend on seed, purpose and position (such as epoch and step) alone."""
    return np.random.default_rng((seed, purpose, *position, 1))  # numpy would ignore a zero at the end


def stratified_split(
    labels: np.ndarray, size: float | int, seed: int, what: str, names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of two parts with the same share of every class; the second is of `size` (a share, or a count).

    Raises:
        InputError: if a class has too few images for both parts; `what` names them, `names` the classes.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) and counts.min() < 2:
        alone = classes[counts.argmin()]
        name = repr(names[alone]) if len(names) else alone
        raise InputError(f"class {name} has one image, too few for {what}: it needs two or more")
    try:
        first, second = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
    except ValueError as error:
        raise InputError(f"{len(labels)} images are too few for {what}: {' '.join(str(error).split())}") from None
    return np.sort(first), np.sort(second)


def check_batch_size(batch_size: int, processes: int, multiple: int = 1) -> None:
    """Check that every process gets the same number of a batch's images, two or more, in multiples of `multiple`.

    Raises:
        InputError: otherwise; it names the nearest sizes that do.
    """
    part = multiple * processes
    below, least = batch_size // part * part, max(2, multiple) * processes
    if batch_size != below or batch_size < least:
        fitting = sorted({max(size, least) for size in (below, below + part)})
        raise InputError(
            f"batch-size {batch_size} cannot be shared evenly by {processes} processes: "
            f"use {' or '.join(map(str, fitting))}"
        )


def shuffled_batches(
    count: int, batch_size: int, rng: np.random.Generator, shard: tuple[int, int] = (0, 1)
) -> list[np.ndarray]:
    """Positions of an epoch's full batches in random order, of each the part of one process.

    Args:
        count: images; those beyond the last full batch are left out.
        batch_size: images of a batch over all processes.
        rng: the same on every process.
        shard: this process and how many there are.
    """
    order = rng.permutation(count)
    starts = range(0, count // batch_size * batch_size, batch_size)
    return [order[start + shard[0] : start + batch_size : shard[1]] for start in starts]


def even_batches(count: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Positions of all images in random order, in as few batches of near-equal size as `batch_size` allows."""
    return np.array_split(rng.permutation(count), -(-count // batch_size))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, made without waiting on CUDA alone, where pinned memory stays until it has been read."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split: in memory, on a GPU, or streamed from disk.

    Attributes:
        labels: class of every image, int64, (N,).
        rows: position of every image in `pixels` or `reader`, (N,).
        pixels: bytes, (rows, H, W, C), if the images are in memory.
        reader: reads them otherwise.
        workers: processes that read.
    """

    labels: Tensor
    rows: np.ndarray
    pixels: Tensor | None
    reader: RowReader
    workers: int

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> "ImageSet":
        """The images at some positions; pixels are shared."""
        indices = np.ascontiguousarray(indices)
        return ImageSet(self.labels[indices], self.rows[indices], self.pixels, self.reader, self.workers)

    def near(self, device: torch.device) -> "ImageSet":
        """The same images, on a GPU if they take no more than a quarter of its free memory."""
        if self.pixels is None or device.type != "cuda":
            return self
        if self.pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        return replace(self, labels=self.labels.to(device), pixels=self.pixels.to(device))

    @functools.cached_property
    def _loader(self) -> RowLoader:  # its processes stay from epoch to epoch
        return RowLoader(self.reader, self.workers)

    def batches(
        self, order: Sequence[np.ndarray], device: torch.device | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes (B, H, W, C) and labels (B,) of each array of positions in `order`, in turn, on a device or the CPU."""
        device, rows, pixels = device or torch.device("cpu"), [self.rows[each] for each in order], self.pixels
        images = self._loader.read(rows) if pixels is None else (_take(pixels, batch) for batch in rows)
        for positions, batch in zip(order, images, strict=True):
            yield to_device(batch, device), to_device(_take(self.labels, positions), device)


def _take(tensor: Tensor, positions: np.ndarray) -> Tensor:
    """Some of a tensor's rows, where it is; on a CPU by numpy, since torch's own indexing takes 20 times longer."""
    if tensor.device.type == "cpu":
        return torch.from_numpy(tensor.numpy()[positions])
    return tensor[to_device(torch.from_numpy(positions), tensor.device)]


@dataclass(frozen=True)
class Augmentation:
    """Random crops and flips, for every image on its own, done by the device (paper, appendix).

    Args:
        crop_padding: black pixels on every side before a random crop of the old size.
        flip: mirror every image with probability one half.
    """

    crop_padding: int
    flip: bool

    def draw(self, steps: int, batch_size: int, rng: np.random.Generator, shard: tuple[int, int] = (0, 1)) -> Tensor:
        """Random numbers of an epoch, for `__call__` in each step, int64 (steps, 3, B).

        Args:
            steps: of the epoch, over all processes.
            batch_size: images of a step over all processes: what is drawn does not depend on their number.
            rng: the same on every process.
            shard: this process and how many there are.

        Returns:
            of each image of this process's shards, where its crop starts (row and column), and whether to mirror it.
        """
        shifts = rng.integers(0, 2 * self.crop_padding + 1, (steps, 2, batch_size))
        flips = rng.random((steps, 1, batch_size)) < (0.5 if self.flip else 0.0)
        return torch.from_numpy(np.concatenate([shifts, flips], axis=1)[:, :, shard[0] :: shard[1]])

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Augment bytes (B, H, W, C), on the device of both; the input is not modified.

        Args:
            images: this process's shard of a batch.
            drawn: its numbers as `draw` makes them, (3, B).
        """
        crop = crop_with_numpy if images.device.type == "cpu" else crop_with_torch
        return crop(images, drawn, self.crop_padding)


def crop_with_numpy(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """See `Augmentation`; on a CPU, this takes a fifth of torch's time and leaves its threads alone."""
    top, left, mirrored = drawn.numpy()
    count, size, _, channels = images.shape
    padded = np.zeros((count, size + 2 * padding, size + 2 * padding, channels), dtype=np.uint8)
    padded[:, padding : padding + size, padding : padding + size] = images.numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], (1, 2, 3))[:, :, :, 0]
    found = windows[np.arange(count), top, left]
    found[mirrored > 0] = found[mirrored > 0].take(np.arange(size)[::-1], axis=2)
    return torch.from_numpy(found)


def crop_with_torch(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """The same on any device."""
    top, left, mirrored = drawn[:, :, None]
    base = torch.arange(images.shape[1], device=images.device)
    down, across = top + base, left + torch.where(mirrored > 0, base.flip(0), base)
    padded = torch.nn.functional.pad(images, (0, 0) + (padding,) * 4)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, down[:, :, None], across[:, None, :]]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes (B, H, W, C) to normalised float32 (B, C, H, W), channels-last in memory, on the same device."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return (images * scale + shift).permute(0, 3, 1, 2)


@functools.lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once for each device: a copy to a GPU in every step would make the host wait for it."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    return scale, torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
