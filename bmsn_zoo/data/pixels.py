"""Images of any kind as bytes of one size: decoding, the one rule that they follow, and the cache."""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ..errors import InputError, first_line

_log = logging.getLogger(__name__)
_CHUNK = 500  # images that a worker decodes at a time
_TURNS = dict(enumerate((0, 3, 1, 5, 4, 6, 2), 2))  # EXIF orientation to PIL's Transpose
Scale = tuple[float, float]  # values of black and of white


def to_pixels(
    image: Image.Image,
    size: int,
    in_chans: int,
    scales: Mapping[str, Scale] | None = None,
    short: int | None = None,
    side: int | None = None,
) -> np.ndarray:
    """One image of any kind as a (size, size, in_chans) array of bytes.

    The rule: `prepare`; the shorter side resized (bicubic), then the middle square cut out, to the pixel as timm's
    transform for evaluation does.

    Args:
        image: any image.
        size: side of the square in pixels.
        in_chans: 3 for colour, 1 for gray.
        scales: see `prepare`.
        short: pixels that the shorter side is resized to; `size` if None.
        side: of a larger square to return instead, of which that one is the middle, as `middle` cuts it out.

    Raises:
        ValueError: see `prepare`.
    """
    image, short, side = prepare(image, in_chans, scales), short or size, side or size
    if image.size != (side, side) or short != side:
        if max(image.size) > 16 * min(image.size):  # what the cut would throw away need not be resized first
            least = 16 * min(image.size)
            border: Any = tuple((length - min(length, least)) // 2 for length in image.size)  # a number to its types
            image = ImageOps.crop(image, border)
        width, height = (short * length // min(image.size) for length in image.size)
        left, top = (round((length - size) / 2) - round((side - size) / 2) for length in (width, height))
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    return np.asarray(image).reshape(side, side, in_chans)


def middle(images: Tensor, size: int) -> Tensor:
    """The squares of `size` pixels that evaluation takes of bytes (B, H, W, C) that were kept larger."""
    start = round((images.shape[1] - size) / 2)
    return images[:, start : start + size, start : start + size]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's random numbers from a seed, as timm's transforms draw them; afterwards they go on as before."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def prepare(image: Image.Image, in_chans: int | None, scales: Mapping[str, Scale] | None = None) -> Image.Image:
    """An image of any kind in a mode that networks see, of its own size.

    Turned upright as its EXIF data says; more than 8 bits a channel scaled down to 8, see `find_scale`; transparency
    laid on white; made RGB or gray.

    Args:
        image: any image.
        in_chans: 3 for colour, 1 for gray; what it is if None.
        scales: black and white of the modes of more than 8 bits, the same for a whole set; this image's own if None.

    Raises:
        ValueError: for values that are not finite, or a mode of more than 8 bits that `scales` lacks.
    """
    image.load()  # EXIF data may come last
    orientation = None
    with contextlib.suppress(Exception):  # damaged EXIF data says nothing about the pixels
        orientation = _TURNS.get(image.getexif()[ExifTags.Base.Orientation])
    if orientation is not None:  # exif_transpose would fail where it cannot write the rest of the data again
        image = image.transpose(Image.Transpose(orientation))
    if (mode := deep_mode(image)) is not None:
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinite values")
        if scales is not None and mode not in scales and mode != "I;16":
            raise ValueError(f"its values are of type {mode}, unlike those of the images that were looked at first")
        black, white = (scales or {}).get(mode) or find_scale(mode, values.min(), values.max())
        image = Image.fromarray((255 * (values - black) / (white - black)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "RGB" if in_chans == 3 or (in_chans is None and image.mode not in ("L", "1")) else "L"
    return image if image.mode == mode else image.convert(mode)


def shrink(row: dict[str, Any], column: str, size: int) -> dict[str, Any]:
    """A row whose image, undecoded, became a JPEG of quality 90 whose shorter side has `size` pixels; not enlarged.

    Images of more than 8 bits a channel, and those that cannot be read, stay as they are.
    """
    with contextlib.suppress(Exception), open_image(row[column]) as image:  # who reads it later names the row
        if deep_mode(image) is None and min(image.size) > size:
            image, file = prepare(image, None), io.BytesIO()
            width, height = (size * length // min(image.size) for length in image.size)
            image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            return {column: {"bytes": file.getvalue(), "path": None}}
    return {column: row[column]}


def deep_mode(image: Image.Image) -> str | None:
    """Which kind of more than 8 bits a channel an image is: "I;16", "I" (int32), "F" (float32), or None."""
    return "I;16" if image.mode.startswith("I;16") else image.mode if image.mode in ("I", "F") else None


def find_scale(mode: str, low: float, high: float) -> Scale:
    """Values of black and white of a set of images of more than 8 bits a channel.

    Unsigned 16-bit images always run from 0 to 65,535. For int32 and float32, white is the first of 1, 2, 4, 8, 16,
    and 2^n - 1 from 255 on, that the values exceed by no more than a tenth, which is cut off; black is 0, or -white
    if there are negative values beyond a tenth of it.

    Args:
        mode: as `deep_mode` names it.
        low: smallest value of some images of the set.
        high: largest value of them.
    """
    if mode == "I;16":
        return 0.0, 65535.0
    bits = math.ceil(math.log2(max(high, -low, 1.0) / 1.1))
    white = 2.0**bits if bits <= 4 else 2.0 ** max(bits, 8) - 1
    return (-white if low < -white / 10 else 0.0), white


def open_image(value: dict[str, Any] | None, likely: str | None = None) -> Image.Image:
    """An image as a data set stores it undecoded: bytes, or a path; `likely` is a format to try before all others."""
    if value is None or not (value["bytes"] or value["path"]):
        raise ValueError("there is none")
    file = io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]
    if likely in ("JPEG", "PNG", "WEBP"):  # told from all others by their first bytes
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(file, formats=[likely])
    return Image.open(file)


@dataclass
class RowReader(Dataset[Any]):
    """Rows of a split as pixels; an unreadable image comes back as the text of its error.

    Attributes:
        source: the split.
        column: of the images.
        split: name of the split, for errors.
        rows: those to read, in the order of their positions here.
        size, in_chans, scales, short, side: for `to_pixels`.
        likely: the format of the last image.
        names: their numbers in errors; `rows` if None.
    """

    source: datasets.Dataset
    column: str
    split: str
    rows: np.ndarray
    size: int = 1
    in_chans: int = 3
    scales: Mapping[str, Scale] | None = None
    likely: str | None = None
    short: int | None = None
    side: int | None = None
    names: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.source = self.source.select_columns([self.column])
        self.source = self.source.cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, wanted: np.ndarray) -> list[np.ndarray | str]:
        """Images at some positions (B,), or random resized crops of them: (3, B), with `Augmentation`'s numbers."""
        positions, *drawn = np.atleast_2d(wanted)
        try:
            values = self.values(positions)
        except InputError as error:
            return [str(error)]
        names = (self.rows if self.names is None else self.names)[positions]
        return [self._read(*each) for each in zip(names, values, *drawn, strict=True)]

    def values(self, positions: np.ndarray) -> list[dict[str, Any] | None]:
        """What the data set holds at some positions, undecoded."""
        try:
            return self.source[self.rows[positions].tolist()][self.column]
        except Exception as error:  # not an image but the file of all of them is damaged
            raise InputError(f"the images of split {self.split!r} cannot be read: {first_line(error)}") from None

    def fault(self, row: int, value: dict[str, Any] | None, error: Exception) -> str:
        """Which image of the user's set cannot be read, and why."""
        file = f" ({value['path']})" if value and value["path"] else ""
        return f"the image in row {row} of split {self.split!r}{file} cannot be read: {first_line(error)}"

    def _read(
        self, row: int, value: dict[str, Any] | None, seed: int | None = None, mirrored: int = 0
    ) -> np.ndarray | str:
        try:
            with open_image(value, self.likely) as image:
                self.likely = image.format
                if seed is None:
                    return to_pixels(image, self.size, self.in_chans, self.scales, self.short, self.side)
                with seeded(int(seed)):
                    crop = RandomResizedCropAndInterpolation(self.size, interpolation="bicubic")
                    image = crop(prepare(image, self.in_chans, self.scales))
                image = ImageOps.mirror(image) if mirrored else image
                return np.asarray(image).reshape(self.size, self.size, self.in_chans)
        except Exception as error:  # decoders of damaged files raise anything
            return self.fault(row, value, error)

    def files(self) -> list[tuple[str, int, int]] | None:
        """Path, size in bytes and time in ns of the files that hold the images; None if memory alone holds some."""
        paths = [file["filename"] for file in self.source.cache_files]
        for chunk in self.source.data.column(self.column).chunks:
            outside = chunk.field("bytes").is_null()
            if not self.source.cache_files and outside.false_count:
                return None
            paths += chunk.filter(outside).field("path").drop_null().to_pylist()
        found = []
        for path in paths:
            with contextlib.suppress(OSError):  # reading it will say so
                status = os.stat(path)
                found.append((path, status.st_size, status.st_mtime_ns))
        return found

    def cache_file(self, folder: str, suffix: str, *about: Any) -> Path | None:
        """Where to keep what is made of these rows, and how; named by the files that hold them, if they do."""
        if (files := self.files()) is None:
            return None
        rows = hashlib.sha256(self.rows.tobytes()).hexdigest()
        key = hashlib.sha256(json.dumps([4, files, rows, self.column, *about]).encode()).hexdigest()
        return Path(datasets.config.HF_DATASETS_CACHE) / f"bmsn_zoo_{folder}" / (key[:32] + suffix)


def _stack(rows: list[np.ndarray | str]) -> Tensor | str:
    bad = [row for row in rows if isinstance(row, str)]
    return bad[0] if bad else torch.from_numpy(np.stack(cast(list[np.ndarray], rows)))


class _Order:
    """What workers are to read; another object than the loader, whose workers end when it goes, not some time later."""

    batches: Iterable[np.ndarray] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)


class RowLoader:
    """Decodes batches of rows in worker processes, which stay until this object goes."""

    def __init__(self, reader: RowReader, workers: int) -> None:
        # torch's handler would raise wherever the main thread is when a worker ends, not where it waits for images
        signal_handling._SIGCHLD_handler_set = True
        self.order = _Order()
        self.loader = DataLoader(
            reader,
            batch_sampler=self.order,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_stack,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # or it would draw from the one that dropout uses
        )

    def read(self, batches: Iterable[np.ndarray], pinned: bool = False) -> Iterator[Tensor]:
        """Pixels of each batch of what `RowReader` takes, in turn, read ahead; perhaps in memory that CUDA copies from.

        Raises:
            InputError: for the first image that cannot be read, or if a worker was killed.
        """
        self.order.batches, self.loader.pin_memory = batches, pinned
        try:
            for images in self.loader:
                if isinstance(images, str):
                    raise InputError(f"data set: {images}: remove or repair it")
                yield images
        except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
            raise InputError(
                f"a process that reads images ended ({first_line(error)}): if memory is short, use fewer --workers"
            ) from None


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of bytes (N, H, W, C), as fractions, to five places."""
    total = torch.zeros(pixels.shape[-1], dtype=torch.float64)
    squares = total.clone()
    for chunk in pixels.split(1024):
        values = chunk.reshape(-1, pixels.shape[-1]).float()
        total += values.sum(0).double()
        squares += values.square().sum(0).double()
    count = pixels[..., 0].numel()
    mean = total / count / 255
    std = (squares / count / 255**2 - mean**2).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(round(float(v), 5) for v in mean), tuple(round(float(v), 5) for v in std)


def cached_pixels(reader: RowReader, workers: int) -> tuple[Tensor, dict[str, Any]]:
    """All images decoded, from the cache beside the data sets' own if they are there.

    A cache file is named by the files that its images come from, so that it never serves others.

    Returns:
        bytes (N, H, W, C), and a dictionary of their `mean`, `std` and `sha256`.
    """
    count = len(reader)
    side = reader.side or reader.size
    shape = (count, side, side, reader.in_chans)
    cut = [reader.size, reader.short] if reader.short else []
    path = reader.cache_file("pixels", ".safetensors", shape, reader.scales, *cut)
    key = path.stem if path else ""
    if path is not None and path.exists():
        try:
            with safe_open(str(path), "pt") as file:
                pixels, (check, text) = file.get_tensor("pixels"), json.loads(file.metadata()["checked"])
            if pixels.shape != shape or check != _check(pixels, key, text):
                raise ValueError("it holds something else")
            return pixels, json.loads(text)
        except Exception as error:  # there is no end to what damage makes the readers raise
            _log.warning("ignoring the damaged cache file %s: %s", path, first_line(error))

    pixels = torch.empty(shape, dtype=torch.uint8)
    chunks = np.array_split(np.arange(count), -(-count // _CHUNK))
    done = 0
    for chunk in RowLoader(reader, workers if len(chunks) > 1 else 0).read(chunks):
        pixels[done : done + len(chunk)] = chunk
        done += len(chunk)
    mean, std = channel_statistics(pixels)
    statistics = {"mean": mean, "std": std, "sha256": hashlib.sha256(pixels.numpy().data).hexdigest()}
    if path is not None:
        partial, text = path.with_suffix(f".{os.getpid()}"), json.dumps(statistics)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"pixels": pixels}, partial, {"checked": json.dumps([_check(pixels, key, text), text])})
            os.replace(partial, path)
        except Exception as error:  # a full disk, whatever names it
            _log.warning("cannot cache the decoded images in %s: %s", path.parent, first_line(error))
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return pixels, statistics


def _check(pixels: Tensor, key: str, statistics: str) -> str:
    """A fast hash of what a cache file holds."""
    return Hasher.hash_bytes([f"{key}{statistics}".encode(), pixels.numpy().data])
