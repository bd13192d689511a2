"""From a name to the splits of a data set: a Hub id, a folder in any format that `datasets` reads, or of images."""

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.utils import logging as hub_logging
from PIL import Image

from ..config import DataConfig
from ..errors import InputError

_log = logging.getLogger(__name__)
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_METADATA = {
    ".csv": pd.read_csv,
    ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}


_VALIDATION = ("validation", "valid", "val")
_UNREADABLE = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw")  # photos of phones and cameras


def default_test_split(splits: Any) -> str | None:
    """Which of some splits holds the test images, if none was named."""
    return next((name for name in ("test", *_VALIDATION) if name in splits), None)


def default_validation_split(splits: Any, used: Collection[str]) -> str | None:
    """Which of some splits, beside those that are used otherwise, is for validation."""
    return next((name for name in _VALIDATION if name in splits and name not in used), None)


def load_splits(config: DataConfig) -> tuple[datasets.DatasetDict, bool]:
    """All splits of a data set, and whether it is one of the Hub.

    Raises:
        InputError: if it cannot be loaded.
    """
    name, path = config.dataset, Path(config.dataset).expanduser()
    if name == "digits":
        if path.is_dir():
            _log.warning("dataset digits is the built-in one: for the folder of that name, say ./digits")
        return _digits(), False
    if not name.strip():
        raise InputError("dataset is empty: give a folder or a Hub id such as uoft-cs/cifar10")
    if path.is_file():
        raise InputError(f"dataset {name!r} is a file: give the folder that it lies in")
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise InputError(f"dataset {name!r} is not a folder: give a folder or a Hub id such as uoft-cs/cifar10")
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"dataset {name!r} is an empty folder: put images or parquet files there")
    try:
        with quietly():
            loaded = {split: _plain(table) for split, table in _load(path, config).items()}
        return datasets.DatasetDict(loaded), config.dataset_id is not None or not path.is_dir()
    except InputError:
        raise
    except Exception as error:  # whatever a loader of any format raises is about the user's data set
        where = "" if path.is_dir() else "there is no such folder here, and from the Hub: "
        raise InputError(f"dataset {name!r} cannot be loaded: {where}{_reason(error)}") from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars of `datasets`; and an error that follows says all that the Hub's retries would."""
    progress, verbosity = datasets.is_progress_bar_enabled(), hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if progress:
            datasets.enable_progress_bars()


def _load(path: Path, config: DataConfig) -> datasets.DatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = datasets.load_from_disk(str(path))
        return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded)
    listed = (path / "README.md").is_file() and "data_files:" in (path / "README.md").read_text("utf-8", "replace")
    if path.is_dir() and not listed and not config.dataset_config and (made := _image_folders(path)) is not None:
        return made
    if path.is_dir() and has_magic(str(path)):
        raise InputError(f"dataset {config.dataset!r}: rename the folder, brackets in its name are taken for a pattern")
    name = str(path) if path.is_dir() else config.dataset
    builder = datasets.load_dataset_builder(name, name=config.dataset_config, revision=config.dataset_revision)
    files = builder.config.data_files or {}
    train, test = config.train_split, config.test_split or default_test_split(files)
    both = {*files.get(train, ())} & {*files.get(test, ())}
    if both and test != train:
        raise InputError(f"{min(both)} is in two splits, {train} and {test}: rename files or folders")
    builder.download_and_prepare()
    loaded = builder.as_dataset()
    return datasets.DatasetDict({split: _with_own_classes(table, files.get(split)) for split, table in loaded.items()})


def _with_own_classes(table: datasets.Dataset, files: list[str] | None) -> datasets.Dataset:
    """A split with the class names of its own parquet files; `datasets` gives it those of the first split."""
    local = [file for file in files or () if file.endswith(".parquet") and os.path.exists(file)]
    schemas = [datasets.Features.from_arrow_schema(pq.read_schema(file)) for file in local]
    for column in [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]:
        own = [feature.names for schema in schemas if isinstance(feature := schema.get(column), datasets.ClassLabel)]
        if any(names != own[0] for names in own):
            raise InputError(f"the files of one split have different classes in column {column!r}: write them anew")
        if own and own[0] != table.features[column].names:
            table = table.cast_column(column, datasets.ClassLabel(names=own[0]))
    return table


def _plain(table: datasets.Dataset) -> datasets.Dataset:
    """A split with all columns in plain format; columns that hold images as others write them become images."""
    for name, feature in table.features.items():
        if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
            table = table.cast_column(name, datasets.Image())
    return table.with_format(None)


def _reason(error: BaseException) -> str:
    """What a loader has to say in one line, with our flags' names."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, IndexError) or "corresponds to no data" in reason:
        return "it is empty"
    if "Config name is missing" in reason or reason.startswith("BuilderConfig"):
        return f"{reason}: choose one with --dataset-config"
    return reason


def _digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits (8x8, 16 grays), enlarged to 32x32; they come with the package."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)]))
    enlarged = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in scaled]
    table = datasets.Dataset.from_dict({"image": enlarged, "label": labels.tolist()}, features=features)
    return datasets.DatasetDict({"train": table})


def _image_folders(path: Path) -> datasets.DatasetDict | None:
    """A folder of image files as splits, or None if other files hold its images.

    The folder that a file lies in is its class. A folder above that one may name its split, in any case and among
    other words; where none does, the names of all files may, or else all are training images. Metadata files beside
    them (metadata.csv, .jsonl or .parquet, with a column file_name) add columns, and choose the images.
    """
    files, metadata = _walk(path)
    if not files:
        return None
    rows = pd.DataFrame(index=range(len(files)))
    if metadata:
        frames = [(file.parent, _METADATA[file.suffix.lower()](file)) for file in metadata]
        if any("file_name" not in frame for _, frame in frames):
            return None  # several images in a row, or their names elsewhere
        files = [home / name for home, frame in frames for name in frame.pop("file_name")]
        rows = pd.concat([frame for _, frame in frames], ignore_index=True)
    folders = [file.relative_to(path).parts[:-1] for file in files]
    labels = [parts[-1] if parts and not (metadata and _splits_in(parts[-1])) else "" for parts in folders]
    splits = [_splits_in(*(parts if metadata else parts[:-1])) for parts in folders]
    if not any(splits):
        if not metadata and any(labels) and all(map(_splits_in, labels)):
            raise InputError(f"the images in {path / labels[0]} lie in no class folder: make one for each class there")
        splits = [_splits_in(file.stem) for file in files]
        if {"train"} not in splits or any(len(named) != 1 for named in splits):
            splits = [{"train"}] * len(files)
    by_folder = len({*labels} - {""}) > 1 and "label" not in rows
    chosen: dict[str, list[int]] = {}
    seen: dict[Any, str] = {}
    for row, (file, named) in enumerate(zip(files, splits, strict=True)):
        if named and (labels[row] or not by_folder):
            with contextlib.suppress(OSError):  # whatever name it goes by
                named = {*named, seen.setdefault((os.stat(file).st_dev, os.stat(file).st_ino), min(named))}
            if len(named) > 1:
                raise InputError(f"{file} is in two splits, {' and '.join(sorted(named))}: rename or remove it")
            chosen.setdefault(min(named), []).append(row)
    kept = sum(map(len, chosen.values()))
    if kept < len(files):
        _log.warning("%d images of %s lie in no folder of a split and a class: left out", len(files) - kept, path)
    made = datasets.DatasetDict()
    for split, members in chosen.items():
        frame = rows.iloc[members].assign(image=[str(files[row]) for row in members])
        if by_folder:
            names, frame["label"] = np.unique([labels[row] for row in members], return_inverse=True)
        table = datasets.Dataset.from_pandas(frame, preserve_index=False).cast_column("image", datasets.Image())
        made[split] = table.cast_column("label", datasets.ClassLabel(names=names.tolist())) if by_folder else table
    return made


def _splits_in(*names: str) -> set[str]:
    """The splits that some names of folders or files speak of."""
    words = [word for name in names for word in re.split("[^a-z]+", name.lower())]
    return {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}


def _walk(path: Path) -> tuple[list[Path], list[Path]]:
    """All image files below a folder, through links too, and all metadata files; none if archives hold the images."""
    images, metadata, others, known = [], [], list[str](), frozenset(ImageFolder.EXTENSIONS)
    for base, folders, names in os.walk(path, followlinks=True):
        home = Path(base)
        above = {folder.resolve() for folder in (home, *home.parents)}  # links back up would never end
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")) and (home / f).resolve() not in above)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name.lower())
            if stem == "metadata" and suffix in _METADATA:
                metadata.append(home / name)
            elif suffix in (".parquet", ".arrow", ".tar"):
                return [], []
            elif suffix in known and not name.startswith("."):
                images.append(home / name)
            else:
                others.append(str(home / name))
    tell_unreadable(others)
    return images, metadata


def tell_unreadable(files: Sequence[str]) -> None:
    """Warn of photos among files that are not taken for images, since nothing here reads their format."""
    photos = [file for file in files if file.lower().endswith(_UNREADABLE)]
    if photos:
        others = f" and {len(photos) - 1} other photos" if len(photos) > 1 else ""
        _log.warning("%s%s are of a format that cannot be read: left out; convert to JPEG", photos[0], others)
