"""Batches of an epoch: their order, their images, what augments them, and their way to the device."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.ops import roi_align

from ..errors import InputError
from .pixels import RowLoader, RowReader, middle, seeded

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
        raise InputError(f"class {name} has one image, too few for {what}: it needs two (is --limit too small?)")
    try:
        first, second = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
    except ValueError:
        need = f"each part needs one image of each of the {len(classes)} classes"
        raise InputError(f"{len(labels)} images are too few for {what}: {need}") from None
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
    """Positions of all images in random order, in as few batches of near-equal size as `batch_size` allows.

    Of two images at least, which a batch's statistics need, where there are two.
    """
    return np.array_split(rng.permutation(count), max(1, min(-(-count // batch_size), count // 2)))


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
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to use again
        if self.pixels.nbytes > (torch.cuda.mem_get_info(device)[0] + kept) // 4:
            return self
        return replace(self, labels=self.labels.to(device), pixels=self.pixels.to(device))

    @functools.cached_property
    def _loader(self) -> RowLoader:  # its processes stay from epoch to epoch
        return RowLoader(self.reader, self.workers)

    def batches(
        self,
        order: Iterable[np.ndarray | tuple[np.ndarray, Tensor | None]],
        device: torch.device | None = None,
        augment: "Augmentation | None" = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes (B, H, W, C) and labels (B,) of batches of images in turn, on a device or the CPU.

        Args:
            order: positions of each batch, or these and what `augment` drew for it; workers read ahead in it. Another
                call ends the one before, if images are streamed.
            device: where to.
            augment: what to do to those batches for which something was drawn.
        """
        device = device or torch.device("cpu")
        pairs = ((each, None) if isinstance(each, np.ndarray) else each for each in order)
        now, ahead = itertools.tee(pairs)
        if self.pixels is None:
            images = self._loader.read((self._wanted(*pair, augment) for pair in ahead), device.type == "cuda")
        else:
            images = (_take(self.pixels, self.rows[positions]) for positions, _ in ahead)
        for (positions, drawn), batch in zip(now, images, strict=True):
            batch = to_device(batch, device)
            if drawn is not None and augment is not None and not (self.pixels is None and augment.resized):
                batch = augment(batch, drawn)
            elif batch.shape[1] != self.reader.size:
                batch = middle(batch, self.reader.size)
            yield batch, to_device(_take(self.labels, positions), device)

    def _wanted(self, positions: np.ndarray, drawn: Tensor | None, augment: "Augmentation | None") -> np.ndarray:
        """What workers are asked for: images, or random resized crops of them."""
        rows = self.rows[positions]
        return rows if drawn is None or not (augment and augment.resized) else np.vstack([rows, drawn.numpy()])


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
        resized: side of random resized crops in pixels, as timm draws them, instead; workers make those of streamed
            images, of the whole image, and the device those of images in memory, of their middle squares.
    """

    crop_padding: int
    flip: bool
    resized: int | None = None

    def draw(
        self,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
        shard: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
    ) -> Tensor:
        """Random numbers of an epoch, for `__call__` in each step, int64 (steps, 3 or 2, B).

        Args:
            steps: of the epoch, over all processes.
            batch_size: images of a step over all processes: what is drawn does not depend on their number.
            rng: the same on every process.
            shard: this process and how many there are.
            device: where they are used, which those of resized crops are not.

        Returns:
            of each image of this process's shards, where its crop starts (row and column), or the seed of its resized
            crop; and last, whether to mirror it.
        """
        if self.resized:
            crops = rng.integers(0, 2**31, (steps, 1, batch_size))
        else:
            crops = rng.integers(0, 2 * self.crop_padding + 1, (steps, 2, batch_size))
        flips = rng.random((steps, 1, batch_size)) < (0.5 if self.flip else 0.0)
        drawn = torch.from_numpy(np.concatenate([crops, flips], axis=1)[:, :, shard[0] :: shard[1]])
        return drawn if device is None or self.resized else to_device(drawn, device)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Augment bytes (B, H, W, C), on their device; the input is not modified.

        Args:
            images: this process's shard of a batch.
            drawn: its numbers as `draw` makes them, (3, B) on that device, or (2, B) on the CPU.
        """
        if self.resized:
            return crop_and_resize(images, drawn, self.resized)
        crop = crop_with_numpy if images.device.type == "cpu" else crop_with_torch
        return crop(images, drawn, self.crop_padding)


def crop_and_resize(images: Tensor, drawn: Tensor, size: int) -> Tensor:
    """Random resized crops on any device, mirrored or not; a pixel is the mean of what it covers (bilinear)."""
    seeds, mirrored = drawn.tolist()
    canvas, boxes = torch.empty(images.shape[1:3], device="meta"), []
    for index, seed in enumerate(seeds):
        with seeded(seed):
            top, left, height, width = RandomResizedCropAndInterpolation.get_params(canvas, (0.08, 1), (3 / 4, 4 / 3))
        boxes.append([index, left, top, left + width, top + height])
    where = to_device(torch.tensor(boxes, dtype=torch.float32), images.device)
    found = roi_align(images.permute(0, 3, 1, 2).float(), where, size, aligned=True)
    flipped = to_device(torch.tensor(mirrored), images.device).bool()
    found = torch.where(flipped[:, None, None, None], found.flip(3), found)
    return found.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


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
