"""Any Hugging Face image data set, by its columns and splits."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from PIL import Image

from ..config import DataConfig
from ..errors import InputError, first_line
from .batches import SPLIT, ImageSet, random_stream, stratified_split
from .pixels import IMAGE_ERRORS, RowReader, cached_pixels, channel_statistics, open_image, read_rows

_STATISTICS_SAMPLE = 4096  # images from which the mean and deviation of a streamed set are measured


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
        here = config.dataset == "digits" or Path(config.dataset).expanduser().exists()
        self.on_hub = config.dataset_id is not None or not here
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
            "on_hub": self.on_hub,
            "revision": self.config.dataset_revision,
            "fingerprint": data.fingerprint,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "image_size": self.image_size,
            "in_chans": self.config.in_chans,
            "label_names": data.label_names,
            "mean": list(data.mean),
            "std": list(data.std),
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
        value = RowReader(self.train_source, self.image_column, 1, 3).source[0][self.image_column]
        try:
            with open_image(value) as image:
                return min(*image.size, 224)
        except IMAGE_ERRORS as error:
            raise InputError(f"data set: the image in row 0 cannot be read: {first_line(error)}") from None

    def _load(self, source: datasets.Dataset) -> ImageData:
        size, in_chans = self.image_size, self.config.in_chans
        reader = RowReader(source, self.image_column, size, in_chans)
        labels = torch.from_numpy(self._labels(source))
        rows = np.arange(len(labels))
        if len(rows) * size * size * in_chans > self.config.memory_limit * 2**30:
            sample = random_stream(0, SPLIT).permutation(rows)[:_STATISTICS_SAMPLE]
            pixels = torch.cat(list(read_rows(reader, np.array_split(sample, -(-len(sample) // 64)), self.workers)))
            mean, std = channel_statistics(pixels)
            fingerprint = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
            images = ImageSet(labels, rows, None, reader, self.workers)
        else:
            pixels, meta = cached_pixels(source, reader, self.workers)
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
