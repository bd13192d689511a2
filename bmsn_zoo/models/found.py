"""Found models: every folder of hub_configs/ is a timm model of its name, a backbone with a layout and weights."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models import DefaultCfg, generate_default_cfgs, get_pretrained_cfg, model_entrypoint, register_model
from torch import nn

from ..config import shipped_folder
from ..errors import InputError
from ..files import read_json
from ..layout import Layout
from ..search_space import backbone_of
from .pooling_resnet import tuples

__all__ = ["register_folder"]

HUB_ORG = "bmsn-zoo"  # where the zoo is published, unless the environment or an argument names another organisation
default_cfgs: dict[str, DefaultCfg] = {}  # timm looks for this name


def register_folder(folder: Path) -> None:
    """Register a model folder as a timm model.

    The model takes every argument of its backbone, and `hub_org`, the Hub organisation that the weights come from;
    without one (nor BMSN_ZOO_HUB_ORG) they are those in the folder, if it holds any. Another layout is refused.

    Args:
        folder: holds config.json as timm writes it; its name is the model's.

    Raises:
        InputError: if config.json is not one of a backbone of ours with a layout.
    """
    name, weights = folder.name, folder / "model.safetensors"
    try:
        config = read_json(folder / "config.json")
        backbone, defaults = config["architecture"], dict(config["model_args"])
        fixed = backbone_of(defaults.get("model", backbone)).check(defaults.pop("layout"))
        cfg = {
            "hf_hub_id": f"{HUB_ORG}/{name}",
            **tuples(dict(config["pretrained_cfg"])),
            "num_classes": config["num_classes"],
            "label_names": tuple(config.get("label_names") or ()) or None,
            "file": str(weights) if weights.exists() else None,
            "hf_hub_filename": "model.safetensors",
        }
        default_cfgs.update(generate_default_cfgs({name: cfg}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not the folder of a found model: {type(error).__name__}: {error}") from None

    def create(
        pretrained: bool = False,
        layout: Any = None,
        hub_org: str | None = None,
        pretrained_cfg: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        if layout is not None and Layout.parse(layout) != fixed:
            raise InputError(f"{name} has the layout {fixed}, not {Layout.parse(layout)}: use {backbone} for others")
        if pretrained_cfg is None or isinstance(pretrained_cfg, str):
            pretrained_cfg = get_pretrained_cfg(f"{name}.{pretrained_cfg}" if pretrained_cfg else name)
            pretrained_cfg = replace(pretrained_cfg, architecture=backbone)  # what a copy of the model is saved as
            org = hub_org or os.environ.get("BMSN_ZOO_HUB_ORG")
            if org:
                pretrained_cfg = replace(pretrained_cfg, file=None, hf_hub_id=f"{org}/{name}")
        arguments = {**defaults, **kwargs, "layout": str(fixed)}
        return model_entrypoint(backbone)(pretrained, pretrained_cfg=pretrained_cfg, **arguments)

    create.__name__, create.__qualname__ = name, name
    create.__doc__ = f"{backbone} with the layout {fixed}, from the model folder {name}."
    globals()[name] = register_model(create)


def _register_all() -> None:
    for config in sorted(shipped_folder("hub_configs").glob("*/config.json")):
        try:
            register_folder(config.parent)
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)


_register_all()
