"""Searches and trainings from Python: what they found as tables and pictures. Light: what computes is imported late."""

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import results
from .config import SearchConfig, TrainConfig, build_config
from .errors import InputError, brief
from .layout import Layout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]
_NO_SETTINGS = ("dataset", "output", "resume", "push_to_hub", "private", "revision", "create_pr")


def search(dataset: Any = None, output: StrPath | None = None, resume: bool = False, **flags: Any) -> "SearchResult":
    """Search where a network should downsample on your images.

    Args:
        dataset: a Hub id, a folder, or a `datasets.Dataset` or `DatasetDict`, of which a copy is saved in the cache of
            `datasets`; handwritten digits if None.
        output: folder of the run; a new one under runs/ if None.
        resume: continue the run in `output` after its last whole epoch.
        flags: any of `bmsn-search --help-all` by its name, such as `epochs=100` or `max_macs="default"`.

    Raises:
        InputError: for a flag that is unknown or cannot be used (nothing is written then), or if the loss diverges.
    """
    given = _checked(SearchConfig, {"dataset": dataset, "output": output, "resume": resume, **flags})
    from . import searching

    with _told():
        return SearchResult.load(searching.start(given))


def train(dataset: Any = None, output: StrPath | None = None, resume: bool = False, **flags: Any) -> "TrainResult":
    """Train one layout, as `search` searches: of the latest search, of `from_search=result`, or `layout="5-3-2"`.

    Args:
        dataset: as in `search`; that of the search if None.
        output: folder of the run; a new one under runs/ if None.
        resume: continue the run in `output` after its last whole epoch.
        flags: any of `bmsn-train --help-all` by its name.

    Raises:
        InputError: see `search`.
    """
    given = _checked(TrainConfig, {"dataset": dataset, "output": output, "resume": resume, **flags})
    from . import training

    with _told():
        return TrainResult.load(training.start(given))


@contextmanager
def _told() -> Iterator[None]:
    """Say on the way what a command says, where a person types, in a notebook or at Python's prompt, and did not set up
    logging otherwise."""
    log, root, handler = logging.getLogger("bmsn_zoo"), logging.getLogger(), logging.StreamHandler()
    before, silent = log.level, hasattr(sys, "ps1") and not log.isEnabledFor(logging.INFO)
    if silent:
        log.setLevel(logging.INFO)
    if silent and not root.handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(before)
        root.removeHandler(handler)


def _checked(kind: type[SearchConfig] | type[TrainConfig], given: dict[str, Any]) -> dict[str, Any]:
    """What was given, as flags would give it; unknown or wrong settings are refused first."""
    for name, value in given.items():
        if isinstance(value, os.PathLike):
            given[name] = os.fspath(value)
        elif isinstance(value, Layout) or (name == "layout" and isinstance(value, list | tuple)):
            given[name] = str(Layout.parse(value))
    build_config(kind, {name: value for name, value in given.items() if name not in _NO_SETTINGS})
    given = {name: value for name, value in given.items() if value is not None or name not in _NO_SETTINGS}
    if not isinstance(given.get("dataset", ""), str):
        given["dataset"] = _saved(given["dataset"])
    return given


def _saved(data: Any) -> str:
    """Folder of a data set object's copy, which is made once for each content."""
    import datasets

    if not isinstance(data, datasets.Dataset | datasets.DatasetDict):
        wanted = "give a Hub id, a folder, or a datasets.Dataset or DatasetDict"
        raise InputError(f"dataset {brief(data)} is of the type {type(data).__name__}: {wanted}")
    splits = data if isinstance(data, datasets.DatasetDict) else datasets.DatasetDict(train=data)
    content = repr([(name, table._fingerprint) for name, table in splits.items()])
    named = next((table.info.dataset_name for table in splits.values()), None) or "dataset"
    home = Path(datasets.config.HF_DATASETS_CACHE) / "bmsn_zoo_objects"
    path = home / f"{named}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        splits.save_to_disk(partial)
        try:
            partial.rename(path)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return str(path)


class SearchResult:
    """What a search found.

    Attributes:
        source: its folder, or USER/REPO@commit on the Hub. The result serves as a path, too: `Path(result)`.
        record: all of its search.json, see `results.SearchResult`.
    """

    def __init__(self, source: str, record: results.SearchResult) -> None:
        self.source, self.record = source, record

    @classmethod
    def load(cls, source: StrPath) -> "SearchResult":
        """Read a finished search: its run folder, a model that it found (of the zoo, or its folder), or USER/REPO.

        Raises:
            InputError: if there is none, or it is malformed.
        """
        from . import hub

        pinned = hub.pin(os.fspath(source))
        return cls(pinned, hub.load_search(pinned))

    def __fspath__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"<SearchResult {self.source}: {len(self.record.layouts)} layouts, best {self.best.layout}>"

    @property
    def ranking(self) -> "pd.DataFrame":
        """All layouts, best first: accuracies on the score split as fractions, multiply-accumulates for an image, and,
        where they were measured, its milliseconds."""
        import pandas as pd

        record = self.record
        frame = pd.DataFrame([dict(entry) for entry in record.ranking], index=range(1, len(record.ranking) + 1))
        if record.probability is not None:
            frame["probability"] = frame["layout"].map(record.values)
        if record.latency:
            frame["milliseconds"] = frame["layout"].map(record.latency.single.of)
        frame["pareto_front"] = frame["layout"].isin([entry.layout for entry in record.pareto_front])
        return frame.rename_axis("rank")

    @property
    def best(self) -> results.Entry:
        """The layout to train: the confirmed one; the default if no other can be told from it."""
        return self.record.to_train("best")

    @property
    def confirmed(self) -> results.Confirmation | None:
        """What its choices showed when they were trained alone; None if they were not."""
        return self.record.confirmed

    def plot_accuracy_macs(self) -> "Figure":
        """All layouts by cost and accuracy, with the Pareto front and the default."""
        from .report import draw_accuracy_macs

        return draw_accuracy_macs(self.record)

    def plot_assignment(self) -> "Figure":
        """Which supernet each layout is assigned to.

        Raises:
            InputError: if the search assigned none, as one of one supernet.
        """
        from .report import draw_assignment

        return draw_assignment(self.record)

    def plot_curves(self) -> "Figure":
        """Loss and accuracy over the epochs, and how many steps each of several supernets took.

        Raises:
            InputError: if this was read from a model that it found, whose curves are those of its training.
        """
        from .hub import fetch
        from .report import draw_search_curves

        folder = fetch(self.source, "metrics.jsonl")[0].parent
        if (folder / "config.json").is_file():
            raise InputError(f"{self.source} is a model, without its search's curves: load the search's own folder")
        return draw_search_curves(self.record, folder)


class TrainResult:
    """What a training reached.

    Attributes:
        source: its folder. The result serves as a path, too: `Path(result)`.
        record: all of its metrics.json, or trial.json if it was measured on held-out images; see `results`.
    """

    def __init__(self, source: str, record: results.TrainResult | results.TrialResult) -> None:
        self.source, self.record = source, record

    @classmethod
    def load(cls, source: StrPath) -> "TrainResult":
        """Read a finished training: its run folder, or a model of the zoo by its name or folder.

        Raises:
            InputError: if there is none, or it is malformed.
        """
        from .model_folder import model_folder, what_is_wrong

        folder = Path(source) if Path(source).is_dir() else model_folder(os.fspath(source))
        trial = (folder / "trial.json").is_file()
        kind, name = (results.TrialResult, "trial.json") if trial else (results.TrainResult, "metrics.json")
        if not (folder / name).is_file():
            raise InputError(what_is_wrong(os.fspath(source), folder, "trained model", name))
        return cls(str(folder), kind.read(folder / name))

    def __fspath__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"<TrainResult {self.source}: {self.record.layout}, accuracy {100 * self.accuracy:.2f} %>"

    @property
    def accuracy(self) -> float:
        """On the test images, or on the held-out training images if it was measured there; a fraction."""
        record = self.record
        return record.test_accuracy if isinstance(record, results.TrainResult) else record.holdout_accuracy

    def predict(self, *images: StrPath, top: int = 5) -> dict[Path, list[tuple[str, float]]]:
        """The most probable labels of image files, or of all images in folders, with their probabilities.

        Args:
            images: one path or more.
            top: labels for each.

        Raises:
            InputError: if there are no such images, or one cannot be read.
        """
        from .predict import find_images, load_any, predict

        for image in images or (None,):
            if not isinstance(image, str | os.PathLike):
                raise InputError(f"image {brief(image)} is not the path of a file or folder: give one path or more")
        return dict(predict(load_any(self.source), find_images([Path(image) for image in images]), top))

    def plot_curves(self) -> "Figure":
        """Loss and accuracies over the epochs."""
        from .report import draw_training_curves

        return draw_training_curves(Path(self.source))
