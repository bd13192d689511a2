"""Images of any kind as bytes of one size: decoding, the one rule that they follow, and the cache."""

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, first_line

_log = logging.getLogger(__name__)
_CHUNK = 500  # images that a worker decodes at a time


def to_pixels(image: Image.Image, size: int, in_chans: int) -> np.ndarray:
    """One image of any kind as a (size, size, in_chans) array of bytes.

    The rule: turned upright as its EXIF data says; transparency laid on white; 16-bit gray scaled down to 8; made
    RGB or gray; the shorter side resized to `size` (bicubic), then the middle square cut out.
    """
    image.load()  # EXIF data may come last
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scaled = values / (257 if image.mode.startswith("I;16") or values.max() > 255 else 1)
        image = Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "RGB" if in_chans == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (size, size):
        image = _cut_square(image, size)
    return np.asarray(image).reshape(size, size, in_chans)


def _cut_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side and cut out the middle, to the pixel as timm's transform for evaluation does."""
    short = min(image.size)
    if max(image.size) > 16 * short:  # what the cut would throw away need not be resized first
        image = ImageOps.crop(image, tuple((side - min(side, 16 * short)) // 2 for side in image.size))
    width, height = (size * side // short for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


# whatever Pillow's decoders raise for a damaged file
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


def open_image(value: dict[str, Any] | None, likely: str | None = None) -> Image.Image:
    """An image as a data set stores it undecoded: bytes, or a path; `likely` is a format to try before all others."""
    if value is None or not (value["bytes"] or value["path"]):
        raise ValueError("there is none")
    file = io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]
    if likely in ("JPEG", "PNG", "WEBP"):  # told from all others by their first bytes
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(file, formats=[likely])
    return Image.open(file)


class RowReader(Dataset):
    """Rows of a Hugging Face data set as pixels; an unreadable image comes back as the text of its error."""

    def __init__(self, source: datasets.Dataset, column: str, size: int, in_chans: int) -> None:
        self.source = source.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.size, self.in_chans = column, size, in_chans
        self.likely: str | None = None  # the format of the last image

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, rows: Sequence[int]) -> list[np.ndarray | str]:
        values = self.source[[int(row) for row in rows]][self.column]
        return [self._read(row, value) for row, value in zip(rows, values, strict=True)]

    def _read(self, row: int, value: dict[str, Any] | None) -> np.ndarray | str:
        try:
            with open_image(value, self.likely) as image:
                self.likely = image.format
                return to_pixels(image, self.size, self.in_chans)
        except IMAGE_ERRORS as error:
            return f"the image in row {row} cannot be read: {first_line(error)}"


def _stack(rows: list[np.ndarray | str]) -> Tensor | str:
    bad = [row for row in rows if isinstance(row, str)]
    return bad[0] if bad else torch.from_numpy(np.stack(cast(list[np.ndarray], rows)))


def read_rows(reader: RowReader, batches: Sequence[np.ndarray], workers: int) -> Iterator[Tensor]:
    """Decode batches of rows in worker processes.

    Raises:
        InputError: for the first image that cannot be read.
    """
    loader = DataLoader(reader, batch_sampler=batches, num_workers=workers, collate_fn=_stack)  # type: ignore[arg-type]
    for images in loader:
        if isinstance(images, str):
            raise InputError(f"data set: {images}: remove or repair it")
        yield images


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


def cached_pixels(source: datasets.Dataset, reader: RowReader, workers: int) -> tuple[Tensor, dict[str, Any]]:
    """All images decoded, from the cache beside the data sets' own if they are there.

    Returns:
        bytes (N, H, W, C), and a dictionary of their `mean`, `std` and `sha256`.
    """
    key = json.dumps([2, source._fingerprint, reader.column, reader.size, reader.in_chans])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "bmsn_zoo_pixels"
    path = folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".safetensors")
    if path.exists():
        try:
            with safe_open(str(path), "pt") as file:
                return file.get_tensor("pixels"), json.loads(file.metadata()["statistics"])
        except (SafetensorError, KeyError, OSError) as error:
            _log.warning("ignoring the damaged cache file %s: %s", path, error)

    count = len(reader)
    pixels = torch.empty(count, reader.size, reader.size, reader.in_chans, dtype=torch.uint8)
    chunks = np.array_split(np.arange(count), -(-count // _CHUNK))
    done = 0
    for chunk in read_rows(reader, chunks, workers if len(chunks) > 1 else 0):
        pixels[done : done + len(chunk)] = chunk
        done += len(chunk)
    mean, std = channel_statistics(pixels)
    meta = {"mean": mean, "std": std, "sha256": hashlib.sha256(pixels.numpy().data).hexdigest()}
    if source.cache_files:  # a data set made in memory has no cache
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file({"pixels": pixels}, partial, metadata={"statistics": json.dumps(meta)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            _log.warning("cannot cache the decoded images in %s: %s", folder, error)
    return pixels, meta
