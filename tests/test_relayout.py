"""timm's ResNets with their downsamplings moved: the same weights, other resolutions, and back."""

import json
import pickle
import subprocess
import sys
from copy import deepcopy

import pytest
import timm
import torch
from closeness import close
from timm.models import ResNet, save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bmsn_zoo import InputError, Layout, SearchSpace, layout_of, relayout
from bmsn_zoo.models import RelaidResNet
from bmsn_zoo.supernet import Mixture, walk_layouts

# the families: strides alone; average pool in the shortcut; anti-aliased by pools and by blurring; other norms, groups
SAMPLE = ["resnet18", "resnet10t", "test_resnet", "resnet26d", "resnetaa34d", "seresnet18", "resnet50_gn"]
MACS = {  # of all convolutions, by image size
    ("bmsn_resnet18", 32): {
        "3-2-2-2": 555_417_600, "1-1-1-6": 201_523_200, "6-1-1-1": 2_241_527_808, "1-2-2-4": 240_844_800,
        "2-2-2-3": 385_548_288, "2-3-2-2": 498_794_496, "4-1-2-2": 731_578_368, "3-3-2-1": 907_739_136,
        "4-2-2-1": 1_083_899_904, "5-2-1-1": 1_536_884_736,
    },
    ("bmsn_resnet50", 32): {
        "3-4-6-3": 1_297_809_408, "1-1-1-13": 488_570_880, "13-1-1-1": 11_263_475_712, "1-5-7-3": 1_112_211_456,
        "2-4-7-3": 1_165_688_832, "4-4-5-3": 1_926_955_008, "5-5-4-2": 2_883_256_320, "4-5-6-1": 2_669_346_816,
        "6-4-5-1": 3_311_075_328, "8-3-3-2": 4_833_607_680, "9-4-2-1": 6_381_305_856,
    },
    ("resnet50", 224): {
        "3-4-6-3": 4_087_136_256, "1-1-1-13": 1_608_843_264, "13-1-1-1": 34_606_989_312, "1-5-7-3": 3_518_742_528,
        "2-4-7-3": 3_682_516_992, "4-4-5-3": 6_013_894_656, "5-5-4-2": 8_942_567_424, "4-5-6-1": 8_287_469_568,
        "6-4-5-1": 10_252_763_136, "8-3-3-2": 14_915_518_464, "9-4-2-1": 19_655_344_128,
    },
}  # fmt: skip


def create(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():  # timm starts the last norm of each block at zero
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
            with torch.no_grad():
                module.weight.copy_(torch.linspace(0.5, 1.5, len(module.weight)))
    return model


def units(model):
    return sum(len(getattr(model, f"layer{stage}")) for stage in range(1, 5))


def other_layouts(model):
    """A layout of early downsamplings, one of late ones, one of fewer scales."""
    count = units(model)
    if count == 4:
        return [Layout((2, 1, 1)), Layout((1, 1, 2)), Layout((1, 3))]
    return [Layout((1, 1, 1, count - 3)), Layout((count - 3, 1, 1, 1)), Layout((count // 2, count - count // 2))]


def check_model(name, layouts=3):
    """Other layouts give other maps, of the sizes that feature_info tells; the default one gives the logits of timm."""
    model, x = create(name), torch.randn(1, 3, 64, 64)
    keys, expected, cfg, info = (
        list(model.state_dict()),
        model(x),
        dict(model.pretrained_cfg),
        deepcopy(model.feature_info),
    )
    default, seen = layout_of(model), [expected]
    for layout in other_layouts(model)[:layouts]:
        assert relayout(model, str(layout)) is model
        assert layout_of(model) == layout
        assert list(model.state_dict()) == keys
        seen.append(model(x))
        final, maps = model.forward_intermediates(x)
        assert torch.equal(model.forward_head(final), seen[-1])
        assert len(maps) == len(model.feature_info) == layout.num_scales + 1
        for found, level in zip(maps, model.feature_info, strict=True):
            assert found.shape[1:] == (level["num_chs"], 64 // level["reduction"], 64 // level["reduction"])
        sides = model.pretrained_cfg["input_size"][1:]
        assert model.pretrained_cfg["pool_size"] == tuple(-(-s // model.feature_info[-1]["reduction"]) for s in sides)
    assert len({tuple(logits.flatten().tolist()) for logits in seen}) == len(seen), "layouts cannot be told apart"
    relayout(model, default)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert (type(model), model.pretrained_cfg, model.feature_info) == (ResNet, cfg, info)
    return default


@pytest.mark.parametrize("name", SAMPLE)
def test_default_layout_is_the_stock_network_after_others(name):
    check_model(name)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_resnet_of_timm_up_to_30_million_parameters():
    checked = 0
    for name in timm.list_models(module="resnet"):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert layout_of(model).num_scales == 4
        if sum(parameter.numel() for parameter in model.parameters()) <= 30e6:
            check_model(name, layouts=2)
            checked += 1
    assert checked >= 39


def test_the_blocks_downsample_as_timm_s_do():
    """The last unit of a stage at the next resolution: its shortcut takes every second pixel."""
    model = relayout(create("resnet18"), "1-3-2-2")
    block, x = model.layer1[1], torch.rand(1, 64, 7, 7)
    assert torch.equal(block.downsample(x), x[:, :, ::2, ::2])
    assert block.conv1.stride == (2, 2)
    assert model.layer2[0].conv1.stride == model.layer2[0].downsample[0].stride == (1, 1)
    deep = relayout(create("resnet26d"), "1-3-2-2")
    assert deep.layer1[1].conv1.stride == (1, 1)
    assert deep.layer1[1].conv2.stride == (2, 2)
    assert isinstance(deep.layer2[0].downsample[0], nn.Identity)
    assert torch.equal(relayout(deep, "3-1-2-2").layer2[1].downsample(x), x[:, :, ::2, ::2])
    anti = relayout(create("resnetblur50"), "2-5-6-3")
    assert anti.layer1[2].conv2.stride == (1, 1)
    assert anti.layer1[2].aa(torch.ones(1, 64, 8, 8)).shape == (1, 64, 4, 4)
    assert isinstance(anti.layer2[0].aa, nn.Identity)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("skresnet18", {}, "skresnet18 cannot be re-laid: its blocks are of the kind SelectiveKernelBasic"),
        ("res2net50_14w_8s", {}, "Bottle2neck"),
        ("resnest14d", {}, "ResNestBottleneck"),
        ("resnetv2_18", {}, "it is a ResNetV2 of timm.models.resnetv2"),
        ("legacy_seresnet18", {}, "it is a SENet of timm.models.senet"),
        ("resnet18", dict(output_stride=16), "dilated instead of downsampling, create it with output_stride=32"),
        ("resnet18", dict(features_only=True), "FeatureListNet.*bmsn_relaid"),
        ("bmsn_resnet20", {}, "its layout is a part of its weights, create it with layout="),
        ("efficientnet_b0", {}, "it is a EfficientNet"),
    ],
)
def test_other_families_are_refused_in_one_line(name, kwargs, message):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    with pytest.raises(InputError, match=message) as caught:
        relayout(model, "2-2-2-2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["3-4-6-3", "2-2-2", "", "2-2-2-0-2", None])
def test_a_bad_layout_leaves_the_model_as_it_is(layout):
    model = create("test_resnet")
    with pytest.raises(InputError):
        relayout(model, layout)
    assert type(model) is ResNet


def test_copies_and_pickles_keep_the_layout():
    model, x = relayout(create("resnet10t"), "1-1-2"), torch.randn(1, 3, 64, 64)
    expected = model(x)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layout_of(copied) == Layout((1, 1, 2))
        assert torch.equal(copied(x), expected)
        assert len(copied.forward_intermediates(x, intermediates_only=True)) == 4
        relayout(copied, "1-1-1-1")
        assert layout_of(model) == Layout((1, 1, 2))


# saving and loading


def reloaded(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("name", ["resnet10t", "resnetaa34d"])
def test_saved_models_come_back_with_their_layout(name, tmp_path):
    model, x = (
        relayout(create(name, num_classes=7, in_chans=1), "1-2-1" if name == "resnet10t" else "2-9-3-2"),
        torch.randn(1, 1, 64, 64),
    )
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = reloaded(tmp_path)
    assert layout_of(again) == layout_of(model)
    assert torch.equal(again(x), model(x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "bmsn_relaid"
    maps = timm.create_model(f"local-dir:{tmp_path}", features_only=True, pretrained=True).eval()
    found = maps(x)
    assert [m.shape[1] for m in found] == maps.feature_info.channels() == [i["num_chs"] for i in model.feature_info]
    assert all(map(torch.equal, found, model.forward_intermediates(x, intermediates_only=True)))

    config["model_args"] = {}  # as older timm writes it
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="these weights came without a layout"):
        reloaded(tmp_path)


def test_registered_models_come_back_with_layout_and_stem(tmp_path):
    model, x = create("bmsn_resnet18", layout="1-1-2-5", stem="imagenet", num_classes=3), torch.randn(1, 3, 64, 64)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = reloaded(tmp_path)
    assert layout_of(again) == Layout((1, 1, 2, 5))
    assert torch.equal(again(x), model(x))


@pytest.mark.slow
def test_a_timm_without_this_package_refuses_them_and_takes_the_default_layout(tmp_path):
    relaid, default = tmp_path / "relaid", tmp_path / "default"
    model = relayout(create("test_resnet"), "1-1-1-1")
    assert type(model) is ResNet, "this is its default layout"
    save_for_hf(relayout(model, "2-1-1"), str(relaid), safe_serialization=True)
    save_for_hf(relayout(model, "1-1-1-1"), str(default), safe_serialization=True)
    assert json.loads((default / "config.json").read_text())["architecture"] == "test_resnet"
    assert type(reloaded(default)) is ResNet
    load = f"import timm; timm.create_model({f'local-dir:{relaid}'!r}, pretrained=True)"
    refused = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, timeout=250)
    assert refused.returncode
    assert "Unknown model (bmsn_relaid)" in refused.stderr


def test_bmsn_relaid_is_the_same_as_relayout():
    direct = create("bmsn_relaid", model="resnet10t", layout="1-2-1", num_classes=5)
    x, stock = torch.randn(1, 3, 64, 64), create("resnet10t", num_classes=5)
    stock.load_state_dict(direct.state_dict())
    assert torch.equal(relayout(stock, "1-2-1")(x), direct(x))
    assert direct.pretrained_cfg["num_classes"] == 5
    assert direct.pretrained_cfg["pool_size"] == stock.pretrained_cfg["pool_size"]
    for model, message in (("bmsn_resnet18", "takes a layout itself"), ("resnet19", "unknown to timm")):
        with pytest.raises(InputError, match=message):
            create("bmsn_relaid", model=model)


def test_pretrained_weights_are_taken_whatever_the_layout(tmp_path):
    stock, x = create("resnet10t"), torch.randn(1, 3, 64, 64)
    torch.save(stock.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    model = timm.create_model(
        "bmsn_relaid", model="resnet10t", layout="1-1-2", pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    assert torch.equal(model(x), relayout(stock, "1-1-2")(x))


# what can be searched


@pytest.mark.parametrize(("name", "count"), [("bmsn_resnet18", 56), ("bmsn_resnet50", 455)])
def test_spaces_and_multiply_accumulates(name, count):
    space = SearchSpace(name)
    assert len(space) == count
    for layout, macs in MACS[name, 32].items():
        assert space.macs(Layout.parse(layout), 32) == macs, layout
    assert space.macs(space.default_layout, 8) > 0, "maps of one pixel"


@pytest.mark.slow
def test_multiply_accumulates_of_a_stock_network_at_224_pixels():
    with torch.device("meta"):
        model = timm.create_model("resnet50", num_classes=0)
        images = torch.empty(1, 3, 224, 224)
    for layout, macs in MACS["resnet50", 224].items():
        with FlopCounterMode(display=False) as counter:
            relayout(model, layout)(images)
        assert counter.get_total_flops() == 2 * macs


def test_parameters():
    for kwargs, count in (
        (dict(model_name="bmsn_resnet18"), 11_173_962),
        (dict(model_name="bmsn_resnet18", searchable=True), 11_173_962 - 9_600),
        (dict(model_name="bmsn_resnet50"), 23_705_252),
        (dict(model_name="bmsn_resnet50", searchable=True), 23_705_252 - 53_120),
        (dict(model_name="bmsn_resnet50", num_classes=101, stem="imagenet"), 23_714_981),
    ):
        with torch.device("meta"):
            model = timm.create_model(**kwargs)
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_stem_of_imagenet():
    model, stock, x = (
        create("bmsn_resnet18", stem="imagenet", num_classes=9),
        create("resnet18", num_classes=9),
        torch.rand(1, 3, 64, 64),
    )
    model.load_state_dict(stock.state_dict())
    assert torch.equal(model(x), stock(x))
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert [level["module"] for level in relayout(model, "1-1-1-6").feature_info][:2] == ["act1", "maxpool"]
    with pytest.raises(InputError, match="stem '5x5' is unknown"):
        create("bmsn_resnet18", stem="5x5")


@torch.no_grad()
def test_supernets_normalise_by_batch_and_walk_all_layouts():
    made = Mixture(SearchSpace("bmsn_resnet18"), 1, num_classes=3, in_chans=1, seed=0)
    supernet, images = made.supernets[0], torch.rand(4, 1, 8, 8)
    assert not any("bn" in key for key in supernet.state_dict())
    walked = list(walk_layouts(supernet, made.space, images))
    assert supernet.layout == "3-2-2-2"
    for index in (0, 17, 55):
        copied = made.extract(made.space[index], 0)
        assert isinstance(copied, RelaidResNet)
        close(copied(images), walked[index])
