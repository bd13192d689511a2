"""ONNX files of trained networks, for those who have neither timm nor this package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError


def require_onnx() -> Any:
    """The onnx package.

    Raises:
        InputError: if it or what torch needs beside it is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is needed to write ONNX: pip install 'bmsn_zoo[onnx]'") from None
    return onnx


def export_onnx(model: nn.Module, path: Path, label_names: Sequence[str] = ()) -> None:
    """Write a network as one ONNX file: input "images", output "logits", any batch size.

    The file's metadata say how images are prepared and what the logits mean. It has the same bytes for the same
    weights and versions, and holds no path of this machine.

    Args:
        model: on the CPU; left in evaluation mode.
        path: the file.
        label_names: one for every logit.

    Raises:
        InputError: if onnx is not installed.
    """
    onnx = require_onnx()
    config: Any = model.pretrained_cfg
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, *config["input_size"]),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    color = {1: "gray", 3: "RGB"}.get(config["input_size"][0], "")
    about = {
        "architecture": config["architecture"],
        "layout": model.layout,
        "images": f"float32, (batch, channels, height, width), {color}, pixels / 255, then (x - mean) / std",
        **{key: list(config[key]) for key in ("input_size", "mean", "std")},
        **{key: config[key] for key in ("interpolation", "crop_pct", "license")},
        "label_names": list(label_names),
    }
    onnx.helper.set_model_props(proto, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _strip(proto: Any) -> None:
    """Remove what the exporter notes of every node, paths of source files among it."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
