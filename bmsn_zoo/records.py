"""The run folder: resolved settings, metrics, checkpoints and results, each written whole or not at all."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .command import follow
from .config import ConfigT, build_config
from .errors import InputError
from .files import read_json, write_json, write_text

_log = logging.getLogger(__name__)
RUNS = Path("runs")


def open_run(kind: str, output: Path | None) -> "RunFolder":
    """The folder of a run, a new one under runs/ if None; the same on every process."""
    stamp = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    new = RUNS / (stamp if not (RUNS / stamp).exists() else f"{stamp}-{os.getpid()}")
    return RunFolder(Path(broadcast_object_list([str(output or new)])[0]))


def resolve_config(config_class: type[ConfigT], given: dict[str, Any], output: Path | None, resume: bool) -> ConfigT:
    """The config of a new run, or of one to resume: its own, which the settings given must not contradict.

    Raises:
        InputError: if `output` holds a run already, or holds none to resume, or has other settings.
    """
    if not resume:
        if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(f"output {output} already holds files: choose another folder, or --resume its run")
        return build_config(config_class, given)
    if output is None:
        raise InputError("resume needs the folder of the run to continue: give --output")
    try:
        saved = yaml.safe_load((output / "config.yaml").read_text())
        if set(saved) != set(config_class.model_fields):
            raise TypeError("its config.yaml is of another kind or version")
        config = build_config(config_class, saved)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"output {output} holds no {_kind(config_class)} to resume: {reason}") from None
    asked = build_config(config_class, {**saved, **given})
    before, now = config.settings(), asked.settings()
    changed = [f"{name} {before[name]} (now {now[name]})" for name in before if before[name] != now[name]]
    if changed:
        raise InputError(f"output {output} was run with {', '.join(changed)}: resume it with the same settings")
    return asked


def _kind(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config").lower()


class RunFolder:
    """Files of one run. Only the main process writes, apart from checkpoints.

    Args:
        path: the folder; made by `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        record = path / "segments.json"
        self.segments: list[dict[str, Any]] = read_json(record) if record.exists() else []

    @property
    def last_precision(self) -> str | None:
        """Precision of the segment before this one, as `mixed_precision` calls it; None for a new run."""
        if not self.segments:
            return None
        return "no" if self.segments[-1]["precision"] == "fp32" else self.segments[-1]["precision"]

    def begin(self, config: Any, segment: dict[str, Any]) -> list[str]:
        """Write the config and the record of a new segment of the run, and drop what it will compute again.

        Returns:
            what differs from the segment before, one sentence each.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        notes = []
        if self.segments:
            keys = ("processes", "threads", "precision", "device", "hardware", "tf32", "compiled", "versions")
            notes = [
                f"resumed with {key} {segment.get(key)}, before {self.segments[-1].get(key)}: "
                "the run continues, but not bit for bit"
                for key in keys
                if segment.get(key) != self.segments[-1].get(key)
            ]
        write_text(self.path / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
        self.segments.append({**segment, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": 0.0})
        self._started = time.monotonic()
        write_json(self.path / "segments.json", self.segments)
        self.keep_epochs(segment["epoch"])
        follow(self)
        for note in notes:
            _log.warning(note)
        return notes

    def touch(self) -> None:
        """Bring the present segment's duration up to date."""
        self.segments[-1]["seconds"] = round(time.monotonic() - self._started, 1)
        write_json(self.path / "segments.json", self.segments)

    @property
    def seconds(self) -> float:
        """Duration of all segments, as far as they were recorded."""
        return round(sum(segment["seconds"] for segment in self.segments), 1)

    def summary(self) -> dict[str, Any]:
        """What every result file says of its run: duration, hardware, versions, and all segments."""
        last = {key: self.segments[-1][key] for key in ("versions", "commit", "precision", "hardware")}
        return {"duration_seconds": self.seconds, **last, "segments": self.segments}

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def keep_epochs(self, count: int) -> None:
        """Drop the metrics of epochs that will run again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            write_text(path, "".join(line for line in whole if json.loads(line)["epoch"] <= count))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = self.path.glob("checkpoint-*/complete.json")
        return sorted((file.parent for file in found), key=lambda folder: int(folder.name.split("-")[1]))

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
        """Mark a checkpoint whole, with the gradient scaler's state, and drop the older ones."""
        older = [other for other in self.checkpoints() if other != self.checkpoint(epoch)]
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        write_json(self.checkpoint(epoch) / "complete.json", {"epoch": epoch, "scaler": scaler})
        for other in older:
            shutil.rmtree(other)

    def resume_epoch(self, result: str, accelerator: Accelerator) -> int:
        """Epochs that the last whole checkpoint has seen, 0 if there is none; restores the gradient scaler.

        Raises:
            InputError: if the run has its result already.
        """
        if (self.path / result).exists():
            raise InputError(f"output {self.path} holds a finished run: nothing is left to resume")
        checkpoints = self.checkpoints()
        if not checkpoints:
            return 0
        state = read_json(checkpoints[-1] / "complete.json")
        if state["scaler"] is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        return state["epoch"]

    def drop_checkpoints(self) -> None:
        """Remove all checkpoints, when the run is done."""
        for folder in self.path.glob("checkpoint-*"):
            shutil.rmtree(folder)


def save_training_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Weights and optimizer state as one safetensors file.

    accelerate's own checkpoints hold what the main process owns, as pickles; ours are one file for each network,
    written by the process that owns it, and read by however many processes there are.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    numbers: dict[str, Any] = {"state": {}, "groups": []}
    if optimizer is not None:
        content = optimizer.state_dict()
        for index, values in content["state"].items():
            tensors.update({f"optimizer.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)})
            numbers["state"][index] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        # some of timm's optimizers count their steps in the groups
        for index, group in enumerate(content["param_groups"]):
            tensors.update({f"group.{index}.{k}": v for k, v in group.items() if isinstance(v, Tensor)})
            plain = {k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)}
            numbers["groups"].append(plain)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"optimizer": json.dumps(numbers)})


def load_training_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read what `save_training_state` wrote, keeping every tensor's memory format."""
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Any]] = {}
    with safe_open(str(path), "pt") as file:
        numbers = json.loads(file.metadata()["optimizer"])
        for key in file.keys():
            part, _, name = key.partition(".")
            if part == "model":
                weights[name] = file.get_tensor(key)
                continue
            index, _, name = name.partition(".")
            home = numbers["groups"][int(index)] if part == "group" else state.setdefault(int(index), {})
            home[name] = file.get_tensor(key)
    model.load_state_dict(weights)
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, values in numbers["state"].items():
            state.setdefault(int(index), {}).update(values)
        for index, values in state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                    values[name] = torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
        groups = [
            {**saved, "params": group["params"]}
            for saved, group in zip(numbers["groups"], optimizer.state_dict()["param_groups"], strict=True)
        ]
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
