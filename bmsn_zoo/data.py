"""Any Hugging Face image data set to splits, and splits to augmented batches on the device."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import DataConfig
from .errors import InputError, first_line

_log = logging.getLogger(__name__)
_STATISTICS_SAMPLE = 4096  # images from which the mean and deviation of a streamed set are measured
_CHUNK = 500  # images that a worker decodes at a time

# purposes of random numbers, so that no two streams of one seed are alike
ORDER, AUGMENT, SCORE_ORDER, SPLIT, MIX = range(5)


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """Random numbers that depend on seed, purpose and position (such as epoch and step) alone."""
    return np.random.default_rng((seed, purpose, *position, 1))  # numpy would ignore a zero at the end


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
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, in_chans)


# whatever Pillow's decoders raise for a damaged file
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


def _open(value: dict[str, Any] | None, likely: str | None = None) -> Image.Image:
    """An image as a data set stores it undecoded: bytes, or a path; `likely` is a format to try before all others."""
    if value is None or not (value["bytes"] or value["path"]):
        raise ValueError("there is none")
    file = io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]
    if likely in ("JPEG", "PNG", "WEBP"):  # told from all others by their first bytes
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(file, formats=[likely])
    return Image.open(file)


class _RowReader(Dataset):
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
            with _open(value, self.likely) as image:
                self.likely = image.format
                return to_pixels(image, self.size, self.in_chans)
        except _IMAGE_ERRORS as error:
            return f"the image in row {row} cannot be read: {first_line(error)}"


def _stack(rows: list[np.ndarray | str]) -> Tensor | str:
    bad = [row for row in rows if isinstance(row, str)]
    return bad[0] if bad else torch.from_numpy(np.stack(cast(list[np.ndarray], rows)))


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
    reader: _RowReader
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
        source = (pixels[batch] for batch in rows) if pixels is not None else _read(self.reader, rows, self.workers)
        for positions, images in zip(order, source, strict=True):
            yield images, self.labels[positions]


def _read(reader: _RowReader, batches: Sequence[np.ndarray], workers: int) -> Iterator[Tensor]:
    """Decode batches of rows in worker processes.

    Raises:
        InputError: for the first image that cannot be read.
    """
    loader = DataLoader(reader, batch_sampler=batches, num_workers=workers, collate_fn=_stack)  # type: ignore[arg-type]
    for images in loader:
        if isinstance(images, str):
            raise InputError(f"data set: {images}: remove or repair it")
        yield images


@dataclass(frozen=True)
class ImageData:
    """A data set, ready to use.

    Attributes:
        images: the split that was asked for.
        label_names: one for every class.
        mean, std: of every channel of the training images, fractions of full brightness.
        fingerprint: hash of labels and pixels (of labels alone where images are streamed).
    """

    images: ImageSet
    label_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    image_size: int


class DataSource:
    """The splits of a data set and its columns; images are read only when a split is asked for.

    Args:
        config: what to load, see `DataConfig`.
        threads: processes that read images, unless the config says otherwise.

    Raises:
        InputError: if there is no such data set, split or column, or the labels cannot be learned.
    """

    def __init__(self, config: DataConfig, threads: int) -> None:
        self.config = config
        self.workers = threads if config.workers is None else config.workers
        splits = _load_splits(config)
        self.train_source = _take_split(splits, config.train_split, config)
        features = self.train_source.features
        self.image_column = _find_column(features, config.image_column, "image", config.dataset)
        self.label_column = _find_column(features, config.label_column, "label", config.dataset)
        if len(self.train_source) == 0:
            raise InputError(f"dataset {config.dataset!r} is empty: split {config.train_split!r} has no images")
        self.label_names = _label_names(self.train_source, self.label_column)

        test_name = config.test_split
        if test_name is None:
            test_name = next((n for n in ("test", "validation", "valid", "val") if n in splits), None)
        self.test_split = test_name or "a fixed fifth of the training images"
        if test_name is not None:
            self.test_source = _take_split(splits, test_name, config)
            if test_name == config.train_split:
                raise InputError(f"test-split {test_name!r} is the training split too: the test must be held out")
        else:
            labels = self._labels(self.train_source)
            rest, test = stratified_split(labels, 0.2, seed=0, what="a test fifth and the training images")
            self.test_source = self.train_source.select(test)
            self.train_source = self.train_source.select(rest)
        if config.limit is not None and config.limit < len(self.train_source):
            labels = self._labels(self.train_source)
            kept = _stratified_sample(labels, config.limit)
            self.train_source = self.train_source.select(kept)
        present = np.unique(self._labels(self.train_source))
        if len(present) < 2:
            raise InputError(
                f"dataset {config.dataset!r} has one class, {self.label_names[present[0]]!r}: two or more are needed"
            )
        self.image_size = config.image_size or self._first_size()

    def train(self) -> ImageData:
        """All training images, with their statistics."""
        return self._load(self.train_source)

    def test(self) -> ImageData:
        """The test images; search never calls this."""
        return self._load(self.test_source)

    def describe(self, data: ImageData) -> dict[str, Any]:
        """The data set as result files name it: id, fingerprint, columns, image format and statistics."""
        return {
            "id": self.config.dataset_id or self.config.dataset,
            "revision": self.config.dataset_revision,
            "fingerprint": data.fingerprint,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "image_size": self.image_size,
            "in_chans": self.config.in_chans,
            "label_names": data.label_names,
            "mean": data.mean,
            "std": data.std,
        }

    def _labels(self, source: datasets.Dataset) -> np.ndarray:
        """Class index of every row, int64."""
        column = source.select_columns([self.label_column])
        if len(source) and column.with_format("arrow")[:].column(0).null_count:
            raise InputError(f"dataset {self.config.dataset!r} has unlabelled images: choose a split that has labels")
        values = column.with_format("numpy")[:][self.label_column]
        if isinstance(source.features[self.label_column], datasets.ClassLabel):
            labels = np.asarray(values, dtype=np.int64)
        else:
            index = {name: position for position, name in enumerate(self.label_names)}
            unknown = sorted({str(value) for value in values} - set(index))
            if unknown:
                raise InputError(f"label {unknown[0]!r} occurs in no training image of {self.config.dataset!r}")
            labels = np.array([index[str(value)] for value in values], dtype=np.int64)
        if len(labels) and labels.min() < 0:
            raise InputError(f"dataset {self.config.dataset!r} has unlabelled images: choose a split that has labels")
        return labels

    def _first_size(self) -> int:
        value = _RowReader(self.train_source, self.image_column, 1, 3).source[0][self.image_column]
        try:
            with _open(value) as image:
                return min(*image.size, 224)
        except _IMAGE_ERRORS as error:
            raise InputError(f"data set: the image in row 0 cannot be read: {first_line(error)}") from None

    def _load(self, source: datasets.Dataset) -> ImageData:
        size, in_chans = self.image_size, self.config.in_chans
        reader = _RowReader(source, self.image_column, size, in_chans)
        labels = torch.from_numpy(self._labels(source))
        rows = np.arange(len(labels))
        if len(rows) * size * size * in_chans > self.config.memory_limit * 2**30:
            sample = random_stream(0, SPLIT).permutation(rows)[:_STATISTICS_SAMPLE]
            pixels = torch.cat(list(_read(reader, np.array_split(sample, -(-len(sample) // 64)), self.workers)))
            mean, std = channel_statistics(pixels)
            fingerprint = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
            images = ImageSet(labels, rows, None, reader, self.workers)
        else:
            pixels, meta = _cached_pixels(source, reader, self.workers)
            mean, std = tuple(meta["mean"]), tuple(meta["std"])
            fingerprint = hashlib.sha256((meta["sha256"] + str(labels.tolist())).encode()).hexdigest()
            images = ImageSet(labels, rows, pixels, reader, self.workers)
        return ImageData(images, self.label_names, mean, std, fingerprint[:16], size)


def _load_splits(config: DataConfig) -> datasets.DatasetDict:
    name, path = config.dataset, Path(config.dataset).expanduser()
    if name == "digits" and not path.exists():
        return _digits()
    if not name.strip():
        raise InputError("dataset is empty: give a folder or a Hub id such as uoft-cs/cifar10")
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise InputError(f"dataset {name!r} is not a folder: give a folder or a Hub id such as uoft-cs/cifar10")
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"dataset {name!r} is an empty folder: put images or parquet files there")
    progress, verbosity = datasets.is_progress_bar_enabled(), hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()  # the error that follows says all that its retries would
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(
                str(path) if path.is_dir() else name, name=config.dataset_config, revision=config.dataset_revision
            )
    except Exception as error:  # whatever a loader of any format raises is about the user's data set
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, IndexError) or "corresponds to no data" in reason:
            reason = "it is empty"
        raise InputError(f"dataset {name!r} cannot be loaded: {reason}") from None
    finally:
        hub_logging.set_verbosity(verbosity)
        if progress:
            datasets.enable_progress_bars()
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({"train": loaded})


def _digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits (8x8, 16 grays), enlarged to 32x32; they come with the package."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)]))
    enlarged = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in scaled]
    table = datasets.Dataset.from_dict({"image": enlarged, "label": labels.tolist()}, features=features)
    return datasets.DatasetDict({"train": table})


def _take_split(splits: datasets.DatasetDict, name: str, config: DataConfig) -> datasets.Dataset:
    if name not in splits:
        raise InputError(f"dataset {config.dataset!r} has no split {name!r}: it has {', '.join(splits)}")
    return splits[name]


def _find_column(features: datasets.Features, given: str | None, kind: str, dataset: str) -> str:
    if given is not None:
        if given not in features:
            raise InputError(f"dataset {dataset!r} has no column {given!r}: it has {', '.join(features)}")
        found = [given]
    else:
        wanted = datasets.Image if kind == "image" else datasets.ClassLabel
        found = [name for name, feature in features.items() if isinstance(feature, wanted)]
        if not found and kind == "label":
            found = [n for n, feature in features.items() if _is_plain_label(feature)]
    if not found:
        raise InputError(f"dataset {dataset!r} has no column of {kind}s: it has {', '.join(features)}")
    if len(found) > 1:
        raise InputError(f"dataset {dataset!r} has several {kind} columns: choose --{kind}-column {' or '.join(found)}")
    feature = features[found[0]]
    if kind == "image" and not isinstance(feature, datasets.Image):
        raise InputError(f"column {found[0]!r} of dataset {dataset!r} holds no images")
    if kind == "label" and not (isinstance(feature, datasets.ClassLabel) or _is_plain_label(feature)):
        raise InputError(f"column {found[0]!r} of dataset {dataset!r} holds no class labels")
    return found[0]


def _is_plain_label(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "string", "bool"))


def _label_names(source: datasets.Dataset, column: str) -> list[str]:
    feature = source.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = [value for value in source.unique(column) if value is not None]
    return [str(value) for value in sorted(values)]


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


def _stratified_sample(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` images with every class's share of them, the same whenever asked; at least one of each."""
    order = random_stream(0, SPLIT).permutation(len(labels))
    classes, sizes = np.unique(labels, return_counts=True)
    if count < len(classes):
        raise InputError(f"limit {count} is less than the {len(classes)} classes: raise it")
    quota = np.maximum(1, sizes * count // len(labels))
    # what rounding left over goes to the classes that are furthest below their share
    for _ in range(count - int(quota.sum())):
        quota[np.argmax(sizes * count / len(labels) - quota)] += 1
    for _ in range(int(quota.sum()) - count):
        quota[np.argmax(quota)] -= 1
    kept = [order[labels[order] == name][:number] for name, number in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate(kept))


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


def _cached_pixels(source: datasets.Dataset, reader: _RowReader, workers: int) -> tuple[Tensor, dict[str, Any]]:
    """All images decoded, from the cache beside the data sets' own if they are there.

    Returns:
        bytes (N, H, W, C), and a dictionary of their `mean`, `std` and `sha256`.
    """
    key = json.dumps([1, source._fingerprint, reader.column, reader.size, reader.in_chans])
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
    for chunk in _read(reader, chunks, workers if len(chunks) > 1 else 0):
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
