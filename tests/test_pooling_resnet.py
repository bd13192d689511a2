import itertools

import pytest
import safetensors.torch
import timm
import torch
from closeness import close
from torch import nn
from torch.nn import functional

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
    for buffer in model.buffers():
        if buffer.is_floating_point():
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


def test_layout_survives_casts_and_stays_a_whole_number():
    model = create("5-3-2").half().to(torch.float64).to(memory_format=torch.channels_last)
    assert model.state_dict()["layout_units"].tolist() == [5, 3, 2]
    assert not model.state_dict()["layout_units"].is_floating_point()
    create("5-3-2").double().load_state_dict(model.state_dict())


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


def test_network_of_any_units():
    model = PoolingResNet((4, 4, 8), "1-2", num_classes=3).eval()
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert model.forward_features(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 4, 4)
    with pytest.raises(InputError, match="the backbone has 3 units"):
        PoolingResNet((4, 4, 8), "4-3-3")
