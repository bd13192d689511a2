from math import comb

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bmsn_zoo import BACKBONES, Backbone, InputError, Layout, SearchSpace, backbone_of, cost
from bmsn_zoo.supernet import Mixture, walk_layouts

# millions of multiply-accumulates for one 32x32 image, known before any code was written
MACS = {
    "1-1-8": 18.6,
    "2-4-4": 30.2,
    "2-5-3": 33.7,
    "3-4-3": 37.3,
    "4-3-3": 40.8,
    "2-6-2": 44.7,
    "5-3-2": 62.8,
    "7-1-2": 91.1,
    "8-1-1": 149.3,
}


@pytest.fixture(scope="module")
def space():
    return SearchSpace("bmsn_resnet20")


def test_resnet20_has_36_layouts_in_order(space):
    layouts = list(space)
    assert len(space) == len(layouts) == len(set(layouts)) == 36
    assert layouts == sorted(layouts)
    assert [str(layouts[0]), str(layouts[-1])] == ["1-1-8", "8-1-1"]
    assert all(layout.num_units == 10 and layout.num_scales == 3 for layout in layouts)


def test_index_both_ways(space):
    for index, layout in enumerate(space):
        assert space[index] == layout
        assert space.index(layout) == space.index(str(layout)) == space.index(list(layout.units_per_scale)) == index


def test_default_is_the_standard_network(space):
    assert str(space.default_layout) == "4-3-3"
    assert space.default_layout in list(space)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("scales", [1, 2, 4])
def test_default_layout_sets_the_number_of_scales(name, scales):
    units = BACKBONES[name].num_units
    default = (1,) * (scales - 1) + (units - scales + 1,)
    space = SearchSpace(name, default)
    assert len(space) == comb(units - 1, scales - 1)
    assert space.default_layout == Layout(default)
    assert list(space) == sorted(set(space))


@pytest.mark.parametrize(
    ("name", "default", "message"),
    [
        ("resnet20", None, "'resnet20' has no search space.*bmsn_resnet20"),
        ("bmsn_resnet20_cifar10", None, "'bmsn_resnet20_cifar10' has no search space"),
        ("skresnet18", None, "skresnet18 cannot be re-laid: its blocks are of the kind SelectiveKernelBasic"),
        ("res2net50d", None, "res2net50d cannot be re-laid"),
        ("resnetv2_50", None, "resnetv2_50 cannot be re-laid: it is a ResNetV2"),
        ("resnet18.none", None, "'resnet18.none': timm has no such weights: use resnet18.a1_in1k"),
        ("resnet18", "4-4-5-3", "4-4-5-3 sums to 16, the backbone has 8 units"),
        ("resnet200", None, "over 20000 layouts"),
        ("", None, "no search space"),
        ("bmsn_resnet20", "4-3-4", "4-3-4 sums to 11"),
        ("bmsn_resnet20", [4, 0, 6], "has 0"),
    ],
)
def test_bad_space(name, default, message):
    with pytest.raises(InputError, match=message):
        SearchSpace(name, default)


@pytest.mark.parametrize(
    ("layout", "message"),
    [("5-5", "5-5 has 2 scales.*has 3"), ("5-3-3", "sums to 11"), ("best", "'best'"), (None, "None"), (-1, "-1")],
)
def test_index_refuses_what_is_not_in_the_space(space, layout, message):
    with pytest.raises(InputError, match=message):
        space.index(layout)


@pytest.mark.parametrize("layout", MACS)
def test_macs_check_values(space, layout):
    assert round(space.macs(Layout.parse(layout), 32) / 1e6, 1) == MACS[layout]


@pytest.mark.parametrize(
    ("name", "image_size", "in_chans"),
    [*(("bmsn_resnet20", *shape) for shape in ((32, 3), (28, 1), (33, 3))), *((name, 33, 1) for name in BACKBONES)],
)
def test_macs_are_those_of_the_real_convolutions(name, image_size, in_chans):
    space, counted = SearchSpace(name), []
    for layout in {space[0], space[len(space) // 2], space[-1], space.default_layout}:
        model = timm.create_model(name, layout=str(layout), in_chans=in_chans, device="meta").eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda conv, _, out: counted.append(out[0, 0].numel() * conv.weight.numel())
                )
        counted.clear()
        with torch.no_grad():
            model(torch.zeros(1, in_chans, image_size, image_size, device="meta"))
        assert space.macs(layout, image_size, in_chans) == sum(counted)


def test_macs_are_counted_once_for_each_unit_size_and_downsampling(space):
    cost._row.cache_clear()
    rows = set()
    for layout in space:
        space.macs(layout, 32)
        rows |= set(zip(range(10), (32, *layout.resolutions(32)), layout.flags, strict=False))
    assert cost._row.cache_info().currsize == len(rows)


@pytest.mark.parametrize("layouts", [None, ["1-1-8", "1-9", "4-3-3", "4-2-4", "5-3-2"]])
def test_macs_of_all_layouts_are_those_of_walking_them(space, layouts):
    some = space.subset(layouts) if layouts else space
    supernet = some.backbone.create(num_classes=0, in_chans=1, device="meta")
    with FlopCounterMode(display=False) as counter:
        assert len(list(walk_layouts(supernet, some, torch.empty(2, 1, 16, 16, device="meta")))) == len(some)
    assert cost.tree_macs(some, 16, 1) == counter.get_total_flops() // 4


def test_what_a_tree_of_all_layouts_saves(space):
    assert sum(space.macs(layout, 32) for layout in space) / cost.tree_macs(space, 32) == pytest.approx(2.03, abs=0.005)


def test_macs_of_an_image_that_is_too_small(space):
    with pytest.raises(InputError, match="3 scales, too many for 3-pixel images"):
        space.macs(space.default_layout, 3)


# a part of the layouts


def test_subset_is_sorted_and_need_not_hold_the_default(space):
    some = space.subset(["5-3-2", [1, 1, 8], Layout((5, 5)), "5-3-2"])
    assert [str(layout) for layout in some] == ["1-1-8", "5-3-2", "5-5"]
    assert (some.name, str(some.default_layout)) == ("bmsn_resnet20", "4-3-3")
    assert some.default_layout not in some
    assert some.index("5-5") == 2
    assert len(space) == 36
    assert space.default_layout in space
    with pytest.raises(InputError, match="4-3-3 is not among the 3 layouts of this search"):
        some.index("4-3-3")
    with pytest.raises(InputError, match="10 has 1 scales, this search has 2 or 3"):
        some.index("10")
    with pytest.raises(InputError, match="no layout is left"):
        space.subset([])
    with pytest.raises(InputError, match="sums to 11"):
        space.subset(["5-3-3"])


# another network


class StridedResNet(ResNet):
    """timm's ResNet18 for small images, its strides wherever a layout says; the stem is no unit."""

    def __init__(self, **kwargs):
        super().__init__(block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)
        self.conv1, self.maxpool = (
            nn.Conv2d(self.in_chans, 64, 3, padding=1, bias=False, device=kwargs.get("device")),
            nn.Identity(),
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
        self.units = [block for name in ("layer1", "layer2", "layer3", "layer4") for block in getattr(self, name)]
        self.set_layout("2-2-2-2")

    def set_layout(self, layout):
        layout = Layout.parse(layout)
        for unit, flag in zip(self.units, layout.flags, strict=True):
            self.set_stride(unit, 2 if flag else 1)
        self.layout = str(layout)

    @staticmethod
    def set_stride(unit, stride):
        before = unit.conv1.stride[0]
        unit.conv1.stride = (stride, stride)
        if unit.downsample is None:
            unit.downsample = nn.Identity()
        if isinstance(unit.downsample, nn.Sequential):
            unit.downsample[0].stride = (stride, stride)
        else:
            unit.downsample = nn.AvgPool2d(1, stride)
        return before

    def forward_unit(self, x, unit, downsample):
        if unit == 0:
            x = self.act1(self.bn1(self.conv1(x)))
        before = self.set_stride(self.units[unit], 2 if downsample else 1)
        x = self.units[unit](x)
        self.set_stride(self.units[unit], before)
        return x


@pytest.fixture
def strided(monkeypatch):
    """A search space of another kind of network: all that it takes is an entry in the registry."""
    channels = (64,) * 2 + (128,) * 2 + (256,) * 2 + (512,) * 2
    monkeypatch.setitem(
        BACKBONES, "strided", Backbone(StridedResNet, channels, Layout((2, 2, 2, 2)), lambda side: -(-side // 2))
    )
    return SearchSpace("strided").subset(["2-2-2-2", "2-2-3-1", "2-3-3", "1-1-1-5"])


@torch.no_grad()
def test_any_network_with_units_can_be_searched(strided):
    made = Mixture(strided, 1, num_classes=3, in_chans=1, seed=0)
    supernet, images, sizes = made.supernets[0], torch.rand(2, 1, 28, 28), []
    walked = list(walk_layouts(supernet, strided, images))
    assert supernet.layout == "2-2-2-2"
    for layout, logits in zip(strided, walked, strict=True):
        copy = made.extract(layout, 0)
        assert torch.equal(copy(images), logits)
        for unit in copy.units:
            unit.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
        sizes.clear()
        with FlopCounterMode(display=False) as counter:
            copy(images[:1])
        assert tuple(sizes) == strided.backbone.resolutions(layout, 28)
        assert strided.macs(layout, 28, 1) == counter.get_total_flops() // 2 - 512 * 3
    assert len({tuple(logits.flatten().tolist()) for logits in walked}) == 4


@pytest.mark.parametrize(
    ("name", "count", "sizes"),
    [
        ("resnet18", 35, (65, 96)),
        ("resnet14t", 1, (66,)),
        ("resnetblur18", 35, (70,)),
        pytest.param("resnet50.a1_in1k", 455, (80,), marks=pytest.mark.slow),
        pytest.param("resnetaa50", 455, (64, 96), marks=pytest.mark.slow),
        pytest.param("resnetrs50", 455, (75,), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_any_resnet_of_timm_has_a_space(name, count, sizes):
    space = SearchSpace(name, "4" if count == 1 else None)
    assert len(space) == count
    network, seen = timm.create_model("bmsn_relaid", model=name, device="meta"), []
    assert str(SearchSpace(name).default_layout) == network.layout
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for unit in stage:
            unit.register_forward_hook(lambda _, __, out: seen.append(out.shape[1:3]))
    for size in sizes:
        for layout in (space.default_layout, space[0], space[-1]):
            network.set_layout(layout)
            seen.clear()
            with FlopCounterMode(display=False) as counter:
                network(torch.empty(1, 3, size, size, device="meta"))
            assert seen == list(zip(space.backbone.channels, space.backbone.resolutions(layout, size), strict=True))
            head = network.num_features * 1000
            assert space.macs(layout, size) == counter.get_total_flops() // 2 - head


def test_images_that_a_resnet_of_timm_cannot_take_are_refused():
    backbone = backbone_of("resnet18")
    assert backbone.check("2-2-2-2", 17)
    with pytest.raises(InputError, match="too many for 16-pixel images: use images of at least 17 pixels"):
        backbone.check("2-2-2-2", 16)
    with pytest.raises(InputError, match=r"cannot take maps of 25 x 25 pixels.*use an image-size"):
        SearchSpace("resnetaa50").macs(Layout((3, 4, 6, 3)), 100)


def test_parameters_of_resnet20(space):
    counts = {sum(p.numel() for p in timm.create_model(space.name, layout=str(v)).parameters()) for v in space}
    assert len(counts) == 1
    assert 0.265e6 < counts.pop() < 0.28e6
