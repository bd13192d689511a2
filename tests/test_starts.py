"""Trainings that start from trained weights: of a run, of the zoo, of the Hub, by us and by timm."""

import json
import shutil

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from small_runs import COMMON, run
from timm.models import save_for_hf

from bmsn_zoo import InputError, hub
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.card import portable, relicense, search_card
from bmsn_zoo.model_folder import load_model
from bmsn_zoo.results import SearchResult, TrainResult, TrialResult
from bmsn_zoo.starts import find_start, start_from, start_from_supernet

STILL = ["--lr", 0, "--weight-decay", 0]
LEARNT_WITHOUT_RATE = ("running_", "num_batches", "layout_units")


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """The run folder of a training of 5-3-2."""
    folder = tmp_path_factory.mktemp("runs") / "found"
    assert run(train_module, "--dataset", image_folder, *COMMON, "--layout", "5-3-2", "--output", folder) == 0
    return folder


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def settings(folder):
    return json.loads((folder / "metrics.json").read_text())["settings"]


def test_a_training_goes_on_from_a_run_in_its_layout_or_another(trained, image_folder, tmp_path):
    base = ["--dataset", image_folder, *COMMON, *STILL, "--init-from", trained, "--license", "mit"]
    for name, given, layout in (("same", [], "5-3-2"), ("other", ["--layout", "2-3-5"], "2-3-5")):
        assert run(train_module, *base, *given, "--output", tmp_path / name) == 0
        assert (settings(tmp_path / name)["layout"], settings(tmp_path / name)["init_from"]) == (layout, str(trained))
        before, after = weights(trained), weights(tmp_path / name)
        same = [key for key in before if not any(part in key for part in LEARNT_WITHOUT_RATE)]
        assert len(same) > 30 and all(torch.equal(before[key], after[key]) for key in same), (
            "its head too: same classes"
        )
    result = TrainResult.read(tmp_path / "same" / "metrics.json")
    assert result.class_images == [8] * 4 and sum(result.class_right) == 32 * result.test_accuracy
    assert sum(images for _, _, images in result.confused) == 32 - sum(result.class_right)
    card = (tmp_path / "same" / "model" / "README.md").read_text(encoding="utf-8")
    assert "started from the weights of `found`" in card and str(trained.parent) not in card
    assert ModelCard(card).data.license == "mit" and "Weights: mit; the code" in card
    own = (trained / "model" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(own).data.license is None and "No licence was named for the weights" in own
    assert relicense(own, "cc0-1.0").count("cc0-1.0") == 2 == relicense(card, "cc0-1.0").count("cc0-1.0")
    assert ModelCard(relicense(card, "cc0-1.0")).data.license == "cc0-1.0"


@pytest.mark.parametrize(
    ("module", "kind", "end", "flags", "written"),
    [
        pytest.param(
            train_module,
            train_module.Training,
            "_describe_epoch",
            ["--init-from"],
            "model/model.safetensors",
            marks=pytest.mark.slow,
        ),
        (
            search_module,
            search_module.OneShotSearch,
            "end_epoch",
            ["--confirm", 0, "--mixture-size", 1, "--no-latency", "--pretrained-from"],
            "supernets.safetensors",
        ),
    ],
    ids=["training", "search"],
)
def test_resumed_runs_need_their_start_no_more(
    module, kind, end, flags, written, trained, image_folder, tmp_path, monkeypatch
):
    source = tmp_path / "source"
    shutil.copytree(trained / "model", source)
    base = ["--dataset", image_folder, *COMMON[:2], "--epochs", 2, "--mixed-precision", "no", *flags, source]
    assert run(module, *base, "--output", tmp_path / "whole") == 0

    def stop(self, epoch, *rest):
        if epoch == 1:
            raise InputError("cut")
        return whole(self, epoch, *rest)

    whole = getattr(kind, end)
    with monkeypatch.context() as patch:
        patch.setattr(kind, end, stop)
        assert run(module, *base, "--output", tmp_path / "cut") != 0
    shutil.rmtree(source)
    assert run(module, "--output", tmp_path / "cut", "--resume") == 0
    assert (tmp_path / "cut" / written).read_bytes() == (tmp_path / "whole" / written).read_bytes()


def test_hub_repositories_are_pinned(server, trained, image_folder, tmp_path):
    files = {file.name: file.read_bytes() for file in (trained / "model").iterdir()}
    server.put("alice/net", files)
    assert (
        run(
            train_module,
            "--dataset",
            image_folder,
            *COMMON,
            *STILL,
            "--init-from",
            "alice/net",
            "--output",
            tmp_path / "a",
        )
        == 0
    )
    assert settings(tmp_path / "a")["init_from"] == f"alice/net@{server.commits('alice/net')[0].sha}"
    assert torch.equal(weights(tmp_path / "a")["fc.weight"], weights(trained)["fc.weight"])
    server.put(
        "alice/pickle",
        {name: files[name] for name in files if name != "model.safetensors"} | {"pytorch_model.bin": b"x"},
    )
    with pytest.raises(InputError, match=r"alice/pickle holds no trained model: model\.safetensors is missing"):
        find_start("alice/pickle")


def test_a_push_names_another_licence_and_leaves_the_folder_alone(server, trained, tmp_path):
    before = (trained / "model" / "README.md").read_bytes()
    assert run(hub, "push", trained, "alice/mine", "--license", "mit") == 0
    pushed = server.files("alice/mine")
    assert ModelCard(pushed["README.md"].decode()).data.license == "mit"
    assert json.loads(pushed["metrics.json"])["license"] == "mit"
    for name, content in pushed.items():
        (tmp_path / name).write_bytes(content)
    assert load_model(tmp_path).layout == "5-3-2", "its record is still that of its weights"
    assert (trained / "model" / "README.md").read_bytes() == before
    with pytest.raises(InputError, match="is no name of the Hub's"):
        hub.push(trained, "alice/mine", license="My own")


@pytest.mark.parametrize(("source", "here"), [(3, 1), (1, 3), (3, 3)])
@torch.no_grad()
def test_stems_are_adapted_as_timm_does_and_heads_of_other_classes_stay_fresh(source, here, tmp_path):
    name = "test_resnet"
    stock = timm.create_model(name, num_classes=4, in_chans=source)
    save_for_hf(stock, str(tmp_path), safe_serialization=True)
    network = timm.create_model("bmsn_relaid", model=name, layout="2-1-1", num_classes=5, in_chans=here)
    fresh = network.state_dict()["fc.weight"].clone()
    start_from(network, find_start(str(tmp_path)), [str(number) for number in range(5)])
    assert torch.equal(network.state_dict()["fc.weight"], fresh)
    gray = torch.randn(2, 1, 32, 32)
    images = {1: gray, 3: gray.repeat(1, 3, 1, 1)}
    stem, own = stock.conv1, network.conv1
    assert torch.allclose(own(images[here]), stem(images[source]), atol=1e-5), "gray images look alike to both"
    with pytest.raises(InputError, match=r"start .* does not fit the network"):
        start_from(timm.create_model("bmsn_resnet18"), find_start(str(tmp_path)), [])


def test_mistakes_are_one_line(trained, image_folder, tmp_path, capfd):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "model", damaged)
    content = load_file(damaged / "model.safetensors")
    save_file({**content, "fc.bias": content["fc.bias"] * float("nan")}, damaged / "model.safetensors")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text('{"architecture": ["x"]}')
    (odd / "model.safetensors").write_bytes(b"")
    capfd.readouterr()
    for flags, expected in (
        (["--init-from", image_folder], "holds no trained model: config.json is missing"),
        (["--init-from", damaged], "is damaged"),
        (["--init-from", odd], "has no search space"),
        (["--init-from", trained, "--model", "bmsn_resnet18"], "is a bmsn_resnet20, not a bmsn_resnet18"),
        (["--init-from", trained, "--pretrained"], "are two starts"),
        (["--init-from", trained, "--license", "MIT License"], "license 'MIT License' is no name of the Hub's"),
    ):
        assert run(train_module, "--dataset", image_folder, *COMMON, *flags, "--output", tmp_path / "run") == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert expected in error and "Traceback" not in error
        assert not (tmp_path / "run").exists()


def test_supernets_and_what_is_trained_of_them_start_from_a_trained_network(trained, image_folder, tmp_path):
    base = ["--dataset", image_folder, *COMMON, "--mixture-size", 2, "--confirm", 2, "--pretrained-from", trained]
    assert run(search_module, *base, "--lr", 0, "--min-lr", 0, "--output", tmp_path / "search") == 0
    before, after = weights(trained), load_file(tmp_path / "search" / "supernets.safetensors")
    assert {key.partition(".")[2] for key in after} == {
        key for key in before if not any(part in key for part in LEARNT_WITHOUT_RATE)
    }, "with scale and shift, without running statistics"
    assert all(torch.equal(tensor, before[key.partition(".")[2]]) for key, tensor in after.items()), "the rate was 0"
    result = SearchResult.read(tmp_path / "search" / "search.json")
    assert result.norms == "statistics of the batch, with scale and shift"
    for trial in (tmp_path / "search" / "trials").iterdir():
        assert TrialResult.read(trial / "trial.json").settings["init_from"] == str(trained)
    card = search_card(portable(result), "me/search")
    assert "the weights of `found`" in card and str(trained.parent) not in card

    inherited = ["--from-search", tmp_path / "search", *COMMON, *STILL, "--output", tmp_path / "train"]
    assert run(train_module, *inherited) == 0
    assert settings(tmp_path / "train")["init_from"] == str(trained)
    assert torch.equal(weights(tmp_path / "train")["conv1.weight"], before["conv1.weight"])


def test_starts_of_searches_that_cannot_be_used(trained, image_folder, tmp_path, capfd):
    base = ["--dataset", image_folder, *COMMON, "--output", tmp_path / "run", "--pretrained-from"]
    capfd.readouterr()
    for flags, expected in (
        ([image_folder], "holds no trained model: config.json is missing"),
        ([trained, "--model", "bmsn_resnet18"], "is a bmsn_resnet20, not a bmsn_resnet18: give --model bmsn_resnet20"),
        ([trained, "--pretrained"], "are two starts"),
        ([trained, "--init-from", trained], "is a training, not a search"),
    ):
        assert run(search_module, *base, *flags) == 2
        assert expected in capfd.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("affine", [False, True])
def test_a_network_starts_from_a_supernet_with_fresh_norms(affine):
    supernet = timm.create_model("bmsn_resnet20", num_classes=3, searchable=True)
    for norm in supernet.modules() if affine else ():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.weight, norm.bias = (torch.nn.Parameter(torch.rand(norm.num_features)) for _ in range(2))
    supernet.set_layout("1-8-1")
    network = timm.create_model("bmsn_resnet20", layout="2-3-5", num_classes=3)
    own = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    start_from_supernet(network, supernet.state_dict())
    weights, now = supernet.state_dict(), network.state_dict()
    for key, tensor in now.items():
        taken = key in weights and not any(part in key for part in LEARNT_WITHOUT_RATE)
        assert torch.equal(tensor, weights[key] if taken else own[key]), key
    assert sum(key in weights for key in now) > 20 and str(network.layout) == "2-3-5"
