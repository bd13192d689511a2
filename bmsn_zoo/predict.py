"""Labels for images, by a model of the zoo, a model folder or a model on the Hub: python -m bmsn_zoo.predict"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import PartialState
from PIL import Image
from torch import nn

from .client import asking_hub
from .command import run_command
from .data import normalise
from .data.loading import tell_unreadable
from .data.pixels import to_pixels
from .errors import InputError, first_line
from .files import one_line
from .hub import fetch
from .model_folder import load_model, model_folder
from .runtime import full_float32
from .usage import parser_of

_BATCH = 64


def load_any(name: str) -> nn.Module:
    """A trained network in evaluation mode: one of the zoo, of a folder of ours (local-dir:, too), or of the Hub.

    Raises:
        InputError: if there is none of this name.
    """
    folder = model_folder(name.removeprefix("local-dir:"))
    if folder.is_dir():
        return load_model(folder)
    fetch(name, "config.json", what="trained model")  # asks the Hub once, where timm would many times
    with asking_hub(f"model {name!r}"), one_line(f"model {name!r}", "cannot be loaded by timm from the Hub"):
        return timm.create_model(f"hf-hub:{name.removeprefix('hf-hub:')}", pretrained=True).eval()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all images below the folders named, by the endings of their names.

    Raises:
        InputError: if a path does not exist, or a folder holds no images.
    """
    endings, found = Image.registered_extensions(), list[Path]()
    for path in paths:
        below = [path] if path.is_file() else sorted(path.rglob("*"))
        inside = below if path.is_file() else [file for file in below if file.suffix.lower() in endings]
        known = set(inside)
        tell_unreadable([str(file) for file in below if file not in known])
        if not inside:
            raise InputError(f"{path} {'holds no images' if path.is_dir() else 'does not exist'}")
        found += inside
    return found


def predict(
    model: nn.Module, files: Sequence[Path], top: int = 5, unread: list[str] | None = None
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """The most probable labels of images, with their probabilities, best first.

    An image becomes the network's input as test images do, see `data.pixels.to_pixels`.

    Args:
        model: in evaluation mode; its `pretrained_cfg` says what it takes, and how its classes are called.
        files: images.
        top: labels for each.
        unread: takes a line for every image that cannot be read, which is then left out.

    Raises:
        InputError: for an image that cannot be read, without `unread`; if `top` is less than 1.
    """
    if top < 1:
        raise InputError(f"top {top} is too small: it must be at least 1")
    cfg: Any = model.pretrained_cfg
    chans, size = cfg["input_size"][0], cfg["input_size"][-1]
    short, names, device = int(size / (cfg.get("crop_pct") or 1)), cfg.get("label_names"), PartialState().device
    model = model.to(device)
    for first in range(0, len(files), _BATCH):
        group, pixels = list[Path](), list[torch.Tensor]()
        for file in files[first : first + _BATCH]:
            try:
                with Image.open(file) as image:
                    square = to_pixels(image, size, chans, short=short)
            except Exception as error:  # decoders of damaged files raise anything
                line = f"{file} cannot be read as an image: {first_line(error)}"
                if unread is None:
                    raise InputError(line) from None
                unread.append(line)
                continue
            group.append(file)
            pixels.append(torch.from_numpy(square.copy()))
        if not group:
            continue
        with torch.no_grad(), full_float32():
            logits = model(normalise(torch.stack(pixels).to(device), cfg["mean"], cfg["std"])).float()
        best = logits.softmax(1).topk(min(top, logits.shape[1]))
        for file, shares, classes in zip(group, best.values.tolist(), best.indices.tolist(), strict=True):
            labels = [str(names[index]) if names else f"class {index}" for index in classes]
            yield file, list(zip(labels, shares, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("predict")

    def run() -> None:
        given, unread = parser.parse_args(argv), list[str]()
        files = find_images(given.image)
        for file, labels in predict(load_any(given.model), files, given.top, unread):
            told = "  ".join(f"{' '.join(label.split())} {100 * share:.1f} %" for label, share in labels)
            sys.stdout.write(f"{file}  {told}\n")
        if unread:
            others = f"; {len(unread)} of {len(files)} cannot" if len(unread) > 1 else ""
            raise InputError(f"{unread[0]}{others}: remove or repair {'them' if others else 'it'}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
