"""Folders of the zoo as timm models: those of a small zoo made here, and all that we ship."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from closeness import close
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from small_runs import COMMON, DEFAULT, FOUND, run
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from bmsn_zoo import InputError, Layout, model_folder
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.config import shipped_folder
from bmsn_zoo.model_folder import MODEL_FILES, add, load_model, save_model
from bmsn_zoo.models.found import _register_all, register_folder
from bmsn_zoo.results import SearchResult, TrainResult

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(file.parent.name for file in shipped_folder("hub_configs").glob("*/config.json"))
each_model = pytest.mark.parametrize("name", [FOUND, DEFAULT, *SHIPPED])
# the others are of the same class
each_kind = pytest.mark.parametrize(
    "name", [FOUND, SHIPPED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (DEFAULT, *SHIPPED[1:]))]
)


@pytest.fixture
def folder(name, runs):
    return shipped_folder("hub_configs") / name if name in SHIPPED else runs.zoo / name


def images(model, batch=2):
    return torch.randn(batch, *model.pretrained_cfg["input_size"])


@each_model
def test_a_folder_is_a_timm_model(name, folder):
    assert name in timm.list_models("bmsn_*")
    assert name in timm.list_models("bmsn_*", pretrained=True)
    assert name in timm.list_pretrained("bmsn_resnet20_*")
    model = timm.create_model(name, pretrained=True).eval()  # the tests run with HF_HUB_OFFLINE=1
    same = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(model(x), same(x))
    state, stored = model.state_dict(), load_file(folder / "model.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key], stored[key]) for key in stored)
    assert not torch.equal(timm.create_model(name).fc.weight, model.fc.weight)

    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == model.pretrained_cfg["architecture"] == "bmsn_resnet20"
    assert model.layout == str(Layout.parse(config["model_args"]["layout"]))
    assert len(config["label_names"]) == config["num_classes"] == model.num_classes
    assert list(model.pretrained_cfg["label_names"]) == config["label_names"]
    assert model.pretrained_cfg["hf_hub_id"] == config["pretrained_cfg"]["hf_hub_id"] == f"bmsn-zoo/{name}"


@each_model
def test_the_layout_is_fixed_and_everything_else_is_not(name, folder):
    layout = timm.create_model(name).layout
    other = "1-1-8" if layout != "1-1-8" else "8-1-1"
    for same in (layout, Layout.parse(layout), list(Layout.parse(layout).units_per_scale)):
        assert timm.create_model(name, layout=same).layout == layout
    with pytest.raises(InputError, match=f"has the layout {layout}, not {other}: use bmsn_resnet20"):
        timm.create_model(name, layout=other)

    stored = load_file(folder / "model.safetensors")
    model = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1, drop_rate=0.5, global_pool="max")
    assert (model.fc.out_features, model.drop_rate, model.conv1.in_channels) == (7, 0.5, 1)
    # gray images are as bright as colour ones whose channels are equal
    close(model.conv1.weight, stored["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(model.blocks[8].conv2.weight, stored["blocks.8.conv2.weight"])
    assert model.pretrained_cfg["num_classes"] == 7
    assert "label_names" not in model.pretrained_cfg
    assert timm.create_model(name, pretrained=True, num_classes=0)(images(model)).shape == (2, 64)
    assert timm.create_model(name, pretrained_cfg_overlay={"crop_pct": 0.5}).pretrained_cfg["crop_pct"] == 0.5
    with pytest.raises(TypeError, match="nothing"):
        timm.create_model(name, nothing=1)


@each_kind
def test_contract(name, folder):
    """What timm's own tests ask; test_timm_contract.py asks more, of every name that is registered when it starts."""
    model = timm.create_model(name, pretrained=True).eval()
    x = images(model)
    logits, features = model(x), model.forward_features(x)
    assert features.shape == (2, model.num_features, *model.default_cfg["pool_size"])
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, features)
    for feature_cls in (None, "getter", "hook", "fx"):
        kwargs = dict(feature_cls=feature_cls) if feature_cls else {}
        backbone = timm.create_model(name, pretrained=True, features_only=True, **kwargs).eval()
        assert all(torch.equal(a, b) for a, b in zip(backbone(x), maps, strict=True))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(timm.create_model(name, pretrained=True, scriptable=True).eval()), buffer)
    buffer.seek(0)
    close(torch.jit.load(buffer)(x), logits)
    node = get_graph_node_names(model)[1][-1]
    assert torch.equal(create_feature_extractor(model, return_nodes=[node])(x)[node], logits)
    trained = timm.create_model(name, num_classes=42).train()
    trained(x).mean().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)


@each_kind
def test_transformers_loads_a_folder(name, folder):
    transformers = pytest.importorskip("transformers")
    assert json.loads((folder / "config.json").read_text())["model_args"] == {"layout": timm.create_model(name).layout}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8))
    model = timm.create_model(name, pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    expected = model(timm.data.create_transform(**data)(image).unsqueeze(0)).softmax(1)[0]
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder)
    x = images(model)
    assert torch.equal(wrapped(x).logits, model(x))
    assert [wrapped.config.id2label[index] for index in range(model.num_classes)] == list(
        model.pretrained_cfg["label_names"]
    )
    best = transformers.pipeline("image-classification", model=str(folder))(image)[0]
    assert best["label"] == model.pretrained_cfg["label_names"][expected.argmax()]
    close(best["score"], expected.max())


def test_transformers_loads_gray_networks(runs, tmp_path):
    transformers = pytest.importorskip("transformers")
    overlay = dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.2,))
    model = timm.create_model("bmsn_resnet20", num_classes=4, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    save_model(tmp_path, model, list("abcd"), TrainResult.read(runs.found / "metrics.json"))
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(wrapped(x).logits, model(x))
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


def test_config_of_earlier_folders_is_taken_and_mended(runs, tmp_path, monkeypatch):
    """Before, config.json repeated classes, channels and pool among the arguments of the model."""
    run = tmp_path / "run"
    shutil.copytree(runs.found, run)
    config = json.loads((run / "model" / "config.json").read_text())
    config["model_args"] |= {"num_classes": config["num_classes"], "in_chans": 3, "global_pool": "avg"}
    (run / "model" / "config.json").write_text(json.dumps(config))
    x = torch.rand(2, 3, 16, 16)
    expected = load_model(runs.found / "model")(x)
    assert torch.equal(load_model(run / "model")(x), expected)
    shutil.copytree(run / "model", tmp_path / "bmsn_resnet20_earlier")
    register_folder(tmp_path / "bmsn_resnet20_earlier")
    assert torch.equal(timm.create_model("bmsn_resnet20_earlier", pretrained=True).eval()(x), expected)
    written = run / "model" / "model.onnx"  # to export the same weights again takes seconds
    monkeypatch.setattr(model_folder, "export_onnx", lambda model, path, names: shutil.copy(written, path))
    added = add(run, "bmsn_resnet20_mended", zoo=tmp_path / "zoo")
    assert json.loads((added / "config.json").read_text())["model_args"] == {"layout": config["model_args"]["layout"]}


@each_model
def test_the_hub_wins_over_the_folder_when_asked(name, folder, monkeypatch):
    def where(**kwargs):
        cfg = timm.create_model(name, **kwargs).pretrained_cfg
        return cfg["hf_hub_id"], cfg.get("file")

    assert where() == (f"bmsn-zoo/{name}", str(folder / "model.safetensors"))
    assert where(hub_org="mine") == (f"mine/{name}", None)
    monkeypatch.setenv("BMSN_ZOO_HUB_ORG", "ours")
    assert where() == (f"ours/{name}", None)
    assert where(hub_org="mine") == (f"mine/{name}", None)


@pytest.mark.skipif(not hasattr(timm.models._builder, "_init_model_traits"), reason="timm before 1.0.31 saves less")
def test_a_copy_saved_by_timm_keeps_its_layout(runs, tmp_path):
    model = timm.create_model(FOUND, pretrained=True, num_classes=7).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(again(x), model(x))


def test_weights_may_be_on_the_hub_alone(runs, tmp_path):
    copy = tmp_path / "bmsn_resnet20_remote"
    copy.mkdir()
    (copy / "config.json").write_text((runs.zoo / FOUND / "config.json").read_text())
    register_folder(copy)
    assert copy.name in timm.list_models(pretrained=True)
    assert timm.create_model(copy.name).pretrained_cfg.get("file") is None


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "resnet18"},
        {"architecture": ["bmsn_resnet20"]},
        {"model_args": {"layout": "4-3-4"}},
        {"model_args": {"layout": [-4, 7, 7]}},
        {"model_args": {"layout": [[4], 3, 3]}},
        {"model_args": {}},
        {"model_args": 3},
        {"pretrained_cfg": {"surprise": 1}},
        {"num_classes": None, "label_names": None, "pretrained_cfg": None},
    ],
)
def test_a_folder_that_is_not_ours_is_refused(change, runs, tmp_path):
    config = {**json.loads((runs.zoo / FOUND / "config.json").read_text()), **change}
    copy = tmp_path / "bmsn_resnet20_bad"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is not the folder of a found model"):
        register_folder(copy)
    assert copy.name not in timm.list_models()


def test_a_broken_folder_does_not_break_the_import(tmp_path, monkeypatch):
    (tmp_path / "bmsn_resnet20_bad").mkdir()
    (tmp_path / "bmsn_resnet20_bad" / "config.json").write_text("{")
    monkeypatch.setattr("bmsn_zoo.models.found.shipped_folder", lambda name: tmp_path)
    with pytest.warns(UserWarning, match="bmsn_resnet20_bad"):
        _register_all()


# what a folder holds


@each_model
def test_a_folder_is_whole_and_says_nothing_of_its_machine(name, folder, runs):
    present = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "model.onnx", "metrics.json", "README.md"} <= present <= {*MODEL_FILES}
    load_model(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == metrics["test_accuracy"]
    assert "fraction of 1" in result.metric_name
    assert f"{100 * metrics['test_accuracy']:.2f} %" in card.text
    for file in folder.iterdir():
        content = file.read_bytes()
        for path in (runs.base, ROOT, Path.home(), Path(sys.prefix), Path(torch.__file__).parent):
            assert str(path).encode() not in content, f"{file} names {path}"
    for file in ("metrics.json", "search.json", "README.md"):
        text = (folder / file).read_text() if file in present else ""
        assert "/tmp/" not in text
        assert "../" not in text


def test_a_resnet_of_timm_is_searched_trained_and_becomes_a_model_of_the_zoo(tmp_path, image_folder):
    search, train, zoo = (tmp_path / name for name in ("search", "train", "zoo"))
    model = ["--model", "test_resnet.r160_in1k"]
    data = ["--dataset", image_folder, *COMMON]
    small = ["--default-layout", "2-2", "--mixture-size", 2]
    assert run(search_module, *data, *model, *small, "--output", search) == 0
    found = SearchResult.read(search / "search.json")
    assert found.layouts == ["1-3", "2-2", "3-1"]
    assert found.model == model[1]
    assert run(train_module, "--from-search", search, "--pick", "3-1", *COMMON, "--output", train) == 0
    network = load_model(train / "model")
    assert (type(network).__name__, network.layout) == ("RelaidResNet", "3-1")
    cfg = network.pretrained_cfg
    assert cfg["crop_pct"] == 1.0
    assert not {"tag", "test_input_size", "hf_hub_id", "url"} & {key for key, value in cfg.items() if value}

    shutil.copytree(train / "model", zoo / "bmsn_compass_of_timm")
    register_folder(zoo / "bmsn_compass_of_timm")
    same, x = timm.create_model("bmsn_compass_of_timm", pretrained=True).eval(), images(network)
    assert torch.equal(same(x), network(x))
    with pytest.raises(InputError, match="has the layout 3-1, not 2-2"):
        timm.create_model("bmsn_compass_of_timm", layout="2-2")
