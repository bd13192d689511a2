"""Curves of a run in a tracker, through accelerate: a view of metrics.jsonl, which stays the record."""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .errors import InputError, first_line

_PROJECT = "bmsn_zoo"
_BY_COST = ("loss", "score_accuracy", "train_accuracy")


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed, or a trackio that would send what it is told to another machine."""
    if name and importlib.util.find_spec(name) is None:
        what = "wandb" if name == "wandb" else '"bmsn_zoo[trackers]"'
        raise InputError(f"report-to {name}: it is not installed: pip install {what}")
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        if name == "trackio" and os.environ.get(variable):
            raise InputError(f"report-to trackio: curves stay on this machine, and {variable} is set: unset it")


class Curves:
    """What the tracker that an accelerator was made with shows of a run; to be used by the main process alone.

    A run that continues is told anew, so that no point is doubled or missing, whenever it was interrupted; wandb, which
    keeps what it was told, hears what is new. tensorboard lies in the run's folder, trackio's tables beside it.

    Args:
        accelerator: with a tracker in `log_with`.
        folder: of the run, which names it.
        config: all settings.
        rows: of metrics.jsonl, from before this segment.

    Raises:
        InputError: if the tracker does not start.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, config: dict[str, Any], rows: Sequence[dict[str, Any]]):
        self._accelerator, self._told, self._first = accelerator, 0, 0
        kind = str(accelerator.log_with[0])
        start: dict[str, Any] = {}
        if kind == "tensorboard":
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            start = {"purge_step": 1}  # one that is being looked at forgets, too
            accelerator.project_configuration.logging_dir = str(folder)
        elif kind == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(folder.absolute().parent / "trackio"))  # read as it is imported
            import trackio

            with contextlib.suppress(ValueError):  # no such project yet
                for run in trackio.Api().runs(_PROJECT):
                    if run.name == folder.name:
                        run.delete()
            start = {"name": folder.name, "embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        elif kind == "wandb":
            start = {"name": folder.name, "id": folder.name[-64:], "resume": "allow", "dir": str(folder)}
        project = "tensorboard" if kind == "tensorboard" else _PROJECT
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # of trackio, what the user did not ask for
                accelerator.init_trackers(project, config, {kind: start})
        except Exception as error:
            raise InputError(f"report-to {kind}: it does not start: {first_line(error)}") from error
        if kind == "wandb":
            self._first = accelerator.trackers[0].tracker.step
        for row in rows:
            self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl, over its number; a search's loss and accuracy in tensorboard over its cost, too,
        which others draw over any number."""
        self._told += 1
        if self._told < self._first:
            return
        values = _numbers(row)
        self._accelerator.log(values, step=self._told)
        if "spent_macs" in row:
            by_cost = {f"by_spent_gmacs/{key}": values[key] for key in _BY_COST if key in values}
            for tracker in self._accelerator.trackers:
                if tracker.name == "tensorboard" and by_cost:
                    tracker.log(by_cost, step=row["spent_macs"] // 10**9)

    def end(self) -> None:
        """Close the tracker; not by `end_training`, which would part the processes, too."""
        with contextlib.redirect_stdout(io.StringIO()):
            for tracker in self._accelerator.trackers:
                # trackio's own would be called again at exit
                (sys.modules["trackio"] if tracker.name == "trackio" else tracker).finish()
        self._accelerator.trackers.clear()


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by their names, those in lists and mappings included."""
    found = {}
    for name, value in row.items():
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, number in (*((f"{name}/{part}", number) for part, number in parts), (name, value)):
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[key] = number
    return found
