"""What timm's own tests ask of a model, of every name that we register (and generic names with several layouts)."""

import importlib.util
import io
import itertools

import pytest
import timm
import timm.utils.onnx
import torch
from closeness import close
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import bmsn_zoo
from bmsn_zoo.export import require_onnx

NAMES = timm.list_models("bmsn_*", include_tags=True)
OTHER_LAYOUTS = {
    "bmsn_resnet20": ["1-1-8", "8-1-1", "3-3-2-2"],
    "bmsn_resnet18": ["1-1-2-5"],
    "bmsn_resnet50": [],
    "bmsn_relaid": ["1-2-4-1"],
}
CASES = [(name, None) for name in NAMES] + [(name, v) for name in OTHER_LAYOUTS for v in OTHER_LAYOUTS[name]]
EXPORTED = [(name, None) for name in NAMES if name not in ("bmsn_resnet18", "bmsn_resnet50", "bmsn_relaid")]
EXPORTED += [("bmsn_resnet20", "8-1-1"), ("bmsn_resnet18", "1-1-2-5"), ("bmsn_relaid", "1-2-4-1")]
# of every kind of network one; the others are of the same classes
FAST = [("bmsn_resnet20", "3-3-2-2"), ("bmsn_resnet18", None), ("bmsn_relaid", "1-2-4-1")]


def each(cases, fast):
    """A test for each of some cases; those that are not fast are for CI."""
    values = [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize(("name", "layout"), values, ids=lambda value: str(value or "default"))


each_case = each(CASES, FAST)
each_export = each(EXPORTED, [("bmsn_resnet20", None)])  # exporting takes seconds
FEATURES = [(None, None), (None, (0, 2)), (None, (-1,))]
FEATURES += [("getter", (0, 2)), ("hook", None), ("fx", (-1,)), ("dict", None)]


def create(name, layout=None, **kwargs):
    """The model with weights that depend on nothing but the arguments, in evaluation mode."""
    if layout is not None:
        kwargs["layout"] = layout
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: no two channels are alike
            spread = torch.linspace(-0.5, 0.5, module.num_features)
            module.load_state_dict(
                dict(weight=1 + spread, bias=spread, running_mean=-spread, running_var=1 - spread), strict=False
            )
    return model


def blocks(model):
    """The residual blocks in order; the names of timm's ResNets number them by stage."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    return [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]


def stem_units(name):
    return int(name not in ("bmsn_resnet50", "bmsn_relaid"))


def side(model, pixels, reduction):
    """Side of a map: pools drop an odd last row, strides keep it."""
    return pixels // reduction if hasattr(model, "blocks") else -(-pixels // reduction)


def images(model, batch=2, size=None):
    channels, *default = model.default_cfg["input_size"]
    return torch.randn(batch, channels, *(size or default))


def test_names_are_ours_alone():
    assert "bmsn_resnet20" in timm.list_models("bmsn_*")
    for name in timm.list_models("bmsn_*"):
        assert timm.model_entrypoint(name).__module__.startswith("bmsn_zoo.")
    for label in {timm.model_entrypoint(name).__module__.split(".")[-1] for name in timm.list_models("bmsn_*")}:
        assert importlib.util.find_spec(f"timm.models.{label}") is None
        assert all(name.startswith("bmsn_") for name in timm.list_models(module=label))


def test_generic_names_are_the_backbones():
    assert set(OTHER_LAYOUTS) == {*bmsn_zoo.BACKBONES, "bmsn_relaid"}
    assert set(OTHER_LAYOUTS) <= set(timm.list_models("bmsn_*"))


@each_case
def test_forward_and_gradient_checkpointing(name, layout):
    model = create(name, layout)
    x = images(model)
    expected = model(x)
    assert expected.shape == (2, model.num_classes)
    assert expected.isfinite().all()
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]

    runs = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: runs.append(1))
    model.zero_grad()
    model.set_grad_checkpointing()
    output = model(x)
    close(output, expected)
    before = len(runs)
    output.square().sum().backward()
    assert len(runs) > before, "nothing was recomputed"
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        close(parameter.grad, gradient)
    model.set_grad_checkpointing(False)
    runs.clear()
    model(x).sum().backward()
    assert len(runs) == before


@each_case
def test_backward_reaches_every_parameter(name, layout):
    model = create(name, layout, num_classes=42).train()
    output = model(images(model))
    output.mean().backward()
    assert output.shape == (2, 42)
    assert model.num_classes == 42
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@each_case
def test_default_cfg_agrees_with_the_model(name, layout):
    model = create(name, layout)
    cfg, state, x = model.default_cfg, model.state_dict(), images(model)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(x))

    assert not any(isinstance(value, list) for value in cfg.values()), "timm has tuples"
    assert ((2,) + cfg["input_size"])[1:] == x.shape[1:]
    assert cfg["num_classes"] == model.num_classes
    assert f"{cfg['classifier']}.weight" in state
    assert model.get_classifier(name_only=True) == cfg["classifier"]
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]
    assert cfg["license"]
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]
    assert data["crop_pct"] == (0.95 if name == "bmsn_relaid" else 1.0)


@each_case
def test_classifier_can_be_removed_and_replaced(name, layout):
    model = create(name, layout)
    x = images(model)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    assert model.num_classes == model.get_classifier().out_features == 7
    model.reset_classifier(7, "max")
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)))

    state = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    for global_pool, expected in (("avg", pooled), ("", features)):
        headless = create(name, layout, num_classes=0, global_pool=global_pool)
        headless.load_state_dict(state)
        assert torch.equal(headless(x), expected)


@each_case
@pytest.mark.parametrize("size", [(32, 32), (17, 17), (40, 64), (33, 20)], ids=str)
def test_other_image_sizes(name, layout, size):
    model = create(name, layout)
    last = model.feature_info[-1]
    reduction = last["reduction"] if isinstance(last, dict) else model.feature_info.reduction()[-1]
    x = images(model, size=size)
    assert model.forward_features(x).shape[2:] == tuple(side(model, pixels, reduction) for pixels in size)
    assert model(x).isfinite().all()


@each_case
def test_gray_images_and_one_at_a_time(name, layout):
    model = create(name, layout, in_chans=1)
    x = torch.randn(3, 1, 32, 32)
    assert model.conv1.in_channels == 1
    close(torch.cat([model(one) for one in x.split(1)]), model(x))


@each_case
def test_channels_last_and_dropout(name, layout):
    model = create(name, layout, drop_rate=0.9)
    x = images(model)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    close(model(x.to(memory_format=torch.channels_last)), expected)
    features = model.forward_features(x)
    model.train()
    assert (model.forward_head(features, pre_logits=True) == 0).float().mean() > 0.5


# feature maps


@each_case
@pytest.mark.parametrize(
    ("feature_cls", "out_indices"),
    [
        pytest.param(*case, marks=[] if case in FEATURES else pytest.mark.slow)
        for case in itertools.product([None, "getter", "hook", "dict", "fx"], [None, (0, 2), (-1,)])
    ],
    ids=str,
)
def test_features_only(name, layout, feature_cls, out_indices):
    plain = create(name, layout)
    levels = len(plain.feature_info)
    taken = range(levels) if out_indices is None else [index % levels for index in out_indices]
    extra = {} if out_indices is None else dict(out_indices=out_indices)
    extra |= {} if feature_cls is None else dict(feature_cls=feature_cls)
    model = create(name, layout, features_only=True, **extra)
    for size in (32, 33):
        x = images(plain, size=(size, size))
        maps = model(x)
        if isinstance(maps, dict):
            maps = list(maps.values())
        real = [plain.forward_intermediates(x, intermediates_only=True)[index] for index in taken]
        assert len(maps) == len(taken)
        for level, (found, expected) in enumerate(zip(maps, real, strict=True)):
            assert torch.equal(found, expected)
            assert model.feature_info.channels()[level] == found.shape[1]
            assert side(plain, size, model.feature_info.reduction()[level]) == found.shape[2] == found.shape[3]


@each_case
def test_feature_info_starts_at_full_resolution_and_follows_the_layout(name, layout):
    info = create(name, layout, features_only=True).feature_info
    units = bmsn_zoo.Layout.parse(create(name, layout).layout)
    channels = bmsn_zoo.BACKBONES[name].channels if name in bmsn_zoo.BACKBONES else None
    stem = [2, 4] if name == "bmsn_relaid" else [1]  # whose pool comes before the first unit
    assert info.reduction() == stem[:-1] + [stem[-1] * 2**scale for scale in range(units.num_scales)]
    if channels:
        ends = itertools.accumulate(units.units_per_scale)
        assert info.channels() == [channels[end - 1] for end in ends]


@each_case
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forward_intermediates(name, layout, checkpointing):
    model = create(name, layout)
    x = images(model)
    features = model.forward_features(x)
    model.set_grad_checkpointing(checkpointing)
    final, maps = model.forward_intermediates(x, output_fmt="NCHW")
    close(final, features)
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == info["num_chs"]
        assert found.shape[2] == side(model, x.shape[2], info["reduction"])
    assert torch.equal(maps[-1], final)
    for indices in (1, 2, [0], [0, 2], [1], (-1,)):
        chosen = range(len(maps))[-indices:] if isinstance(indices, int) else [i % len(maps) for i in indices]
        final, some = model.forward_intermediates(x, indices=indices)
        close(final, features)
        assert len(some) == len(chosen)
        alone = model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)
        for found, again, index in zip(some, alone, chosen, strict=True):
            assert torch.equal(found, again)
            close(found, maps[index])
    with pytest.raises((ValueError, AssertionError)):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises((ValueError, IndexError, AssertionError)):
        model.forward_intermediates(x, indices=[len(maps)])


@each_case
def test_stop_early_runs_no_later_unit(name, layout):
    model = create(name, layout)
    runs = []
    for block in blocks(model):
        block.register_forward_hook(lambda block, *_: runs.append(block))
    x = images(model)
    level = 1 if name == "bmsn_relaid" else 0  # after the stem
    model.forward_intermediates(x, indices=[level], stop_early=True)
    assert len(runs) == bmsn_zoo.Layout.parse(model.layout).units_per_scale[0] - stem_units(name)
    runs.clear()
    model.forward_intermediates(x, indices=[level])
    assert len(runs) == len(blocks(model))


@each_case
@pytest.mark.parametrize("indices", [1, 2, [0], [0, 1], [-2]], ids=str)
def test_prune_intermediate_layers(name, layout, indices):
    model = create(name, layout)
    x = images(model)
    levels = len(model.feature_info)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    before, levels_before_units = len(blocks(model)), levels - bmsn_zoo.Layout.parse(model.layout).num_scales
    units = bmsn_zoo.Layout.parse(model.layout).units_per_scale
    kept = model.prune_intermediate_layers(indices, prune_head=True)
    assert kept == (list(range(levels))[-indices:] if isinstance(indices, int) else [i % levels for i in indices])
    last = sum(units[: max(kept) + 1 - levels_before_units])
    assert len(blocks(model)) == max(0, last - stem_units(name)) <= before
    assert not any(p.ndim == 2 for p in model.parameters()), "the head is still there"
    found = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_prune_can_keep_the_head():
    model = create("bmsn_resnet20")
    x = images(model)
    expected = model(x)
    model.prune_intermediate_layers([2], prune_head=False)
    assert torch.equal(model(x), expected)


# other programs that read or write the network


@each_case
def test_torchscript(name, layout):
    model = create(name, layout, scriptable=True, num_classes=7)
    x = images(model)
    expected = model(x)
    scripted = torch.jit.script(model)
    close(scripted(x), expected)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    close(torch.jit.load(buffer)(x), expected)


@each_case
def test_fx_forward_backward_and_script(name, layout):
    model = create(name, layout)
    x = images(model)
    expected = model(x)
    _, nodes = get_graph_node_names(model)
    extractor = create_feature_extractor(model, return_nodes=[nodes[-1]])
    output = extractor(x)[nodes[-1]]
    assert torch.equal(output, expected)
    close(torch.jit.script(extractor)(x)[nodes[-1]], expected)
    output.mean().backward()
    assert all(p.grad is not None for p in extractor.parameters())
    assert len(list(extractor.parameters())) == len(list(model.parameters()))


@each_export
def test_torch_export(name, layout):
    model = create(name, layout)
    x = images(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    for batch in (1, 2, 5):
        x = images(model, batch)
        close(program.module()(x), model(x))


@pytest.mark.slow
@each_export
def test_onnx_export(name, layout, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    try:
        require_onnx()
    except bmsn_zoo.InputError as error:
        pytest.skip(str(error))
    model = create(name, layout)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (images(model),),
        file,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = images(model, batch)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        close(logits, model(x))


@each_export
def test_what_timms_scripts_call(name, layout, tmp_path):
    """Beside what is tested here: of train.py, validate.py, benchmark.py, onnx_export.py and avg_checkpoints.py."""
    model = create(name, layout, device="cpu", dtype=torch.float, exportable=True)
    x = torch.randn((2,) + timm.data.resolve_data_config({}, model=model, use_test_size=True)["input_size"])
    expected = model(x)

    saver = timm.utils.CheckpointSaver(model, create_optimizer_v2(model, lr=0.1), checkpoint_dir=str(tmp_path))
    for epoch in range(3):
        saver.save_checkpoint(epoch, metric=epoch)
    states = [timm.models.load_state_dict(str(file)) for file in tmp_path.glob("checkpoint-*")]
    mean = {key: (sum(state[key].double() for state in states) / len(states)).float() for key in states[0]}
    torch.save(mean, tmp_path / "averaged.pth")
    again = create(name, layout, checkpoint_path=str(tmp_path / "averaged.pth"))
    close(again(x), expected)
    again.reset_classifier(0)
    timm.models.load_checkpoint(again, str(tmp_path / "averaged.pth"), strict=False)

    pytest.importorskip("onnx")
    timm.utils.onnx.onnx_export(model, str(tmp_path / "model.onnx"), batch_size=2)
    x = images(model)
    expected, larger = model(x), (3, 2 * x.shape[2], 2 * x.shape[3])
    pooled, applied = timm.layers.apply_test_time_pool(model, dict(input_size=larger))
    assert applied
    assert pooled(torch.randn(2, *larger)).shape == expected.shape
    close(pooled(x), expected)


@each_case
def test_layer_decay_grows_from_stem_to_head(name, layout):
    model = create(name, layout)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in scale
            scale[id(parameter)], decay[id(parameter)] = group["lr_scale"], group["weight_decay"]
    of = {key: scale[id(parameter)] for key, parameter in model.named_parameters()}
    first = {id(module): f"{key}.weight" for key, module in model.named_modules()}
    depth = [of["conv1.weight"], *(of[first[id(block.conv1)]] for block in blocks(model)), of["fc.weight"]]
    assert depth == sorted(set(depth))
    assert of["bn1.weight"] == of["conv1.weight"]
    assert of["fc.weight"] == 1.0
    for key, parameter in model.named_parameters():
        assert (decay[id(parameter)] > 0) == (parameter.ndim > 1), key


@each_case
def test_group_matcher_covers_every_parameter(name, layout):
    model = create(name, layout)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
        stages = 1 if hasattr(model, "blocks") else 4
        assert len(groups) == (stages if coarse else len(blocks(model))) + 2
