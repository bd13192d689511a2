"""What metrics.jsonl tells of every epoch of a run, for pictures and pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from .config import MAX_LAYOUTS
from .errors import InputError
from .files import read_text
from .results import fault

Number = Annotated[float, Field(ge=-1e30, le=1e30)]  # what a picture can show


class Epoch(BaseModel):
    """What pictures need of a line of metrics.jsonl."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    epoch: Annotated[int, Field(ge=1, le=10**9)]
    loss: Number


class SearchEpoch(Epoch):
    """That of a search."""

    drawn_accuracy: Number = Field(validation_alias=AliasChoices("score_accuracy", "train_accuracy"))
    draws: Annotated[list[Annotated[int, Field(ge=0, le=10**12)]], Field(min_length=1, max_length=1024)]
    assigned: Annotated[list[Annotated[int, Field(ge=0, lt=1024)]], Field(max_length=MAX_LAYOUTS)] = []


class TrainEpoch(Epoch):
    """That of a training."""

    train_accuracy: Number
    holdout_accuracy: Number | None


EpochT = TypeVar("EpochT", bound=Epoch)
Charts: TypeAlias = dict[str, Mapping[str, Sequence[float]]]  # title, name of a line, its value at every epoch


def _read(path: Path, kind: type[EpochT]) -> list[EpochT]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            rows.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise InputError(f"{path}, line {number}, is not of this run: {fault(error)}") from None
    if not rows:
        raise InputError(f"{path} is empty: it should hold a line for every epoch")
    return rows


def read_search_epochs(folder: Path) -> list[SearchEpoch]:
    """All epochs of the search in a folder.

    Raises:
        InputError: if there are none, or one is malformed or of other supernets than the rest.
    """
    rows = _read(path := folder / "metrics.jsonl", SearchEpoch)
    if len({len(row.draws) for row in rows}) > 1:
        raise InputError(f"{path} counts the steps of other supernets in some lines")
    return rows


def read_train_epochs(folder: Path) -> list[TrainEpoch]:
    """All epochs of the training in a folder.

    Raises:
        InputError: if there are none, or one is malformed.
    """
    return _read(folder / "metrics.jsonl", TrainEpoch)


def search_curves(rows: Sequence[SearchEpoch]) -> Charts:
    """The charts of a search: the steps of each supernet only of several."""
    charts: Charts = {
        "training loss": {"loss": [row.loss for row in rows]},
        "accuracy when drawn, %": {"drawn layouts": [100 * row.drawn_accuracy for row in rows]},
    }
    steps = {f"supernet {m}": counts for m, counts in enumerate(zip(*(row.draws for row in rows), strict=True))}
    if len(steps) > 1:
        charts["steps of each supernet"] = steps
    return charts


def train_curves(rows: Sequence[TrainEpoch]) -> Charts:
    """The charts of a training: accuracy on held-out images only if every epoch has it."""
    accuracy = {"augmented training images": [100 * row.train_accuracy for row in rows]}
    held = [100 * row.holdout_accuracy for row in rows if row.holdout_accuracy is not None]
    if len(held) == len(rows):
        accuracy["held-out training images"] = held
    return {"training loss": {"loss": [row.loss for row in rows]}, "accuracy, %": accuracy}
