"""timm's ResNets with their downsamplings anywhere: `relayout`, and the models that it makes.

A re-laid model is saved as what no timm without this package knows, architecture `bmsn_relaid` with the timm name and
the layout among its arguments: there it fails to load ("Unknown model"), instead of running the default layout.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from math import prod
from typing import Any, cast

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BlurPool2d
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..client import asking_hub
from ..errors import InputError, first_line
from ..layout import Layout, halve_down, halve_up
from ..search_space import BACKBONES, OTHERS, Backbone, require_weights
from .pooling_resnet import SupernetNorm, network_cfg, tell_timm

__all__ = ["RelaidResNet", "create_model", "layout_of", "relayout"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")


def relayout(model: nn.Module, layout: str | Sequence[int] | Layout) -> nn.Module:
    """Move the downsamplings of a timm ResNet, in place and at any time; weights and their names stay as they are.

    A unit is a residual block (the stem is none, but in `bmsn_resnet18`). One that downsamples has stride 2 in its
    first 3x3 convolution, or in the anti-aliasing behind it; its shortcut has it in the 1x1 convolution or in the
    average pool before, or, where it has neither, takes every second pixel. What timm derives from the stages follows
    the layout: `feature_info` has one entry for each resolution, and `forward_intermediates` and the cfg's `pool_size`
    agree. With the default layout the model is timm's again, and is saved as such.

    Args:
        model: any ResNet of timm whose blocks are its BasicBlock or Bottleneck, anti-aliased or not: resnet*, resnext*,
            wide_resnet*, seresnet*, ecaresnet*, resnetrs*, resnetaa*, resnetblur* ...
        layout: units at each resolution after the stem, such as "4-4-5-3" for a ResNet50; of any number of scales.

    Returns:
        the model itself. `timm.models.save_for_hf` and our `hub push` write the layout, see the head of this module.

    Raises:
        InputError: if the model is of another family or dilated, or the layout does not fit its units.
    """
    _check_family(model)
    parsed = Layout.parse(layout).check(len(_flags(model)))
    if isinstance(model, RelaidResNet):
        model.set_layout(parsed)
        if model._origin()["architecture"] is not None and parsed == _default_layout(model):
            _return_to_timm(model)
    elif parsed != layout_of(model):
        _adopt(model, (getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
        model.set_layout(parsed)  # type: ignore[operator]
    return model


def layout_of(model: nn.Module) -> Layout:
    """The layout that a timm ResNet, or a model of ours, has at present.

    Raises:
        InputError: if the model is of a family that has none.
    """
    if isinstance(layout := getattr(model, "layout", None), str):
        return Layout.parse(layout)
    _check_family(model)
    return _layout(_flags(model))


class RelaidResNet(ResNet):
    """timm's ResNet after `relayout`: what timm derives from its four stages, derived from its layout instead."""

    __jit_unused_properties__ = ("layout", "_model_args")

    def _origin(self) -> dict[str, Any]:
        """What the stock model was: architecture, args, feature_info, anti-aliasing; and whether its stem is a unit."""
        return self.__dict__["_stock"]  # not annotated in the class, where torchscript would compile it

    @property
    def layout(self) -> str:
        """Where this network downsamples at present, as text."""
        return str(_layout(_flags(self)))

    @property
    def _model_args(self) -> dict[str, Any]:
        """timm: the arguments that it saves with the weights."""
        base, args = self._origin()["architecture"], self._origin()["args"]
        return args | ({"model": base} if base else {}) | {"layout": self.layout}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._origin()["args"] = {key: args[key] for key in args if key not in ("model", "layout")}

    def set_layout(self, layout: str | Sequence[int] | Layout) -> None:
        """Move the downsamplings; weights are untouched.

        Raises:
            InputError: if the layout does not fit the units.
        """
        flags = Layout.parse(layout).check(len(_flags(self))).flags
        for block, flag in zip(_blocks(self), flags[self._origin()["stem_is_unit"] :], strict=True):
            _set_downsampling(block, bool(flag), self._origin()["anti_alias"])
        _describe(self)

    def forward_unit(self, x: Tensor, unit: int, downsample: bool) -> Tensor:
        """Run one unit, downsampling its input or not; the layout stays as it is. Unit 0 runs the stem too."""
        if unit == 0:
            x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        index = unit - self._origin()["stem_is_unit"]
        if index < 0:
            return x
        block, anti_alias = _blocks(self)[index], self._origin()["anti_alias"]
        before = _downsamples(block)
        _set_downsampling(block, downsample, anti_alias)
        try:
            return block(x)
        finally:
            _set_downsampling(block, before, anti_alias)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm: the last map of each resolution, and the final features.

        Args:
            x: images, (B, in_chans, H, W).
            indices: resolutions to return; the last n if an int, all if None.
            norm: unused, as the maps are already normalised and activated.
            stop_early: stop after the last map asked for.
            output_fmt: only "NCHW".
            intermediates_only: return the maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not supported: use NCHW")
        take, last = feature_take_indices(len(self.feature_info), indices)
        level = {info["module"]: index for index, info in enumerate(self.feature_info)}
        maps, x = [], self.bn1(self.conv1(x))
        for name, module in (("act1", self.act1), ("maxpool", self.maxpool), *_named_blocks(self)):
            in_unit = self.grad_checkpointing and name.startswith("layer")
            x = checkpoint_seq([module], x) if in_unit else module(x)
            if level.get(name) in take:
                maps.append(x)
            if stop_early and level.get(name) == last:
                break
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm: drop the blocks after the last map asked for, and the head; returns the absolute indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        end, cut = self.feature_info[last]["module"], last + 1 < len(self.feature_info)
        names = [name for name, _ in _named_blocks(self)]
        keep = names[: names.index(end) + 1] if end in names else []
        for stage in _STAGES:
            setattr(self, stage, getattr(self, stage)[: sum(name.startswith(stage) for name in keep)])
        if end == "act1":
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        if cut:  # the head is as wide as the last map, so it goes with it
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take


# the units of a ResNet, and what makes one of them downsample


def _named_blocks(model: nn.Module) -> list[tuple[str, Any]]:
    return [(f"{stage}.{i}", block) for stage in _STAGES for i, block in enumerate(getattr(model, stage))]


def _blocks(model: nn.Module) -> list[Any]:
    return [block for _, block in _named_blocks(model)]


def _check_family(model: nn.Module) -> None:
    kind = type(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = f"{cfg.get('architecture') or 'this model'} cannot be re-laid"
    if hasattr(model, "layout") and not isinstance(model, RelaidResNet):
        raise InputError(f"{name}: its layout is a part of its weights, create it with layout=")
    if isinstance(model, nn.ModuleDict) and hasattr(model, "feature_info"):
        raise InputError(
            f"{name}: it is a {kind.__name__}, which holds parts of a network: "
            "create it by timm.create_model('bmsn_relaid', model=..., layout=..., features_only=True)"
        )
    if kind not in (ResNet, RelaidResNet):
        raise InputError(f"{name}: it is a {kind.__name__} of {kind.__module__}, use a plain ResNet of timm")
    for block in _blocks(model):
        if type(block) not in (BasicBlock, Bottleneck):
            raise InputError(
                f"{name}: its blocks are of the kind {type(block).__name__}, whose strides cannot be moved, "
                "use a ResNet whose blocks are timm's BasicBlock or Bottleneck"
            )
        if block.dilation != 1:
            raise InputError(f"{name}: it is dilated instead of downsampling, create it with output_stride=32")
        shortcut = block.downsample
        if not (
            shortcut is None
            or isinstance(shortcut, nn.AvgPool2d)
            or (isinstance(shortcut, nn.Sequential) and len(shortcut) in (2, 3))
        ):
            raise InputError(f"{name}: a shortcut of it is a {type(shortcut).__name__}, which timm does not make")
        if block.aa.state_dict():
            raise InputError(f"{name}: its anti-aliasing has weights, which cannot go where a layout says")


def _main_conv(block: Any) -> nn.Conv2d:
    return block.conv1 if isinstance(block, BasicBlock) else block.conv2


def _last_conv(block: Any) -> nn.Conv2d:
    return block.conv2 if isinstance(block, BasicBlock) else block.conv3


def _downsamples(block: Any) -> bool:
    return _main_conv(block).stride[0] == 2 or not isinstance(block.aa, nn.Identity)


def _set_downsampling(block: Any, downsample: bool, anti_alias: tuple[nn.Module, ...]) -> None:
    """Make one block halve its input, or not; `anti_alias` holds an example of what does it, if not the convolution."""
    if _downsamples(block) == downsample:
        return
    stride, conv, shortcut = 2 if downsample else 1, _main_conv(block), block.downsample
    block.stride = stride
    if anti_alias:
        block.aa = _anti_aliasing(anti_alias[0], conv) if downsample else nn.Identity()
    else:
        conv.stride = (stride, stride)
    if not isinstance(shortcut, nn.Sequential):  # an identity, which takes every second pixel
        block.downsample = nn.AvgPool2d(1, 2) if downsample else None
    elif len(shortcut) == 3:
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        shortcut[0] = pool if downsample else nn.Identity()
    else:
        shortcut[0].stride = (stride, stride)  # type: ignore[assignment]


def _anti_aliasing(example: Any, conv: nn.Conv2d) -> nn.Module:
    pool = deepcopy(example)
    if isinstance(pool, BlurPool2d) and pool.channels is not None:
        pool.channels = conv.out_channels
        pool.filt = example.filt[:1].repeat(pool.channels, 1, 1, 1)
    return pool.to(conv.weight)


def _flags(model: nn.Module) -> tuple[int, ...]:
    """For each unit, whether it downsamples; a stem that is a unit does not."""
    stem = (0,) if isinstance(model, RelaidResNet) and model._origin()["stem_is_unit"] else ()
    return (*stem, *(int(_downsamples(block)) for block in _blocks(model)))


def _layout(flags: tuple[int, ...]) -> Layout:
    starts = [0, *(unit for unit, flag in enumerate(flags) if flag and unit)]
    return Layout(tuple(end - start for start, end in zip(starts, (*starts[1:], len(flags)), strict=True)))


def _default_layout(model: nn.Module) -> Layout:
    return Layout(tuple(len(getattr(model, stage)) for stage in _STAGES))


# what timm is told


def _adopt(model: Any, architecture: str | None, stem_is_unit: bool = False) -> None:
    """Make timm's model a `RelaidResNet`; `architecture` is what it was, None if it is a model of ours."""
    model._stock = dict(
        architecture=architecture,
        args=model.__dict__.pop("_model_args", {}),  # torchscript would take it for an attribute of one type
        feature_info=model.feature_info,
        anti_alias=tuple(block.aa for block in _blocks(model) if not isinstance(block.aa, nn.Identity))[:1],
        stem_is_unit=stem_is_unit,
    )
    model.__class__ = RelaidResNet


def _return_to_timm(model: Any) -> None:
    model.feature_info, architecture = model._origin()["feature_info"], model._origin()["architecture"]
    if architecture:
        model.pretrained_cfg["architecture"] = architecture
    model.__class__, model._model_args = ResNet, model._origin()["args"]
    del model._stock


def _reductions(model: Any) -> tuple[int, int]:
    """Pixels of the image for one behind the stem, before and after its pool."""
    before = prod(conv.stride[0] for conv in model.conv1.modules() if isinstance(conv, nn.Conv2d))
    return before, before * (1 if isinstance(model.maxpool, nn.Identity) else 2)


def _describe(model: RelaidResNet) -> None:
    """Tell timm the last module of each resolution, the pool size, and what the model is."""
    before, reduction = _reductions(model)
    width = [conv for conv in model.conv1.modules() if isinstance(conv, nn.Conv2d)][-1].out_channels
    last = {before: ("act1", width)}
    if reduction not in last and model._origin()["stem_is_unit"]:
        last[reduction] = ("maxpool", width)
    for name, block in _named_blocks(model):
        reduction *= 2 if _downsamples(block) else 1
        last[reduction] = (name, _last_conv(block).out_channels)
    model.feature_info = [dict(num_chs=chs, reduction=side, module=name) for side, (name, chs) in last.items()]

    cfg = getattr(model, "pretrained_cfg", None)
    if cfg:
        _set_pool_size(cfg, model)
        if model._origin()["architecture"]:
            cfg["architecture"] = "bmsn_relaid"


def _halve_of(model: RelaidResNet) -> Callable[[int], int]:
    """What a downsampling makes of a side: average pools drop an odd last row."""
    return halve_down if any(isinstance(pool, nn.AvgPool2d) for pool in model._origin()["anti_alias"]) else halve_up


def _set_pool_size(cfg: Any, model: RelaidResNet) -> None:
    halve = _halve_of(model)
    last: Any = model.feature_info[-1]
    for key, source in (("pool_size", "input_size"), ("test_pool_size", "test_input_size")):
        if cfg.get(source) and (cfg.get(key) or key == "pool_size"):
            sides = list(cfg[source][1:])
            for _ in range(last["reduction"].bit_length() - 1):
                sides = [halve(side) for side in sides]
            cfg[key] = tuple(sides)


# models that are registered


def _build(variant: str, pretrained: bool, layout: Any, make: Callable[..., RelaidResNet], **kwargs: Any) -> nn.Module:
    """Build a model as timm does; `make` gives the network, which gets its layout before its weights."""
    made: list[RelaidResNet] = []
    feature_cfg: dict[str, Any] = dict(flatten_sequential=True)

    def lay(**arguments: Any) -> RelaidResNet:
        network = make(**arguments)
        network.set_layout(network.layout if layout is None else layout)
        made.append(network)
        if "out_indices" not in kwargs:
            feature_cfg["out_indices"] = tuple(range(len(network.feature_info)))
        return network

    model = build_model_with_cfg(lay, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    tell_timm(model)
    _set_pool_size(model.pretrained_cfg, made[0])
    return model


@register_model
def bmsn_relaid(
    pretrained: bool = False,
    model: str = "resnet18",
    layout: str | Sequence[int] | Layout | None = None,
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """The timm ResNet `model`, such as "resnet50.a1_in1k", re-laid (see `relayout`) before its weights are loaded."""
    name, tag = split_model_name_tag(model)
    if name.startswith("bmsn_"):
        raise InputError(f"model {model} takes a layout itself: timm.create_model({name!r}, layout=...)")
    if not timm.is_model(name):
        raise InputError(f"model {model!r} is unknown to timm: use the name of one of its ResNets, such as resnet50")
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        tag = tag or pretrained_cfg or ""
        try:
            pretrained_cfg = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
        except RuntimeError:
            known = ", ".join(timm.list_pretrained(f"{name}.*")) or name
            raise InputError(f"model {model!r}: timm has no such weights: use {known}") from None
    elif layout is None:
        raise InputError("these weights came without a layout: config.json needs model and layout among its model_args")
    elif isinstance(pretrained_cfg, dict):
        pretrained_cfg = PretrainedCfg(**pretrained_cfg)

    def make(**arguments: Any) -> RelaidResNet:
        network = model_entrypoint(name)(pretrained_cfg=pretrained_cfg, **arguments)
        _check_family(network)
        _adopt(network, name)
        return network

    cfg = replace(pretrained_cfg, architecture="bmsn_relaid")
    return _build("bmsn_relaid", pretrained, layout, make, pretrained_cfg=cfg, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "bmsn_resnet18": network_cfg(),
        "bmsn_resnet50": network_cfg(num_classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    }
)


def _create(
    variant: str,
    block: Any,
    layers: tuple[int, ...],
    pretrained: bool,
    layout: Any,
    stem: str,
    searchable: bool,
    **kwargs: Any,
) -> nn.Module:
    if stem not in ("3x3", "imagenet"):
        raise InputError(f"stem {stem!r} is unknown: use 3x3 (small images) or imagenet (7x7 of stride 2, then a pool)")
    if searchable:
        kwargs["norm_layer"] = SupernetNorm
    if stem == "imagenet" and not kwargs.get("pretrained_cfg"):
        images = dict(input_size=(3, 224, 224), crop_pct=0.875, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
        kwargs["pretrained_cfg_overlay"] = {**images, **(kwargs.get("pretrained_cfg_overlay") or {})}

    def make(**arguments: Any) -> RelaidResNet:
        network: Any = ResNet(block, layers, **arguments)
        if stem == "3x3":
            weight = network.conv1.weight
            network.conv1 = nn.Conv2d(
                network.in_chans, len(weight), 3, padding=1, bias=False, device=weight.device, dtype=weight.dtype
            )
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        _adopt(network, None, stem_is_unit=variant == "bmsn_resnet18")
        return network

    return _build(variant, pretrained, layout, make, **kwargs)


@register_model
def bmsn_resnet18(
    pretrained: bool = False,
    layout: str | Sequence[int] | Layout | None = None,
    stem: str = "3x3",
    searchable: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """ResNet18 that downsamples where `layout` says, 3-2-2-2 by default; its nine units are the stem and 8 blocks.

    The stem is a 3x3 convolution for images of some 32 pixels, or that of ImageNet's networks with `stem="imagenet"`.
    A `searchable` one is a supernet: its norms use the batch at hand, without scale, shift or running statistics.
    """
    return _create("bmsn_resnet18", BasicBlock, (2, 2, 2, 2), pretrained, layout, stem, searchable, **kwargs)


@register_model
def bmsn_resnet50(
    pretrained: bool = False,
    layout: str | Sequence[int] | Layout | None = None,
    stem: str = "3x3",
    searchable: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """ResNet50 that downsamples where `layout` says, 3-4-6-3 by default; its units are 16 bottleneck blocks.

    `stem` and `searchable` are those of `bmsn_resnet18`.
    """
    return _create("bmsn_resnet50", Bottleneck, (3, 4, 6, 3), pretrained, layout, stem, searchable, **kwargs)


BACKBONES["bmsn_resnet18"] = Backbone(
    create=partial(bmsn_resnet18, searchable=True),
    channels=(64,) * 3 + (128,) * 2 + (256,) * 2 + (512,) * 2,
    default_layout=Layout((3, 2, 2, 2)),
    halve=halve_up,
)
BACKBONES["bmsn_resnet50"] = Backbone(
    create=partial(bmsn_resnet50, searchable=True),
    channels=(256,) * 3 + (512,) * 4 + (1024,) * 6 + (2048,) * 3,
    default_layout=Layout((3, 4, 6, 3)),
    halve=halve_up,
)


# any ResNet of timm by its name


@cache
def _backbone_of(name: str) -> Backbone | None:
    """The backbone of a ResNet of timm; its units are the residual blocks, its default is where timm downsamples."""
    if name.startswith("bmsn_") or not timm.is_model(name):
        return None
    network, cfg = cast(RelaidResNet, bmsn_relaid(model=name, device="meta")), get_pretrained_cfg(name)
    halve, (before, after) = _halve_of(network), _reductions(network)

    def stem(side: int) -> int:
        for _ in range(before.bit_length() - 1):
            side = halve_up(side)
        return halve(side) if after > before else side

    return Backbone(
        create=partial(_supernet, name),
        channels=tuple(_last_conv(block).out_channels for block in _blocks(network)),
        default_layout=_default_layout(network),
        halve=halve,
        stem=stem,
        pretrains=bool(cfg and cfg.hf_hub_id),
    )


OTHERS.append(_backbone_of)


def _supernet(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A supernet of a ResNet of timm: batch norms use the batch at hand, without running statistics.

    They have no scale and shift either, but where it is pretrained: there these are a part of what the network does.
    """
    network = bmsn_relaid(model=name, **kwargs)
    if pretrained:
        start_pretrained(network, name)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.affine, norm.track_running_stats = pretrained, False
            for tensor in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(norm, tensor, None)
            if not pretrained:
                norm.weight = norm.bias = None  # type: ignore[assignment]
    return network


def start_pretrained(network: Any, name: str) -> None:
    """Give a network the weights that timm knows for its name, as timm fits them to its channels and classes.

    Raises:
        InputError: if there are none, they cannot be had, or are no safetensors: a pickle is never opened.
    """
    require_weights(name)
    cfg: Any = get_pretrained_cfg(name)
    repository, _, revision = cfg.hf_hub_id.partition("@")
    with asking_hub(f"the pretrained weights {repository}"):
        try:
            file = hf_hub_download(repository, "model.safetensors", revision=revision or None)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            raise InputError(
                f"the pretrained weights {repository} are no safetensors, and pickles stay closed: use another name"
            ) from None
    try:
        overlay = {"file": file, "hf_hub_id": None}
        size = dict(num_classes=network.num_classes, in_chans=network.in_chans)
        stock = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **size)
        network.load_state_dict(stock.state_dict())
    except (RuntimeError, SafetensorError) as error:
        raise InputError(f"the pretrained weights {repository} do not fit {name}: {first_line(error)}") from error


def create_model(
    name: str, layout: str | Layout, pretrained_cfg_overlay: dict[str, Any], pretrained: bool = False, **kwargs: Any
) -> Any:
    """The network of a backbone's name with one layout, not a supernet; a ResNet of timm becomes `bmsn_relaid`.

    Args:
        name: for `backbone_of`.
        pretrained: start from the weights that timm knows for the name, see `start_pretrained`.
        pretrained_cfg_overlay: what timm is told of the images; what it knows of those of another training is dropped.
        kwargs: for `timm.create_model`.
    """
    arguments: dict[str, Any] = {"layout": str(layout), **kwargs}
    if name not in BACKBONES:
        plain = {key: network_cfg()[key] for key in ("crop_pct", "interpolation")}
        other = dict(tag=None, crop_mode="center", test_input_size=None, test_crop_pct=None)
        pretrained_cfg_overlay = {**plain, **other, **pretrained_cfg_overlay}
        arguments["model"] = name
    known = name if name in BACKBONES else "bmsn_relaid"
    network = timm.create_model(known, pretrained_cfg_overlay=pretrained_cfg_overlay, **arguments)
    if pretrained:
        start_pretrained(network, name)
    return network
