"""Trained networks whose weights a training starts from: of the zoo, in a folder, or on the Hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .errors import InputError, first_line
from .files import one_line, read_json
from .hub import fetch
from .layout import Layout
from .model_folder import load_model, model_folder
from .run_folder import check_weights, load_tensors
from .search_space import backbone_of

_NOT_OF_SUPERNETS = ("running_mean", "running_var", "num_batches_tracked", "layout_units")


class Start(NamedTuple):
    """A trained network: how to find it again (on the Hub with its commit), its backbone, and where its weights are."""

    name: str
    model: str
    layout: Layout
    label_names: list[str] | None  # of its classes, if they are known
    weights: Path


def find_start(name: str, backbone: str | None = None) -> Start:
    """Find a network to start from.

    Args:
        name: a model of the zoo, a model folder, the run folder of a training, or USER/REPO[@revision] on the Hub, of
            ours or of timm's.
        backbone: the name of what shall start from it; any if None.

    Raises:
        InputError: if there is none, its files are damaged, or it is of no backbone or another.
    """
    folder = model_folder(name)
    if (folder / "metrics.json").is_file():
        load_model(folder)  # checks that its files belong together
    source = str(folder) if folder.is_dir() else name
    file, weights = fetch(source, "config.json", "model.safetensors", what="trained model")
    pinned = name if folder.is_dir() else f"{name.removeprefix('hf-hub:').partition('@')[0]}@{file.parent.name}"
    with one_line(f"init-from {name}: config.json", "does not describe a model"):
        config: Any = read_json(file)
        arguments, names = config.get("model_args") or {}, config.get("label_names")
        model = str(arguments.get("model", config["architecture"]))
        if backbone not in (None, model):
            raise InputError(f"{name} is a {model}, not a {backbone}: give --model {model}")
        layout = backbone_of(model).check(arguments.get("layout") or backbone_of(model).default_layout)
        return Start(pinned, model, layout, names and list(map(str, names)), weights)


def start_from(network: Any, start: Start, label_names: Sequence[str]) -> None:
    """Give a network, or a supernet, the weights of a trained one of its backbone; their layouts may differ.

    Where the classes are not the same in number, names and order, the classifier stays fresh. A stem for other channels
    is adapted as timm does: colours are summed for gray, gray is shared out over the colours.

    Raises:
        InputError: if the weights are missing, damaged, or another network's.
    """
    own, cfg, shown = network.state_dict(), network.pretrained_cfg, f"start {start.name}"
    weights = load_tensors(start.weights, shown)
    weights = {key: weights[key] for key in weights if key in own or not key.endswith(_NOT_OF_SUPERNETS)}
    kept = ("layout_units",) if start.label_names == list(label_names) else ("layout_units", f"{cfg['classifier']}.")
    weights |= {key: own[key] for key in own if key.startswith(kept)}
    stem = f"{cfg['first_conv']}.weight"
    if stem in weights and weights[stem].shape[1:2] != own[stem].shape[1:2]:
        shared = weights[stem].repeat(1, 3, 1, 1) / 3 if weights[stem].shape[1] == 1 else weights[stem]
        weights[stem] = adapt_input_conv(network.in_chans, shared)
    check_weights(weights, own, shown)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{shown} does not fit the network: {first_line(error)}") from None


def start_from_supernet(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network the weights of a supernet of its search.

    Its norms are fresh, but for scale and shift where those of the supernet have them.

    Args:
        network: of the supernet's backbone, classes and channels, with any layout.
        weights: the supernet's state.
    """
    taken = {key: tensor for key, tensor in weights.items() if not key.endswith(_NOT_OF_SUPERNETS)}
    network.load_state_dict({**network.state_dict(), **taken})


def supernet_from(supernet: Any, start: Start | None, label_names: Sequence[str]) -> None:
    """Give a supernet the weights of a trained network, its norms' scale and shift among them.

    Args:
        supernet: as `Backbone.create` makes it; its norms go on using the batch at hand.
        start: None for a supernet that is to get its weights from a checkpoint.
        label_names: as in `start_from`.
    """
    for norm in supernet.modules():
        if isinstance(norm, nn.BatchNorm2d) and not norm.affine:
            norm.affine, about = True, dict(device=supernet.conv1.weight.device, dtype=supernet.conv1.weight.dtype)
            norm.weight = nn.Parameter(torch.ones(norm.num_features, **about))
            norm.bias = nn.Parameter(torch.zeros(norm.num_features, **about))
    if start:
        start_from(supernet, start, label_names)
