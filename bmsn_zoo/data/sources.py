"""The splits of any Hugging Face image data set: their columns, classes and images."""

import hashlib
import logging
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from timm.data import DEFAULT_CROP_PCT

from ..config import DataConfig
from ..errors import InputError, brief, first_line
from .batches import SPLIT, Augmentation, ImageSet, random_stream, stratified_split
from .loading import default_test_split, default_validation_split, load_splits, quietly
from .pixels import RowLoader, RowReader, cached_pixels, channel_statistics, deep_mode, find_scale, open_image, shrink

_log = logging.getLogger(__name__)
_STATISTICS_SAMPLE = 4096  # images from which the mean and deviation of a streamed set are measured
_SAMPLE = 128  # images from which the size of all is found, and the range of values of more than 8 bits
_LARGE = 128  # pixels of a network's input from which on training images are random resized crops
_LARGEST = 224  # pixels of a network's input, unless it is asked for more


@dataclass(frozen=True)
class ImageData:
    """A data set, ready to use.

    Attributes:
        images: the split that was asked for.
        label_names: one for every class.
        mean, std: of every channel of the training images, fractions of full brightness.
        fingerprint: hash of labels and pixels (of labels alone where images are streamed).
        image_size, crop_pct: of the network's input, as timm says it.
    """

    images: ImageSet
    label_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    image_size: int
    crop_pct: float = 1.0


class Part(NamedTuple):
    """Rows of a split of the user's set."""

    table: datasets.Dataset
    split: str
    rows: np.ndarray


class DataSource:
    """The splits of a data set and its columns; images are read only when a split is asked for.

    Args:
        config: what to load, see `DataConfig`.
        threads: processes that read images, unless the config says otherwise.

    Attributes:
        training, held_out: where the training and the test images are.
        image_size, size_origin: side of the network's input in pixels, and where that is from, for people.
        resized: whether training images are random resized crops.
        crop_pct: side of what evaluation sees of an image, as a part of its shorter side.

    Raises:
        InputError: if there is no such data set, split or column, or the labels cannot be learned.
    """

    def __init__(self, config: DataConfig, threads: int) -> None:
        self.config = config
        self.workers = min(threads, 8) if config.workers is None else config.workers
        self._splits, self.on_hub = load_splits(config)
        train, name = self._take_split(config.train_split), repr(config.dataset)
        self.image_column = _find_column(train.features, config.image_column, "image", name)
        self.label_column = _find_column(train.features, config.label_column, "label", name)
        if len(train) == 0:
            raise InputError(f"dataset {name} is empty: split {config.train_split!r} has no images")
        self.label_names = _label_names(train, self.label_column)
        rows = np.arange(len(train))
        labels = self._labels(Part(train, config.train_split, rows))

        test_name = config.test_split or default_test_split(self._splits)
        self.test_split = test_name or "a fixed fifth of the training images"
        if test_name is None:
            rows, fifth = stratified_split(labels, 0.2, 0, "a test fifth and the training images", self.label_names)
            self.held_out = Part(train, config.train_split, fifth)
        elif test_name == config.train_split:
            raise InputError(f"test-split {test_name!r} is the training split too: the test must be held out")
        else:
            test = self._take_split(test_name)
            self.held_out = Part(test, test_name, np.arange(len(test)))
        if config.limit is not None and config.limit < len(rows):
            rows = rows[_stratified_sample(labels[rows], config.limit)]
        self.training = Part(train, config.train_split, rows)
        present = np.unique(labels[rows])
        if len(present) < 2:
            raise InputError(f"dataset {name} has one class, {self.label_names[present[0]]!r}: two or more are needed")
        size, self.size_origin, self._scales = self._look()
        self.image_size = config.image_size or size
        crop = config.crop or ("random-resized" if self.image_size >= _LARGE else "pad")
        self.resized = crop == "random-resized"
        self.crop_pct = config.crop_pct or (DEFAULT_CROP_PCT if self.resized else 1.0)
        self._short = int(self.image_size / self.crop_pct)  # as timm rounds
        if config.store_size is not None and config.store_size < self._short:
            raise InputError(
                f"store-size {config.store_size} is less than the {self._short} pixels that shorter sides get: "
                "give more, or a smaller image-size"
            )
        if not self.resized and config.crop_padding >= self.image_size:
            raise InputError(
                f"crop-padding {config.crop_padding} would cut whole images of {self.image_size} pixels away: use less"
            )

    def train(self) -> ImageData:
        """All training images, with their statistics."""
        return self._load(self.training)

    def test(self, check: bool = False) -> ImageData:
        """The test images; search never calls this. `check` reads every one, even if they will be streamed."""
        data, count = self._load_other(self.held_out), len(self.held_out.rows)
        absent = sorted(set(range(len(self.label_names))) - set(data.images.labels.tolist()))
        if absent and check:
            names = ", ".join(self.label_names[index] for index in absent[:5]) + (", ..." if len(absent) > 5 else "")
            _log.warning("no test image of %d of %d classes: %s", len(absent), len(self.label_names), names)
        if check and data.images.pixels is None:
            for _ in data.images.batches(np.array_split(np.arange(count), -(-count // 64))):
                pass
        return data

    def _load_other(self, part: Part) -> ImageData:
        """Images of a split whose columns were not looked for yet."""
        for column, kind in ((self.image_column, "image"), (self.label_column, "label")):
            _find_column(part.table.features, column, kind, f"{self.config.dataset!r}, split {part.split!r},")
        return self._load(part)

    def validation(self, name: str | None) -> ImageData | None:
        """The images of a split that is neither for training nor for the test, to be watched.

        Args:
            name: of the split, or "none"; one for validation if None, where it has such a split with usable labels.
        """
        used = {self.training.split, self.held_out.split}
        if name in used:
            raise InputError(f"validation-split {name!r} is the training or the test split: use another, or none")
        found = default_validation_split(self._splits, used) if name is None else name
        if found in (None, "none"):
            return None
        try:
            table = self._take_split(str(found))
            images = self._load_other(Part(table, str(found), np.arange(len(table))))
            _log.info("%d images of split %r are watched", len(table), found)
            return images
        except InputError as error:
            if name is not None:
                raise
            _log.info("split %r is not watched: %s", found, error)
            return None

    def summary(self) -> str:
        """One line that says what is learned from what, and what is held out."""
        names = ", ".join(self.label_names[:10]) + (", ..." if len(self.label_names) > 10 else "")
        table, split, rows = self.training
        others = [n for n, feature in table.features.items() if n != self.label_column and _is_label(feature)]
        unused = f", not {' or '.join(map(repr, others))}" if others else ""
        held = f"split {self.test_split!r}" if self.held_out.split != split else self.test_split
        return (
            f"data set {self.config.dataset}: {len(self.label_names)} classes of column {self.label_column!r}{unused} "
            f"({names}); {len(rows)} training images of split {split!r}; {len(self.held_out.rows)} test images: {held}"
        )

    def identity(self, data: ImageData) -> dict[str, Any]:
        """What a run must find unchanged when it is resumed; the test images are no part of it."""
        return {
            "fingerprint": data.fingerprint,
            "label_names": data.label_names,
            "images": len(data.images),
            "image_size": self.image_size,
            "in_chans": self.config.in_chans,
        }

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
            "crop_pct": self.crop_pct,
            "store_size": self.config.store_size,
            "in_chans": self.config.in_chans,
            "label_names": data.label_names,
            "mean": list(data.mean),
            "std": list(data.std),
        }

    def _take_split(self, name: str) -> datasets.Dataset:
        if name not in self._splits:
            raise InputError(f"dataset {self.config.dataset!r} has no split {name!r}: it has {', '.join(self._splits)}")
        return self._splits[name]

    def _labels(self, part: Part) -> np.ndarray:
        """Class index of every row, int64; classes are matched by name, whatever their order in this split."""
        feature = part.table.features[self.label_column]
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        where = f"split {part.split!r} of dataset {self.config.dataset!r}"
        codes = part.table.data.column(self.label_column).combine_chunks().dictionary_encode()
        values = codes.dictionary.to_pylist()
        if codes.null_count or (names is not None and any(value < 0 for value in values)):
            raise InputError(f"{where} has unlabelled images: choose a split that has labels")
        if names is not None and max(values) >= len(names):
            raise InputError(f"{where} has the label {max(values)}, but {len(names)} classes, from 0 on: repair it")
        values = [str(value) if names is None else names[value] for value in values]
        index = {name: position for position, name in enumerate(self.label_names)}
        unknown = sorted(set(values) - set(index))
        if unknown:
            raise InputError(f"{where}: label {brief(unknown[0])} occurs in no training image: relabel or remove it")
        return np.array([index[value] for value in values])[codes.indices.to_numpy()[part.rows]]

    def _look(self) -> tuple[int, str, dict[str, tuple[float, float]]]:
        """Median shorter side of some training images, within reason; what it is; scales of more than 8 bits."""
        table, split, rows = self.training
        reader = RowReader(table, self.image_column, split, rows)
        sample = random_stream(0, SPLIT).permutation(len(rows))[:_SAMPLE]
        sides, found, fault = list[int](), dict[str, list[float]](), ""
        for position, value in zip(sample, reader.values(sample), strict=True):
            try:
                with open_image(value, reader.likely) as image:
                    reader.likely = image.format
                    if (mode := deep_mode(image)) is not None:
                        pixels = np.asarray(image, dtype=np.float64)
                        pixels = pixels[np.isfinite(pixels)]
                        found.setdefault(mode, [0.0]).extend((pixels.min(initial=0), pixels.max(initial=0)))
                    sides.append(min(image.size))
            except Exception as error:  # the others are named when all are read
                fault = fault or reader.fault(rows[position], value, error)
        if not sides:
            raise InputError(f"data set: {fault}")
        side, limit = statistics.median_low(sides), f", at most {_LARGEST}" if max(sides) > _LARGEST else ""
        origin = "given" if self.config.image_size else f"the median shorter side of {len(sides)} images{limit}"
        scales = {mode: find_scale(mode, min(values), max(values)) for mode, values in found.items()}
        return min(side, _LARGEST), origin, scales

    def _shrunk(self, part: Part, size: int) -> datasets.Dataset:
        """Its images, undecoded and shrunk; written once, beside the data sets' own cache."""
        reader = RowReader(part.table, self.image_column, part.split, part.rows)
        file, count = reader.cache_file("shrunk", ".arrow", size), len(part.rows)
        if file is None or not file.exists():
            _log.info("shrinking %d images of split %r to %d pixels, once", count, part.split, size)
        try:
            with quietly():
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                return reader.source.select(part.rows).map(
                    shrink,
                    fn_kwargs={"column": self.image_column, "size": size},
                    features=reader.source.features,
                    cache_file_name=file and str(file),
                    new_fingerprint=file and file.stem,
                    num_proc=self.workers if self.workers > 1 and count > 1000 else None,
                )
        except Exception as error:  # a full disk, whatever names it
            raise InputError(f"store-size {size}: the shrunk copy cannot be made: {first_line(error)}") from error

    def augmentation(self, flip: bool) -> Augmentation:
        """What is done to training images."""
        return Augmentation(self.config.crop_padding, flip, self.image_size if self.resized else None)

    def _load(self, part: Part) -> ImageData:
        size, in_chans, train = self.image_size, self.config.in_chans, part is self.training
        about: dict[str, Any] = dict(size=size, in_chans=in_chans, scales=self._scales)
        if self._short != size:
            about["short"] = self._short
        # training images in memory are kept so large that there is something to crop
        side = self._short if train and self.resized else size
        streamed = len(part.rows) * side * side * in_chans > self.config.memory_limit * 2**30
        if side != size and not streamed:
            about["side"] = side
        labels, places = torch.from_numpy(self._labels(part)), np.arange(len(part.rows))
        if train and self.config.store_size:
            table, rows, about["names"] = self._shrunk(part, self.config.store_size), places, part.rows
        else:
            table, rows = part.table, part.rows
        reader = RowReader(table, self.image_column, part.split, rows, **about)
        if streamed:
            pixels, sample = None, random_stream(0, SPLIT).permutation(places)[:_STATISTICS_SAMPLE]
            chunks = np.array_split(sample, -(-len(sample) // 64))
            mean, std = channel_statistics(torch.cat(list(RowLoader(reader, self.workers).read(chunks))))
            fingerprint = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
        else:
            pixels, meta = cached_pixels(reader, self.workers)
            mean, std = tuple(meta["mean"]), tuple(meta["std"])
            fingerprint = hashlib.sha256((meta["sha256"] + str(labels.tolist())).encode()).hexdigest()
        images = ImageSet(labels, places, pixels, reader, self.workers)
        return ImageData(images, self.label_names, mean, std, fingerprint[:16], size, self.crop_pct)


def _find_column(features: datasets.Features, given: str | None, kind: str, dataset: str) -> str:
    if given is not None:
        if given not in features:
            raise InputError(f"dataset {dataset} has no column {given!r}: it has {', '.join(features)}")
        found = [given]
    else:
        wanted = datasets.Image if kind == "image" else datasets.ClassLabel
        found = [name for name, feature in features.items() if isinstance(feature, wanted)]
        if not found and kind == "label":
            found = [name for name, feature in features.items() if _is_label(feature)]
    if not found:
        fix = ": one subfolder for each class makes one" if kind == "label" and list(features) == ["image"] else ""
        raise InputError(f"dataset {dataset} has no column of {kind}s, it has {', '.join(features)}{fix}")
    if len(found) > 1:
        raise InputError(f"dataset {dataset} has several {kind} columns: choose --{kind}-column {' or '.join(found)}")
    feature = features[found[0]]
    if kind == "image" and not isinstance(feature, datasets.Image):
        raise InputError(f"column {found[0]!r} of dataset {dataset} holds no images")
    if kind == "label" and not _is_label(feature):
        raise InputError(f"column {found[0]!r} of dataset {dataset} holds no class labels")
    return found[0]


def _is_label(feature: Any) -> bool:
    plain = ("int", "uint", "string", "large_string", "bool")
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.startswith(plain)
    )


def _label_names(table: datasets.Dataset, column: str) -> list[str]:
    if isinstance(table.features[column], datasets.ClassLabel):
        return list(table.features[column].names)
    return [str(value) for value in sorted(value for value in table.unique(column) if value is not None)]


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
