"""Model folders as the Hub and timm take them: config.json, model.safetensors, metrics.json, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf

from .card import write_card
from .errors import InputError
from .models import PoolingResNet
from .records import SCHEMA_VERSION, read_json


def save_model(
    folder: Path, model: PoolingResNet, label_names: list[str], metrics: Path, search: Path | None = None
) -> None:
    """Write everything that a Hub repository of one trained network holds.

    Args:
        folder: where to; made if needed.
        model: trained, with a fixed layout.
        label_names: one for every class.
        metrics: the training's metrics.json.
        search: search.json of the search that found the layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(memory_format=torch.contiguous_format)  # safetensors asks for it
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": label_names},
        model_args={"layout": model.layout},
        safe_serialization=True,
    )
    shutil.copyfile(metrics, folder / "metrics.json")
    if search is not None:
        shutil.copyfile(search, folder / "search.json")
    write_card(folder)


def load_search(name: str) -> dict[str, Any]:
    """The result of a finished search, from its run folder.

    Raises:
        InputError: if there is none, or it is of another kind or version.
    """
    path = Path(name) / "search.json"
    if not path.exists():
        raise InputError(f"{name} holds no finished search: search.json is missing")
    result = read_json(path)
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is not a search result of version {SCHEMA_VERSION}: run the search again")
    return result


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    return json.loads((folder / "config.json").read_text())
