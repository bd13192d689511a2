"""Model folders, each of them a Hub repository as it stands, and the zoo, which is a folder of them."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from .card import PICTURE, portable, write_card
from .config import TrainConfig, shipped_folder
from .errors import InputError, first_line
from .export import export_onnx, preparation, require_onnx
from .files import read_bytes, read_json, sha256, write_json
from .models import PoolingResNet, RelaidResNet
from .models.found import HUB_ORG
from .report import draw_model
from .results import Repeat, SearchResult, TrainResult
from .run_folder import check_weights

# all that a model folder may hold: no pickle is among it
_RECORDS = ("config.json", "metrics.json", "metrics.jsonl", "search.json")
MODEL_FILES = ("README.md", *_RECORDS, PICTURE, "model.onnx", "model.safetensors")
_ARGUMENTS = ("model", "layout", "stem")  # of a model, beside what config.json says elsewhere
# what may differ between models that are compared: what is compared, and where the data lay, whose fingerprints count
_DATA = {"fingerprint", "test_fingerprint", "image_size"}
_FREE = {"layout", "seed", "from_search", "pick", "dataset", "dataset_id", "dataset_config", "dataset_revision"}
_FREE |= {"image_column", "label_column", "train_split", "test_split"}


def save_model(
    folder: Path,
    model: PoolingResNet | RelaidResNet,
    label_names: list[str],
    metrics: TrainResult,
    search: SearchResult | None = None,
    onnx: bool = False,
) -> None:
    """Write everything that a Hub repository of one trained network holds.

    Args:
        folder: where to; made if needed.
        model: trained, with a fixed layout.
        label_names: one for every class.
        metrics: result of the training.
        search: result of the search that found the layout.
        onnx: write model.onnx too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = metrics.dataset
    model = model.to(memory_format=torch.contiguous_format)  # safetensors asks for it
    args = getattr(model, "_model_args", {}) | {"layout": model.layout}  # older timm does not keep them
    save_for_hf(
        model,
        str(folder),
        model_config={
            "label_names": label_names,
            "preprocessing": preparation(data.in_chans, data.image_size, data.crop_pct),
        },
        model_args={key: args[key] for key in _ARGUMENTS if key in args},
        safe_serialization=True,
    )
    write_json(folder / "config.json", _for_every_client(read_json(folder / "config.json")))
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors hides what it writes
    checksum = {"weights_sha256": sha256(folder / "model.safetensors")}
    portable(metrics).model_copy(update=checksum).write(folder / "metrics.json")
    if search is not None:
        portable(search).write(folder / "search.json")
    draw_model(folder)
    write_card(folder)
    if onnx:
        export_onnx(model, folder / "model.onnx", label_names)
        write_card(folder)  # tells of it


def _for_every_client(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with no argument that it says elsewhere: transformers passes `model_args` on beside the classes."""
    chans = config["pretrained_cfg"]["input_size"][0]
    args = config["model_args"]
    own = {key: args[key] for key in _ARGUMENTS if key in args}
    config["model_args"] = own | ({"in_chans": chans} if chans != 3 else {})
    return config


def model_folder(name: str) -> Path:
    """Folder of a model of the zoo, by its name, or of the model that a run folder holds; else the name as a path."""
    zoo, folder = shipped_folder("hub_configs") / name, Path(name)
    if timm.is_model(name) and zoo.is_dir():
        return zoo
    return folder / "model" if (folder / "model").is_dir() else folder


def what_is_wrong(name: str, folder: Path, what: str, file: str) -> str:
    """Why a folder, which was asked for by `name`, holds no `what`, whose `file` is missing."""
    if not folder.is_dir():
        zoo = ", ".join(sorted(home.parent.name for home in shipped_folder("hub_configs").glob("*/config.json")))
        return f"{name} is neither a folder here nor a model of the zoo, which has {zoo}"
    if "model" in what and (folder / "search.json").is_file():
        return f"{name} is a search, whose supernets are no trained model: train what it found first"
    if "search" in what and any((folder / own).is_file() for own in ("metrics.json", "trial.json")):
        return f"{name} is a training, not a search: give the run folder of a search"
    return f"{name} holds no {what}: {file} is missing"


def load_model(folder: Path) -> PoolingResNet | RelaidResNet:
    """Load a model folder as timm does, in evaluation mode, and check that its files agree.

    Raises:
        InputError: if timm cannot load it, config.json, metrics.json and the weights differ, or the weights are not
            those that were saved.
    """
    for name in ("config.json", "metrics.json", "model.safetensors", "README.md"):
        if not (folder / name).is_file():
            raise InputError(what_is_wrong(str(folder), folder, "trained model", name))
    metrics, data = TrainResult.read(folder / "metrics.json"), folder / "model.safetensors"
    if sha256(data) != metrics.weights_sha256:
        raise InputError(f"{folder}: model.safetensors is damaged: its checksum is not that in metrics.json")
    try:
        model, weights = timm.create_model(f"local-dir:{folder}").eval(), load_file(data)
        model.load_state_dict(weights)  # never another file, as timm might
    except Exception as error:
        raise InputError(f"{folder} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, PoolingResNet | RelaidResNet):
        raise InputError(f"{folder} holds a {type(model).__name__}, which is none of our models")
    check_weights(weights, model.state_dict(), str(data))
    cfg: Any = model.pretrained_cfg
    record = metrics.dataset
    size = [record.in_chans, record.image_size, record.image_size]
    for what, found, recorded in (
        ("layout", model.layout, metrics.layout),
        ("number of parameters", sum(p.numel() for p in model.parameters()), metrics.parameters),
        ("input_size", list(cfg["input_size"]), size),
        ("crop_pct", cfg["crop_pct"], record.crop_pct),
        ("mean", list(cfg["mean"]), record.mean),
        ("std", list(cfg["std"]), record.std),
        ("label_names", list(cfg.get("label_names") or ()), record.label_names),
    ):
        if found != recorded:
            raise InputError(f"{folder}: the model has another {what} than metrics.json says: restore both files")
    return model


def add(
    run: Path | str,
    name: str,
    default: str | None = None,
    repeats: Sequence[Path | str] = (),
    zoo: Path | None = None,
) -> Path:
    """Make a model of the zoo from a finished training: `import bmsn_zoo` then registers it.

    Args:
        run: run folder of the training.
        name: the timm name, such as bmsn_resnet20_mydata.
        default: name of the model with the default layout in the zoo, trained in the same way, to compare with.
        repeats: run folders of the same training with other seeds, whose accuracies the card tells too.
        zoo: folder of model folders; hub_configs/ if None.

    Returns:
        the new folder.

    Raises:
        InputError: if the training is not finished, the name is taken, or `default` or one of the repeats was trained
            in another way.
    """
    zoo, source = zoo or shipped_folder("hub_configs"), _model_of(run)
    folder = zoo / name
    if not re.fullmatch("bmsn_[a-z0-9_]+", name):
        raise InputError(f"name {name!r} does not start with bmsn_, or has more than small letters, digits and _")
    if folder.exists() or timm.is_model(name):
        remove = f"remove {folder} first, or " if folder.exists() else ""
        raise InputError(f"{name} exists already: {remove}choose another name")
    if default and not (zoo / default / "metrics.json").is_file():
        raise InputError(f"default {default} is no model of the zoo")
    require_onnx()
    model, metrics = load_model(source), TrainResult.read(source / "metrics.json")
    compared = _comparable(metrics, zoo / default, default) if default else None
    metrics = _with_repeats(metrics, repeats) if repeats else metrics

    partial = zoo / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in (source / "model.safetensors", Path(run) / "metrics.jsonl"):
            (partial / file.name).write_bytes(read_bytes(file))
        metrics.write(partial / "metrics.json")
        if (source / "search.json").is_file():
            portable(SearchResult.read(source / "search.json")).write(partial / "search.json")
        config = _for_every_client(read_json(source / "config.json"))
        config["pretrained_cfg"].update(hf_hub_id=f"{HUB_ORG}/{name}", hf_hub_filename="model.safetensors")
        write_json(partial / "config.json", config)
        export_onnx(model, partial / "model.onnx", config["label_names"])
        draw_model(partial)
        write_card(partial, f"{HUB_ORG}/{name}", compared, name)
        load_model(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _model_of(run: Path | str) -> Path:
    """The model folder that a training wrote into its run folder."""
    folder = Path(run) / "model"
    if not folder.is_dir():
        raise InputError(what_is_wrong(str(run), Path(run), "trained model", "model"))
    return folder


def _comparable(metrics: TrainResult, folder: Path, shown: Path | str) -> TrainResult:
    """Result of another model, if it was trained as this one was: same data, same settings but layout and seed."""
    other = TrainResult.read(folder / "metrics.json")
    mine, theirs = (
        {**TrainConfig().settings(), **result.settings, **result.dataset.model_dump(include=_DATA)}
        for result in (metrics, other)
    )
    differing = [name for name in mine if name not in _FREE and mine[name] != theirs[name]]
    if differing:
        raise InputError(f"{shown} is not comparable: it was trained with another {', '.join(differing)}")
    return other


def _with_repeats(metrics: TrainResult, runs: Sequence[Path | str]) -> TrainResult:
    """A result that tells of the same training with other seeds too, whose run folders these are, beside its own."""
    seeds, found = set(metrics.seeds), list(metrics.repeats)
    for run in runs:
        folder = _model_of(run)
        load_model(folder)  # is whole
        other = portable(_comparable(metrics, folder, run))
        if other.layout != metrics.layout:
            raise InputError(f"{run} is no repeat: its layout is {other.layout}, not {metrics.layout}")
        if other.seed in seeds:
            raise InputError(f"{run} is no repeat: seed {other.seed} is there already, give another one")
        seeds.add(other.seed)
        found.append(Repeat.of(other))
    return metrics.model_copy(update={"repeats": found})
