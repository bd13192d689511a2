"""Batches of an epoch: their order, their images, what augments them, and their way to the device."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..errors import InputError
from .pixels import RowReader, read_rows

# purposes of random numbers, so that no two streams of one seed are alike
ORDER, AUGMENT, SCORE_ORDER, SPLIT, MIX = range(5)


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """Random numbers that depend on seed, purpose and position (such as epoch and step) alone."""
    return np.random.default_rng((seed, purpose, *position, 1))  # numpy would ignore a zero at the end


def stratified_split(labels: np.ndarray, size: float | int, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of two parts with the same share of every class; the second is of `size` (a share, or a count).

    Raises:
        InputError: if a class has too few images for both parts; `what` names them.
    """
    try:
        first, second = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
    except ValueError as error:
        raise InputError(f"{len(labels)} images are too few for {what}: {' '.join(str(error).split())}") from None
    return np.sort(first), np.sort(second)


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


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split, in memory or streamed from disk.

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

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes (B, H, W, C) and labels (B,) of each array of positions in `order`, in turn, on the CPU."""
        rows = [self.rows[positions] for positions in order]
        pixels = self.pixels
        source = (pixels[batch] for batch in rows) if pixels is not None else read_rows(self.reader, rows, self.workers)
        for positions, images in zip(order, source, strict=True):
            yield images, self.labels[positions]


@dataclass(frozen=True)
class Augmentation:
    """Random crops and flips, for every image on its own, done by the device (paper, appendix).

    Args:
        crop_padding: black pixels on every side before a random crop of the old size.
        flip: mirror every image with probability one half.
    """

    crop_padding: int
    flip: bool

    def __call__(
        self, images: Tensor, rng: np.random.Generator, shard: tuple[int, int] = (0, 1), mirrored: Tensor | None = None
    ) -> Tensor:
        """Augment bytes (B, H, W, C).

        Args:
            images: this process's shard of a batch, on the device.
            rng: the same on every process; numbers are drawn for the whole batch, so that they do not depend on
                the number of processes.
            shard: this process and how many there are.
            mirrored: which images to mirror, (B,), instead of a random half.
        """
        size, total = images.shape[1], len(images) * shard[1]
        shifts = rng.integers(0, 2 * self.crop_padding + 1, (2, total))[:, shard[0] :: shard[1]]
        flips = rng.random(total)[shard[0] :: shard[1]] < (0.5 if self.flip else 0.0)
        numbers = torch.from_numpy(np.concatenate([shifts, flips[None]]).astype(np.int64))
        rows, columns, flipped = numbers.to(images.device, non_blocking=True)[:, :, None]
        if mirrored is not None:
            flipped = mirrored.to(images.device, torch.int64)[:, None]
        if self.crop_padding == 0 and not self.flip and mirrored is None:
            return images
        base = torch.arange(size, device=images.device)
        rows = rows + base
        columns = columns + torch.where(flipped.bool(), size - 1 - base, base)
        padded = torch.nn.functional.pad(images, (0, 0) + (self.crop_padding,) * 4)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[batch, rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes (B, H, W, C) to normalised float32 (B, C, H, W), channels-last in memory, on the same device."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return (images * scale + shift).permute(0, 3, 1, 2)


@functools.lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once for each device: a copy to a GPU in every step would make the host wait for it."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    return scale, torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
