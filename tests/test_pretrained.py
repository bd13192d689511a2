"""Searches and trainings that start from timm's weights, which timm itself wrote, through a Hub of our own."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_runs import COMMON, run
from timm.models import save_for_hf

from bmsn_zoo import InputError, SearchSpace
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.results import SearchResult
from bmsn_zoo.supernet import Mixture, norms_of

MODEL = "test_resnet.r160_in1k"
REPOSITORY = f"timm/{MODEL}"
FRESH = ("fc.weight", "fc.bias")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Files of timm's repository of a network whose norms are not those of a new one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    model = timm.create_model(MODEL)
    for name, tensor in model.named_parameters():
        if "bn" in name or "downsample" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    save_for_hf(model, str(folder), safe_serialization=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def published(server, checkpoint):
    server.put(REPOSITORY, checkpoint)
    return server


@pytest.mark.parametrize("in_chans", [1, 3])
@torch.no_grad()
def test_supernets_start_from_what_timm_loads(published, in_chans):
    stock = timm.create_model(MODEL, pretrained=True, in_chans=in_chans)
    made = Mixture(SearchSpace(MODEL), 2, num_classes=5, in_chans=in_chans, seed=0, pretrained=True)
    x = torch.randn(4, in_chans, 48, 48)
    for supernet in made.supernets:
        own, theirs = dict(supernet.named_parameters()), dict(stock.named_parameters())
        assert own.keys() == theirs.keys(), "norms keep their scale and shift"
        assert all(torch.equal(own[name], theirs[name]) for name in own if name not in FRESH)
        assert not any("running" in name for name in supernet.state_dict())
        # batch statistics are what timm's network has in training
        assert torch.equal(supernet.eval().forward_features(x), stock.train().forward_features(x))
        assert norms_of(supernet) == "statistics of the batch, with scale and shift"
    first, second = made.supernets
    assert first.fc.out_features == 5
    assert not torch.equal(first.fc.weight, second.fc.weight)
    plain = Mixture(SearchSpace(MODEL), 1, num_classes=5, in_chans=in_chans, seed=0).supernets[0]
    assert norms_of(plain) == "statistics of the batch, without scale and shift"
    assert plain.bn1.weight is None


def test_a_search_and_its_retraining_start_there(published, checkpoint, tmp_path, image_folder, monkeypatch):
    search, train, scratch = (tmp_path / name for name in ("search", "train", "scratch"))
    still = ["--dataset", image_folder, *COMMON, "--lr", 0, "--min-lr", 0, "--weight-decay", 0]
    small = ["--model", MODEL, "--default-layout", "2-2", "--mixture-size", 2, "--pretrained"]
    assert run(search_module, *still, *small, "--output", search) == 0
    found = SearchResult.read(search / "search.json")
    assert (found.settings["pretrained"], found.norms) == (True, "statistics of the batch, with scale and shift")
    (tmp_path / "there").write_bytes(checkpoint["model.safetensors"])
    stock, supernets = load_file(tmp_path / "there"), load_file(search / "supernets.safetensors")
    names = [name for name in stock if name not in FRESH and "running" not in name and "num_" not in name]
    assert all(torch.equal(stock[name], supernets[f"{m}.{name}"]) for name in names for m in (0, 1))

    assert run(train_module, "--from-search", search, "--pick", "3-1", *still, "--output", train) == 0
    model = timm.create_model(f"local-dir:{train / 'model'}", pretrained=True)
    assert model.layout == "3-1"
    assert all(torch.equal(stock[name], model.state_dict()[name]) for name in names)
    assert not torch.equal(stock["bn1.running_mean"], model.bn1.running_mean), "it was trained, if without a rate"
    more = ["--from-search", search, "--pick", "3-1", "--no-pretrained", "--output", scratch]
    assert run(train_module, *still, *more) == 0
    model = timm.create_model(f"local-dir:{scratch / 'model'}", pretrained=True)
    assert not torch.equal(stock["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)


def test_what_is_no_safetensors_is_refused_in_one_line(server, checkpoint, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", opened)

    def start():
        Mixture(SearchSpace(MODEL), 1, num_classes=5, in_chans=3, seed=0, pretrained=True)

    with pytest.raises(InputError, match=f"{REPOSITORY}: no model repository"):
        start()
    server.put(REPOSITORY, {"pytorch_model.bin": b"cos\nsystem\n(S'true'\ntR."})
    with pytest.raises(InputError, match=f"{REPOSITORY} are no safetensors, and pickles stay closed"):
        start()
    server.put(REPOSITORY, {"model.safetensors": checkpoint["model.safetensors"][:1000]})
    with pytest.raises(InputError, match=f"{REPOSITORY} do not fit {MODEL}"):
        start()


@pytest.mark.parametrize("module", [search_module, train_module])
@pytest.mark.parametrize("model", ["resnetblur18", "bmsn_resnet20"])
def test_a_model_without_weights_says_so(module, model, tmp_path: Path, image_folder, capsys):
    layout = ["--layout", "2-2-2-2" if model == "resnetblur18" else "5-3-2"] if module is train_module else []
    data = ["--dataset", image_folder, *COMMON, "--image-size", 32]
    assert run(module, *data, *layout, "--model", model, "--pretrained", "--output", tmp_path / "run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: pretrained: there are no weights for the model {model}: use one that timm has weights for" in said
    assert not (tmp_path / "run" / "run.json").exists()
