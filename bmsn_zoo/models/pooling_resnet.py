"""`PoolingResNet`, the one network for supernets, retraining and published weights, and its timm entrypoints."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from timm.layers import create_classifier, get_act_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from ..errors import InputError
from ..layout import Layout
from ..search_space import BACKBONES, Backbone

__all__ = ["PoolingResNet"]

# Supernets normalise with the batch at hand: statistics averaged over layouts would belong to none of them.
SupernetNorm = partial(nn.BatchNorm2d, affine=False, track_running_stats=False)


class BasicBlock(nn.Module):
    """A residual block of two 3x3 convolutions; a 2x2 max pool on its input is where it may downsample."""

    def __init__(
        self, in_chs: int, out_chs: int, downsample: bool, norm_layer: Any, act_layer: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.downsample = downsample  # read at every forward, so a supernet changes its layout by it
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False, **factory)
        self.bn1 = norm_layer(out_chs, **factory)
        self.act1 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **factory)
        self.bn2 = norm_layer(out_chs, **factory)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, bias=False, **factory), norm_layer(out_chs, **factory))
            if in_chs != out_chs
            else nn.Identity()
        )
        self.act2 = act_layer(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample:
            x = nn.functional.max_pool2d(x, 2)
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut  # in place: one map less to write and to read
        return self.act2(x)


class PoolingResNet(nn.Module):
    """A CIFAR-style ResNet whose downsamplings sit where its layout says (paper, section 3).

    Weights have the same names and shapes for every layout. A network with a fixed layout therefore stores it in
    its state dict, and loading the weights of another layout raises.

    Args:
        channels: output channels of each unit: the 3x3 stem, then one residual block each.
        layout: units at each resolution; sums to the number of units.
        num_classes: outputs; 0 for features only.
        in_chans: channels of the image.
        global_pool: timm pooling type before the classifier; '' keeps the map.
        drop_rate: dropout before the classifier, a fraction.
        searchable: a supernet: `set_layout` may change the layout at any time, and normalisation layers use the
            batch at hand, in training and in evaluation alike, without scale, shift or running statistics.
        act_layer: activation class, or timm's name of one.
        device: where the weights are made.
        dtype: floating type of the weights.

    Raises:
        InputError: if the layout is malformed or does not fit the units.
    """

    __jit_unused_properties__ = ("_model_args",)

    def __init__(
        self,
        channels: Sequence[int],
        layout: str | Sequence[int] | Layout,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        searchable: bool = False,
        act_layer: Any = nn.ReLU,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        parsed = Layout.parse(layout).check(len(channels))
        self.channels = tuple(channels)
        self.in_chans = in_chans
        self.num_features = self.channels[-1]
        self.drop_rate = drop_rate
        self.searchable = searchable
        self.grad_checkpointing = False

        norm_layer, act_layer = SupernetNorm if searchable else nn.BatchNorm2d, get_act_layer(act_layer)
        self.conv1 = nn.Conv2d(in_chans, self.channels[0], 3, padding=1, bias=False, **factory)
        self.bn1 = norm_layer(self.channels[0], **factory)
        self.act1 = act_layer(inplace=True)
        self.blocks = nn.Sequential(
            *(
                BasicBlock(in_chs, out_chs, bool(flag), norm_layer, act_layer, **factory)
                for in_chs, out_chs, flag in zip(self.channels, self.channels[1:], parsed.flags[1:], strict=False)
            )
        )
        self._set_head(num_classes, global_pool, **factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

        self._describe(parsed)
        if not searchable:  # as floats, since averages of whole numbers would be cut to smaller ones
            self.register_buffer("layout_units", torch.tensor(parsed.units_per_scale, dtype=torch.float, device=device))
            self.register_load_state_dict_pre_hook(_check_layout)

    def _set_head(self, num_classes: int, global_pool: str, **factory: Any) -> None:
        if num_classes and not global_pool:
            raise InputError(
                f"global_pool='' keeps the map, which a classifier of {num_classes} classes cannot take: "
                "use num_classes=0, or a pool such as avg"
            )
        self.num_classes = num_classes
        self.global_pool, self.fc = (
            module.train(self.training)
            for module in create_classifier(self.num_features, num_classes, global_pool, **factory)
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @property
    def _model_args(self) -> dict[str, Any]:
        """timm: the arguments that it saves with the weights, so the layout is text."""
        return self._saved_args

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._saved_args = {key: args[key] for key in args if key != "hub_org"} | {"layout": self.layout}

    @torch.jit.ignore
    def _describe(self, layout: Layout) -> None:
        """Record the layout and what timm derives from it: the last module of every resolution."""
        self.layout = str(layout)
        self.scale_ends = [units - 1 for units in accumulate(layout.units_per_scale)]  # in blocks, without the stem
        self.feature_info = [
            dict(num_chs=self.channels[end], reduction=2**scale, module=f"blocks.{end - 1}" if end else "act1")
            for scale, end in enumerate(self.scale_ends)
        ]

    @torch.jit.ignore
    def set_layout(self, layout: str | Sequence[int] | Layout) -> None:
        """Make a supernet run another layout; weights are untouched.

        Raises:
            InputError: if the layout does not fit the units.
            RuntimeError: if this network is not searchable.
        """
        if not self.searchable:
            raise RuntimeError(f"this network has the fixed layout {self.layout}: only a supernet can change it")
        parsed = Layout.parse(layout).check(len(self.channels))
        for block, flag in zip(self.blocks, parsed.flags[1:], strict=True):
            block.downsample = bool(flag)  # type: ignore[assignment]
        self._describe(parsed)

    @torch.jit.ignore
    def forward_unit(self, x: torch.Tensor, unit: int, downsample: bool) -> torch.Tensor:
        """Run one unit of a supernet, downsampling its input or not; its layout stays as it is."""
        if not self.searchable:
            raise RuntimeError(f"this network has the fixed layout {self.layout}: only a supernet runs unit by unit")
        if unit == 0:
            return self.act1(self.bn1(self.conv1(x)))
        block = self.blocks[unit - 1]
        before, block.downsample = block.downsample, downsample  # type: ignore[assignment]
        try:
            return block(x)
        finally:
            block.downsample = before

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm: how parameters group into layers, for layer-wise learning rates."""
        return dict(stem=r"^conv1|bn1", blocks=r"^blocks" if coarse else r"^blocks\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm: recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """timm: the classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm: replace the classifier by a new one; 0 classes removes it.

        Args:
            num_classes: outputs of the new one.
            global_pool: timm pooling type before it; the present one if None.

        Raises:
            InputError: if there is a classifier, but no pool.
        """
        pool, weight = self.global_pool.pool_type if global_pool is None else global_pool, self.conv1.weight
        self._set_head(num_classes, pool, device=weight.device, dtype=weight.dtype)
        tell_timm(self)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) images to (B, num_features, H / 2^(S-1), W / 2^(S-1)) features."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to (B, num_classes) logits, or to pooled (B, num_features) features with `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = nn.functional.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
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
        maps: list[torch.Tensor] = []
        x = self.act1(self.bn1(self.conv1(x)))
        for scale, (start, end) in enumerate(pairwise([0, *self.scale_ends])):
            if stop_early and scale > last:
                break
            blocks = self.blocks[start:end]
            x = checkpoint_seq(blocks, x) if self.grad_checkpointing and len(blocks) else blocks(x)
            if scale in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm: drop the blocks after the last map asked for, and the head; returns the absolute indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        cut = last + 1 < len(self.feature_info)  # the head is as wide as the last map, so it goes with it
        self.blocks = self.blocks[: self.scale_ends[last]]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take


def _check_layout(module: PoolingResNet, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse the weights of another layout; after averaging, their numbers are whole but for rounding."""
    stored = state_dict.get(prefix + "layout_units")
    if stored is None:
        return
    units = [round(value, 1) for value in stored.flatten().tolist()]
    found = "-".join(f"{value:g}" for value in units)
    if found != module.layout:
        whole = all(value % 1 == 0 for value in units)
        raise InputError(
            f"these weights belong to layout {found}, the network has layout {module.layout}: "
            + (f"create it with layout={found!r}" if whole else "average weights of one layout alone")
        )
    state_dict[prefix + "layout_units"] = torch.tensor(units, dtype=torch.float, device=stored.device)


def tell_timm(model: nn.Module) -> None:
    """Make timm's cfg say what this network is: its own number of classes, and no names of other ones."""
    cfg = getattr(model, "pretrained_cfg", {})
    cfg.update(tuples(cfg))
    if cfg.get("num_classes", 0) != getattr(model, "num_classes", 0):
        cfg["num_classes"] = model.num_classes
        cfg.pop("label_names", None)


def tuples(cfg: dict[str, Any]) -> dict[str, Any]:
    """A cfg from JSON as timm has it, with tuples for lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}


def network_cfg(**kwargs: Any) -> dict[str, Any]:
    """What timm is told of an untrained network for images of 32 pixels."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2306.11982",
        "paper_name": "Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"bmsn_resnet20": network_cfg()})


def _create(variant: str, pretrained: bool, layout: str | Sequence[int] | Layout | None, **kwargs: Any) -> nn.Module:
    backbone = BACKBONES[variant]
    parsed = backbone.check(backbone.default_layout if layout is None else layout)
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if not kwargs.get("pretrained_cfg"):
        sides = overlay.get("input_size", default_cfgs[variant].default.input_size)[1:]
        overlay.setdefault("pool_size", tuple(backbone.resolutions(parsed, side)[-1] for side in sides))
    model = build_model_with_cfg(
        PoolingResNet,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(out_indices=tuple(range(parsed.num_scales)), flatten_sequential=True),
        channels=backbone.channels,
        layout=parsed,
        **kwargs,
    )
    tell_timm(model)
    return model


@register_model
def bmsn_resnet20(
    pretrained: bool = False, layout: str | Sequence[int] | Layout | None = None, **kwargs: Any
) -> nn.Module:
    """ResNet20 with ten units (3x3 stem, 9 basic blocks) that downsamples where `layout` says, 4-3-3 by default."""
    return _create("bmsn_resnet20", pretrained, layout, **kwargs)


BACKBONES["bmsn_resnet20"] = Backbone(
    create=partial(bmsn_resnet20, searchable=True),
    channels=(16,) * 4 + (32,) * 3 + (64,) * 3,
    default_layout=Layout((4, 3, 3)),
    max_pools=True,
)
