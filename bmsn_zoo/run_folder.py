"""The run folder: settings, metrics, checkpoints and results of one run, each written whole or not at all."""

import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from . import progress
from .command import follow, followed
from .config import ConfigT, DataConfig, SearchConfig, TrainConfig, build_config, changed_settings
from .errors import InputError, first_line
from .files import one_line, read_json, read_yaml, sha256, write_bytes, write_json, write_text
from .launch import rank, several_hosts
from .results import Record, Segment, Settings
from .trackers import Curves

_log = logging.getLogger(__name__)
RUNS = Path("runs")
_COPY = "copy the first host's {} there, or use a shared disk"
_KEPT = 2  # whole checkpoints: the newer one may turn out to be damaged


class RunState(Record):
    """State of a run.

    Attributes:
        settings: what the run computes, to tell whether config.yaml was edited since.
        identity: what tells the run's data from others.
        finished: whether all that the run makes is there; written last.
    """

    kind: Literal["search", "train"]
    settings: Settings
    identity: dict[str, Any]
    segments: Annotated[list[Segment], Field(min_length=1)]
    finished: bool = False


def resolve_config(config_class: type[ConfigT], given: dict[str, Any], output: Path | None, resume: bool) -> ConfigT:
    """The config of a new run, or of one to resume: its own, which the settings given must not contradict.

    Raises:
        InputError: if `output` holds a run already, or holds none to resume, or has other settings.
    """
    if not resume:
        if output is not None:
            _check_free(output)
        return build_config(config_class, given)
    if output is None:
        raise InputError("resume needs the folder of the run to continue: give --output")
    kind = _kind(config_class)
    if not output.is_dir() and not several_hosts():
        raise InputError(f"output {output} is no folder, so there is nothing to resume: see python -m bmsn_zoo.runs")
    try:
        state = RunState.read(output / "run.json", "its run.json")
        saved = read_yaml(output / "config.yaml", "its config.yaml")
        if state.kind != kind or not isinstance(saved, dict) or set(saved) != set(config_class.model_fields):
            raise InputError("its config.yaml is of another kind or version")
        config = build_config(config_class, saved)
    except InputError as error:
        hint = f": {_COPY.format(output)}" if rank() and several_hosts() else ""
        raise InputError(f"output {output} holds no {kind} to resume: {error}{hint}") from None
    if edited := changed_settings(state.settings, config.settings()):
        raise InputError(f"output {output}: config.yaml was edited since the run began, {edited}: put that back")
    asked = build_config(config_class, {**saved, **given})
    if changed := changed_settings(config.settings(), asked.settings()):
        raise InputError(f"output {output} was run with {changed}: resume it with the same settings")
    return asked


def _kind(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config").lower()


def _check_free(output: Path) -> None:
    try:
        names = {file.name for file in output.iterdir()} if os.path.exists(output) else set()
    except OSError:  # a file, or what cannot be opened, which _take says better
        names = {""} if os.path.isfile(output) else set()
    names = {name for name in names if not (name.startswith(".") and name.endswith(".partial"))}
    # what a run leaves that was killed as it began
    if names and not {".lock"} <= names <= {".lock", "config.yaml"}:
        raise InputError(f"output {output} already holds files: choose another folder, or --resume its run")


def last_precision(output: Path) -> str | None:
    """Precision of the last segment of a run to resume, as `mixed_precision` calls it."""
    precision = RunState.read(output / "run.json").segments[-1].precision
    return "no" if precision == "fp32" else precision


def run_name(config: SearchConfig | TrainConfig) -> str:
    """What a run is, as the name of its folder, such as "search-photos-m4-s0" or "train-photos-4-3-3-s0"."""
    data = re.sub(r"[^\w.-]+", "-", Path(config.dataset_id or config.dataset).expanduser().resolve().name)[:40]
    if isinstance(config, TrainConfig):
        what = config.layout or "default"
    elif config.strategy != "balanced":
        what = config.strategy
    else:  # of those that fit the number of images, nobody knows it yet
        what = f"m{config.mixture_size}" if "mixture_size" in config.model_fields_set else ""
    return "-".join(filter(None, (_kind(type(config)), data.strip("-.") or "data", what, f"s{config.seed}")))


@contextmanager
def open_run(kind: str, output: Path | None, resume: bool, name: str = "run") -> "Iterator[RunFolder]":
    """The folder of a run, which is taken for it until the block ends: nobody else writes there.

    It is made at once, so that a place where nothing can be written is noticed before anything is computed, and
    removed again if the run has not begun when the block ends. To be entered by every process.

    Args:
        kind: "search" or "train".
        output: the folder; a new one under runs/ if None.
        resume: whether it holds a run to continue.
        name: of a new one; a number is appended if it is taken.

    Raises:
        InputError: if it cannot be written, is in use, holds files already, or holds nothing to resume.
    """
    outer = followed()
    with ExitStack() as stack:
        folder, error = None, None
        if PartialState().is_main_process:
            try:
                folder = stack.enter_context(_take(kind, output, resume, name))
            except InputError as mistake:
                error = mistake
        told = [(folder and (folder.path, folder.epoch, folder.marks()), error is not None)]
        known, refused = broadcast_object_list(told)[0]
        if error is not None:
            raise error
        if refused:
            raise InputError("the first process was refused: it says why")
        path, epoch, (lock, checkpoint) = known
        if folder is None:
            folder = RunFolder(path, main=False)
            folder.epoch = epoch
        stack.callback(folder.end)
        if outer is None:
            stack.callback(progress.end)
        own_lock, own_checkpoint = folder.marks()
        seen = gather_object([(own_lock == lock, own_checkpoint == checkpoint)])
        folder.shared = all(same for same, _ in seen)
        if not all(same for _, same in seen):
            raise InputError(
                f"not every host has the checkpoint-{epoch} that the first resumes from: {_COPY.format(path)}"
            )
        yield folder
        follow(outer)  # not after an error, which says how to go on


@contextmanager
def _take(kind: str, output: Path | None, resume: bool, name: str) -> "Iterator[RunFolder]":
    choices = [output] if output else [RUNS / name, *(RUNS / f"{name}-{number}" for number in range(2, 10_000))]
    made: list[Path] = []
    lock = None
    try:
        try:
            for path in choices:
                made = [part for part in (path, *path.parents) if not part.exists()]
                try:
                    path.mkdir(parents=True, exist_ok=output is not None)
                    break
                except FileExistsError:
                    if output is not None:
                        raise
            if not resume:
                _check_free(path)
            file, new = path / ".lock", not (path / ".lock").exists()
            file.touch()
            lock = FileLock(file, mode=stat.S_IMODE(file.stat().st_mode))
            lock.acquire(timeout=0)
        except Timeout:
            lock, made = None, []
            raise InputError(f"output {path} is in use by another run: end that, or choose another folder") from None
        except NotImplementedError:
            _log.warning("output %s: its disk knows no locks, so nothing keeps another run from writing there", path)
        except OSError as error:
            raise InputError(f"output {str(path)[:200]} cannot be used: {error.strerror}: choose another") from None
        if not resume:
            _check_free(path)  # again: another run may have come and gone
        folder = RunFolder(path)
        if resume:
            folder.find_checkpoint(kind)
        yield folder
    finally:
        if lock is not None:
            lock.release()
            if new and not (path / "run.json").exists():
                file.unlink(missing_ok=True)
        for part in made:  # if it is empty
            with suppress(OSError):
                part.rmdir()


class RunFolder:
    """Files of one run.

    Args:
        path: the folder.
        main: whether this process writes; others write nothing but checkpoints.
        dry: whether nobody does, because the run will only be tried.

    Attributes:
        state: what the folder says of its run; None if it has not begun.
        epoch: epochs that the checkpoint to continue from has seen; 0 if there is none.
        shared: whether every process sees what the first one writes.
    """

    def __init__(self, path: Path, main: bool = True, dry: bool = False) -> None:
        self.path, self.main, self.dry, self.epoch, self.shared = path, main, dry, 0, True
        self._curves: Curves | None = None
        record = path / "run.json"
        self.state = RunState.read(record) if not dry and record.exists() else None

    def marks(self) -> tuple[tuple[int, ...], bytes]:
        """What tells this folder from one on another disk, and the checkpoint to continue from from another."""
        lock, record = self.path / ".lock", self.checkpoint(self.epoch) / "complete.json"
        seen: tuple[int, ...] = ()
        with suppress(OSError), lock.open() as file:  # opened, network disks look again
            seen = (status := os.fstat(file.fileno())).st_ino, status.st_mtime_ns
        return seen, record.read_bytes() if self.epoch and record.exists() else b""

    def find_checkpoint(self, kind: str) -> None:
        """Set `epoch` to that of the last checkpoint whose files are what they were when it was written.

        Raises:
            InputError: if the run is of another kind, has finished, or all of its checkpoints are damaged.
        """
        if self.state is None or self.state.kind != kind:
            raise InputError(f"output {self.path} holds no {kind} to resume")
        if self.state.finished:
            self.drop_checkpoints()
            raise InputError(f"output {self.path} holds a finished run: nothing is left to resume")
        whole = self.checkpoints()
        for folder in reversed(whole):
            try:
                if read_json(folder / "complete.json") == _checksums(folder):
                    self.epoch = int(folder.name[11:])
                    return
                _log.warning("%s is damaged: it is not used", folder)
            except (InputError, OSError) as error:
                _log.warning("%s is damaged: it is not used: %s", folder, first_line(error))
        if whole:
            raise InputError(f"output {self.path} has no checkpoint that is not damaged: start in another folder")

    def begin(
        self,
        config: DataConfig,
        segment: dict[str, Any],
        identity: dict[str, Any],
        accelerator: Accelerator | None = None,
    ) -> None:
        """Write the config and the record of a new segment of the run, and drop what it will compute again.

        To be called by every process, when nothing else can be refused.

        Args:
            config: of the run.
            segment: what it computes on, see `Segment`.
            identity: what tells its data from others; JSON.
            accelerator: whose tracker shows the run's curves.

        Raises:
            InputError: if the run began with other settings or other data, or its tracker does not start.
        """
        identity, segments = json.loads(json.dumps(identity)), self.segments
        told = gather_object([identity])
        for number, other in enumerate(told):
            if changed := changed_settings(told[0], other, "there"):
                raise InputError(f"process {number} has other images, {changed}: give all hosts the same data set")
        if self.state:
            for before, now in ((self.state.settings, config.settings()), (self.state.identity, identity)):
                if changed := changed_settings(before, now):
                    raise InputError(
                        f"output {self.path} began with other settings or data, {changed}: start a new run"
                    )
        if not self.main or self.dry:
            return
        new = Segment(**segment, epoch=self.epoch, started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), seconds=0.0)
        for key in ("processes", "threads", "precision", "device", "hardware", "tf32", "compiled", "versions"):
            if segments and (now := getattr(new, key)) != (before := getattr(segments[-1], key)):
                note = "resumed with %s %s, before %s: the run continues, but not bit for bit"
                _log.warning(note, key, now, before)
        self._started = time.monotonic()
        write_text(self.path / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
        metrics = self.path / "metrics.jsonl"
        kept = (self.checkpoint(self.epoch) / metrics.name).read_bytes() if self.epoch else b""
        if kept and not (metrics.exists() and metrics.read_bytes().startswith(kept)):
            _log.warning("%s was changed since epoch %d: it is put back as it was", metrics, self.epoch)
        write_bytes(metrics, kept)
        kind: Any = _kind(type(config))
        self._update(RunState(kind=kind, settings=config.settings(), identity=identity, segments=[*segments, new]))
        if accelerator and accelerator.log_with:
            rows = [json.loads(row) for row in kept.splitlines()]
            self._curves = Curves(accelerator, self.path, config.as_dict(), rows)
        if followed() is None:  # else it is a part of that run, with which it is resumed
            follow(self)

    def _update(self, state: RunState, sync: bool = True) -> None:
        self.state = state
        write_json(self.path / "run.json", state.model_dump(), sync)

    @property
    def segments(self) -> list[Segment]:
        """All segments of the run."""
        return self.state.segments if self.state else []

    def touch(self) -> None:
        """Bring the present segment's duration up to date."""
        assert self.state
        seconds = round(time.monotonic() - self._started, 1)
        *before, last = self.segments
        segments = [*before, last.model_copy(update={"seconds": seconds})]
        self._update(self.state.model_copy(update={"segments": segments}), sync=False)

    def finish(self) -> None:
        """Mark the run as finished, when all that it makes is there, and remove its checkpoints."""
        assert self.state
        self._update(self.state.model_copy(update={"finished": True}))
        self.drop_checkpoints()

    def summary(self) -> dict[str, Any]:
        """What every result file says of its run: duration, hardware, versions, and all segments."""
        last = {key: getattr(self.segments[-1], key) for key in ("versions", "commit", "precision", "hardware")}
        seconds = round(sum(segment.seconds for segment in self.segments), 1)
        return {"duration_seconds": seconds, **last, "segments": self.segments}

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and show it in the tracker."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._curves:
            self._curves.log(row)

    def end(self) -> None:
        """Close what shows the run's curves."""
        if self._curves:
            self._curves.end()

    def checkpoints(self) -> list[Path]:
        """Checkpoints that were whole when they were written, oldest first."""
        found = [file.parent for file in self.path.glob("checkpoint-*/complete.json")]
        return sorted((f for f in found if f.name[11:].isdecimal()), key=lambda folder: int(folder.name[11:]))

    def checkpoint(self, epoch: int) -> Path:
        """Folder of the checkpoint after some epochs."""
        return self.path / f"checkpoint-{epoch}"

    def new_checkpoint(self, epoch: int) -> Path:
        """An empty folder for the checkpoint after some epochs; `complete_checkpoint` makes it count."""
        folder = self.checkpoint(epoch)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def complete_checkpoint(self, epoch: int, accelerator: Accelerator) -> None:
        """Mark a checkpoint whole, with the gradient scaler's state; drop those that two newer ones follow."""
        folder = self.checkpoint(epoch)
        if accelerator.scaler is not None:
            write_json(folder / "scaler.json", accelerator.scaler.state_dict())
        write_bytes(folder / "metrics.jsonl", (self.path / "metrics.jsonl").read_bytes())
        write_json(folder / "complete.json", _checksums(folder))
        if os.name == "posix":  # the names too, before any older one goes
            for home in (folder, self.path):
                handle = os.open(home, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        for older in self.checkpoints()[:-_KEPT]:
            shutil.rmtree(older)

    def restore_scaler(self, accelerator: Accelerator) -> None:
        """Give the gradient scaler its state in the checkpoint to continue from."""
        file = self.checkpoint(self.epoch) / "scaler.json"
        if file.exists() and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(read_json(file))

    def drop_checkpoints(self) -> None:
        """Remove all checkpoints."""
        for folder in self.path.glob("checkpoint-*"):
            shutil.rmtree(folder)


def _checksums(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != "complete.json"}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors whole, as safetensors."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata))


def load_tensors(path: Path, shown: str = "") -> dict[str, Tensor]:
    """Read a safetensors file, which messages call `shown` or by its path.

    Raises:
        InputError: if it is none, or a number in it is not finite.
    """
    with one_line(shown or path, "is damaged"):
        tensors = load_file(path)
        check_weights(tensors, {}, shown or str(path))
        return tensors


def check_weights(weights: dict[str, Tensor], own: dict[str, Tensor], name: str) -> None:
    """Refuse weights that no run of ours saves.

    Raises:
        InputError: if a tensor is of another type than the network's `own`, or holds a number that is not finite.
    """
    for key, tensor in weights.items():
        if key in own and tensor.dtype != own[key].dtype and not key.endswith("layout_units"):
            raise InputError(f"{name}: {key} is {tensor.dtype}, not {own[key].dtype}: save it as it was trained")
        if not tensor.isfinite().all():
            raise InputError(f"{name}: {key} holds numbers that are not finite: train it again")


def save_training_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Weights and optimizer state as one safetensors file.

    accelerate's own checkpoints hold what the main process owns, as pickles; ours are one file for each network,
    written by the process that owns it, and read by however many processes there are.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    content = optimizer.state_dict() if optimizer is not None else {"state": {}, "param_groups": []}
    parts = {f"state.{index}": values for index, values in content["state"].items()}
    parts |= {f"group.{index}": values for index, values in enumerate(content["param_groups"])}
    for part, values in parts.items():
        tensors |= {f"{part}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        plain = {name: v for name, v in values.items() if name != "params" and not isinstance(v, Tensor)}
        numbers[part] = plain  # some of timm's optimizers count their steps in the groups, others in tensors
    save_tensors(path, tensors, {"optimizer": json.dumps(numbers)})


def load_training_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read what `save_training_state` wrote, keeping every tensor's memory format.

    Raises:
        InputError: if the file is damaged, or the state is another network's, of another type, or not finite.
    """
    weights: dict[str, Tensor] = {}
    with one_line(path, "is damaged"):
        with safe_open(str(path), "pt") as file:
            parts: dict[str, dict[str, Any]] = json.loads(file.metadata()["optimizer"])
            for key in file.keys():
                part, _, name = key.rpartition(".")
                if key.startswith("model."):
                    weights[key[6:]] = file.get_tensor(key)
                else:
                    parts[part][name] = file.get_tensor(key)
        check_weights(weights, model.state_dict(), str(path))
        model.load_state_dict(weights)
        if optimizer is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {int(part[6:]): values for part, values in parts.items() if part.startswith("state.")}
        for index, values in state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                    values[name] = torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
        own = optimizer.state_dict()["param_groups"]
        groups = [{**parts[f"group.{index}"], "params": group["params"]} for index, group in enumerate(own)]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def find_latest_search() -> Path:
    """The newest finished search under runs/.

    Raises:
        InputError: if there is none.
    """
    found = sorted(RUNS.glob("*/search.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("no finished search under runs/: run search.py first, or give --from-search or --layout")
    return found[-1].parent
