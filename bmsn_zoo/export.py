"""ONNX files of trained networks, for those who have neither timm nor this package."""

import functools
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, first_line


def preparation(channels: int, side: int, crop_pct: float) -> str:
    """How an image becomes the input of a network: what `data.to_pixels` does, for all that we publish."""
    return (
        f"turned upright as EXIF says, transparency laid on white, {'RGB' if channels == 3 else 'gray'}, the shorter "
        f"side resized to {int(side / crop_pct)} pixels (bicubic), the middle {side}x{side} cut out"
    )


class _FromBytes(nn.Module):
    """A network that takes bytes (B, H, W, C) and normalises them itself."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.scale = nn.Buffer(torch.tensor([1 / (255 * s) for s in std]))
        self.shift = nn.Buffer(torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() * self.scale + self.shift).permute(0, 3, 1, 2))


def require_onnx() -> Any:
    """The onnx package, after trying whether ONNX can be written: that comes at the end of a long training.

    Raises:
        InputError: if it or what torch needs beside it is not installed, or their versions do not fit.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is needed to write ONNX: pip install 'bmsn_zoo[onnx]'") from None
    try:
        _try_export()
    except Exception as error:  # whatever versions that do not fit raise
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxscript", "onnx"))
        raise InputError(
            f"ONNX cannot be written with {versions} ({type(error).__name__}: {first_line(error)}): "
            "pip install --upgrade torch onnxscript onnx"
        ) from None
    return onnx


@functools.cache
def _try_export() -> None:
    layers = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.MaxPool2d(2)  # not every mismatch shows with every one
    _ = _program(nn.Sequential(*layers).eval(), torch.zeros(2, 1, 2, 2)).model_proto


def _program(model: nn.Module, example: Tensor) -> Any:
    return torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )


def export_onnx(model: nn.Module, path: Path, label_names: Sequence[str] = ()) -> None:
    """Write a network as one ONNX file: input "images", bytes (batch, height, width, channels); output "logits".

    It normalises inside. The file's metadata say how images are prepared and what the logits mean. It has the same
    bytes for the same weights and versions, and holds no path of this machine.

    Args:
        model: on the CPU; left in evaluation mode.
        path: the file.
        label_names: one for every logit.

    Raises:
        InputError: if ONNX cannot be written.
    """
    onnx, config = require_onnx(), dict(model.pretrained_cfg)  # type: ignore[arg-type]
    channels, *side = config["input_size"]
    network = _FromBytes(model, config["mean"], config["std"])
    proto = _program(network.eval(), torch.zeros(2, *side, channels, dtype=torch.uint8)).model_proto
    _strip(proto)
    prepared = preparation(channels, side[0], config["crop_pct"])
    about = {
        "architecture": config["architecture"],
        "layout": model.layout,
        "images": f"uint8, (batch, height, width, channels): {prepared}; normalised inside",
        "license": config["license"],
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
