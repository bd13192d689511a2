import itertools

import pytest
import safetensors.torch
import timm
import torch
from closeness import close
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bmsn_zoo import InputError, Layout, PoolingResNet, SearchSpace

SPACE = SearchSpace("bmsn_resnet20")


def create(layout="4-3-3", **kwargs):
    return timm.create_model("bmsn_resnet20", layout=layout, **kwargs)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_weights_have_the_same_names_and_shapes_for_every_layout():
    for searchable in (False, True):
        expected = shapes(create(searchable=searchable))
        assert all(shapes(create(layout, searchable=searchable)) == expected for layout in SPACE)


def test_every_layout_computes_something_else():
    x = torch.randn(2, 3, 32, 32)
    state, outputs = create(searchable=True).state_dict(), []
    for layout in SPACE:
        model = create(layout, searchable=True)
        model.load_state_dict(state)
        outputs.append(model(x))
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))


def plain_resnet20(state, layout, x):
    """The network as the paper describes it, from nothing but weights and a layout."""

    def conv(x, name):
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, padding=weight.shape[2] // 2)

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, weight, bias)

    x = functional.relu(norm(conv(x, "conv1"), "bn1"))
    for index in range(9):
        name = f"blocks.{index}"
        if layout.flags[index + 1]:
            x = functional.max_pool2d(x, 2)
        out = functional.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
        out = norm(conv(out, f"{name}.conv2"), f"{name}.bn2")
        widens = f"{name}.shortcut.0.weight" in state
        x = functional.relu(out + (norm(conv(x, f"{name}.shortcut.0"), f"{name}.shortcut.1") if widens else x))
    return functional.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("layout", ["1-1-8", "4-3-3", "5-3-2", "8-1-1", "3-3-2-2"])
def test_network_is_the_published_one(layout):
    model = create(layout).eval()
    for name, tensor in model.state_dict().items():
        if "bn" in name or "shortcut.1" in name:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    x = torch.randn(2, 3, 32, 32)
    close(model(x), plain_resnet20(model.state_dict(), Layout.parse(layout), x))


def test_each_unit_works_at_the_resolution_of_its_layout():
    sides = []
    for layout in (SPACE[0], SPACE[17], SPACE[-1]):
        model = create(layout).eval()
        for unit in (model.act1, *model.blocks):
            unit.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
        sides.clear()
        model(torch.zeros(1, 3, 32, 32))
        assert tuple(sides) == layout.resolutions(32)


@pytest.mark.parametrize("layout", ["5-3-2", "5,3,2", (5, 3, 2), [5, 3, 2]], ids=repr)
def test_layout_in_every_form(layout):
    assert create(layout).layout == "5-3-2"


def test_default_layout():
    assert timm.create_model("bmsn_resnet20").layout == "4-3-3"


@pytest.mark.parametrize(
    ("layout", "message"),
    [("5-3-3", "sums to 11"), ("5-0-5", "has 0"), ("", "''"), ([5.0, 3, 2], "whole number"), ("best", "5-3-2")],
    ids=repr,
)
def test_bad_layout(layout, message):
    with pytest.raises(InputError, match=message):
        create(layout)


# weights of another layout


def test_state_dict_of_another_layout_is_refused():
    source, target = create("5-3-2"), create("4-3-3")
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(InputError, match=r"belong to layout 5-3-2.*has layout 4-3-3.*layout='5-3-2'"):
            target.load_state_dict(source.state_dict(), strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    with pytest.raises(InputError, match="belong to layout 5-3-2"):
        nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict())
    with pytest.raises(InputError, match="belong to layout 5-5"):
        target.load_state_dict(create("5-5").state_dict())


def test_weights_without_a_layout_are_refused():
    state = create().state_dict()
    del state["layout_units"]
    with pytest.raises(RuntimeError, match="layout_units"):
        create().load_state_dict(state)


@pytest.fixture
def checkpoint(tmp_path):
    """A network of layout 5-3-2 and its weights on disk."""
    model = create("5-3-2").eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    return model, str(file)


def test_checkpoint_of_the_same_layout_loads_through_timm(checkpoint):
    model, file = checkpoint
    x = torch.randn(2, 3, 32, 32)
    created = create("5-3-2", checkpoint_path=file).eval()
    loaded = create("5-3-2").eval()
    timm.models.load_checkpoint(loaded, file)
    assert torch.equal(created(x), model(x))
    assert torch.equal(loaded(x), model(x))


def test_checkpoint_of_another_layout_is_refused_through_timm(checkpoint):
    _, file = checkpoint
    with pytest.raises(InputError, match="belong to layout 5-3-2, the network has layout 4-3-3"):
        create("4-3-3", checkpoint_path=file)
    with pytest.raises(InputError, match="belong to layout 5-3-2, the network has layout 7-1-2"):
        timm.models.load_checkpoint(create("7-1-2"), file)
    with pytest.raises(InputError, match="belong to layout 5-3-2"):
        timm.create_model("bmsn_resnet20", checkpoint_path=file)


def averages():
    """Weights of two networks of layout 5-3-2 averaged in every way that torch, timm and users' scripts do it."""
    first, second = create("5-3-2"), create("5-3-2")
    for name, average in dict(swa={}, ema=dict(multi_avg_fn=get_ema_multi_avg_fn(0.9))).items():
        averaged = AveragedModel(first, use_buffers=True, **average)
        for network in [first, second] * 20:
            averaged.update_parameters(network)
        yield name, averaged.module.state_dict()
    ema = timm.utils.ModelEmaV3(first, decay=0.9)
    for step in range(20):
        ema.update(second, step)
    yield "timm", ema.module.state_dict()
    a, b = first.state_dict(), second.state_dict()
    yield "files", {key: ((a[key].double() * 3 + b[key].double() * 4) / 7).float() for key in a}
    yield "whole numbers", {**a, "layout_units": torch.tensor([5, 3, 2])}  # as we saved them once
    for dtype in (torch.half, torch.bfloat16, torch.double):
        yield str(dtype), create("5-3-2").to(dtype).state_dict()


@pytest.mark.parametrize(("way", "state"), averages(), ids=lambda value: value if isinstance(value, str) else "")
def test_layout_survives_averages_and_casts(way, state):
    model = create("5-3-2")
    model.load_state_dict(state)
    assert model.layout_units.tolist() == [5, 3, 2]
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float())
    with pytest.raises(InputError, match=r"belong to layout 5-3-2.*has layout 4-3-3.*layout='5-3-2'"):
        create("4-3-3").load_state_dict(state)


@pytest.mark.parametrize("others", [1, 2, 9])
def test_average_of_different_layouts_is_refused(others):
    states = [create("5-3-2").state_dict()] + others * [create("4-3-3").state_dict()]
    mean = {key: sum(state[key].double() for state in states).div(others + 1).float() for key in states[0]}
    for layout in ("5-3-2", "4-3-3"):
        with pytest.raises(InputError, match="average weights of one layout alone"):
            create(layout).load_state_dict(mean)


# what timm 1.0.31 asks of its own networks


@pytest.mark.parametrize("searchable", [False, True])
def test_device_and_dtype_are_those_asked_for(searchable):
    model = create(dtype=torch.bfloat16, searchable=searchable)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    empty = create(device="meta", dtype=torch.half, searchable=searchable)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert empty(torch.empty(2, 3, 32, 32, device="meta", dtype=torch.half)).shape == (2, 10)


def test_new_classifier_has_the_networks_type_and_mode_and_keeps_the_pool():
    model = create(global_pool="max").to(torch.double).eval()
    model.bn1.train()
    model.reset_classifier(7)
    assert model.fc.weight.dtype == torch.double
    assert model.bn1.training
    assert not any(module.training for head in (model.global_pool, model.fc) for module in head.modules())
    features = torch.rand(2, 64, 8, 8, dtype=torch.double)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(0, "")
    with pytest.raises(InputError, match=r"global_pool='' keeps the map.*num_classes=0"):
        model.reset_classifier(7)
    assert torch.equal(model.forward_head(features), features)
    empty = create(device="meta")
    empty.reset_classifier(3)
    assert empty.fc.weight.is_meta


@pytest.mark.parametrize(("pool", "width"), [("avg", 64), ("catavgmax", 128), ("avgmax", 64)])
def test_head_is_as_wide_as_its_pool_makes_it(pool, width):
    for model in (create(global_pool=pool), create()):
        model.reset_classifier(5, pool)
        x = torch.zeros(2, 3, 32, 32)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
        assert model.head_hidden_size == width == model.fc.in_features
        model.prune_intermediate_layers([0], prune_head=False)
        assert (model.num_features, model.num_classes) == (16, 0)
        assert model(x).shape == (2, 16, 32, 32)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape[1] == model.head_hidden_size
        model.reset_classifier(5, pool)
        assert model(x).shape == (2, 5)
        assert model.head_hidden_size == width // 4


def test_map_without_a_pool_has_no_classifier():
    for classes in (dict(), dict(num_classes=3)):
        with pytest.raises(InputError, match=r"global_pool='' keeps the map.*such as avg"):
            create(global_pool="", **classes)
    assert create(global_pool="", num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)


@pytest.mark.parametrize("act_layer", ["silu", nn.SiLU])
def test_other_activations(act_layer):
    model = create(act_layer=act_layer).eval()
    assert {type(m) for name, m in model.named_modules() if "act" in name.split(".")[-1]} == {nn.SiLU}
    model(torch.rand(2, 3, 32, 32)).sum().backward()


def test_labels_of_other_classes_are_forgotten():
    names = tuple(f"class {index}" for index in range(10))
    overlay = dict(num_classes=10, label_names=names)
    assert create(pretrained_cfg_overlay=overlay).pretrained_cfg["label_names"] == names
    reset = create(pretrained_cfg_overlay=overlay)
    reset.reset_classifier(5)
    for model in (reset, create(pretrained_cfg_overlay=overlay, num_classes=5)):
        assert model.default_cfg is model.pretrained_cfg
        assert model.pretrained_cfg["num_classes"] == 5
        assert "label_names" not in model.pretrained_cfg


@pytest.mark.skipif(not hasattr(timm.models._builder, "_init_model_traits"), reason="timm before 1.0.31 saves less")
def test_timm_saves_a_network_whatever_its_layout_was_written_as(tmp_path):
    for layout in (Layout((5, 3, 2)), [5, 3, 2], "5-3-2"):
        model = create(layout, num_classes=4).eval()
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = torch.rand(2, 3, 32, 32)
        assert again.layout == "5-3-2"
        assert torch.equal(again(x), model(x))


# supernets


def test_supernet_takes_any_layout_in_any_order():
    supernet = create(searchable=True)
    x = torch.randn(4, 3, 32, 32)
    weights = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    for layout in ("8-1-1", "1-1-8", "3-3-2-2", "5-3-2", "4-3-3"):
        supernet.set_layout(layout)
        fresh = create(layout, searchable=True)
        fresh.load_state_dict(weights)
        assert supernet.layout == layout
        assert supernet.feature_info == fresh.feature_info
        assert torch.equal(supernet(x), fresh(x))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in supernet.state_dict().items())


def test_supernet_normalises_with_the_batch_at_hand():
    supernet = create(searchable=True)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(supernet.train()(x), supernet.eval()(x))
    assert not torch.allclose(supernet(x)[:2], supernet(x[:2]), atol=1e-3)
    assert not list(supernet.buffers())
    assert not any("bn" in name for name, _ in supernet.named_parameters())


def test_fixed_network_uses_learned_statistics():
    model = create().train()
    x = 3 * torch.randn(8, 3, 32, 32) + 1
    before = model.bn1.running_mean.clone()
    model(x)
    assert not torch.equal(model.bn1.running_mean, before)
    model.eval()
    close(model(x)[:1], model(x[:1]))
    assert all(module.affine for module in model.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("layout", ["5-3-3", "5-0-5", "best", None, [], [True] * 10], ids=repr)
def test_supernet_refuses_a_bad_layout_and_keeps_its_own(layout):
    supernet = create(searchable=True)
    x = torch.randn(2, 3, 32, 32)
    before = supernet(x)
    with pytest.raises(InputError):
        supernet.set_layout(layout)
    assert supernet.layout == "4-3-3"
    assert torch.equal(supernet(x), before)


def test_fixed_network_keeps_its_layout():
    model = create("5-3-2")
    for layout in ("4-3-3", "5-3-2"):
        with pytest.raises(RuntimeError, match="fixed layout 5-3-2"):
            model.set_layout(layout)


def test_units_one_by_one_are_the_network():
    supernet = create("5-3-2", searchable=True)
    x = torch.randn(2, 3, 32, 32)
    expected = supernet(x)
    features = x
    for unit, flag in enumerate((0, 0, 0, 0, 0, 1, 0, 0, 1, 0)):
        features = supernet.forward_unit(features, unit, bool(flag))
    assert torch.equal(supernet.forward_head(features), expected)
    supernet.forward_unit(x, 0, False)
    supernet.forward_unit(torch.randn(2, 16, 8, 8), 2, True)  # another layout's
    assert torch.equal(supernet(x), expected)


def test_network_of_any_units():
    model = PoolingResNet((4, 4, 8), "1-2", num_classes=3).eval()
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert model.forward_features(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 4, 4)
    with pytest.raises(InputError, match="the backbone has 3 units"):
        PoolingResNet((4, 4, 8), "4-3-3")
