"""Model folders: what is written, what is read back, what joins the zoo, and their ONNX files."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_runs import DEFAULT, FOUND, run

from bmsn_zoo import InputError, evaluate, hub, model_folder
from bmsn_zoo.config import shipped_folder
from bmsn_zoo.data import normalise
from bmsn_zoo.export import export_onnx, require_onnx
from bmsn_zoo.files import sha256
from bmsn_zoo.model_folder import add, load_model
from bmsn_zoo.results import TrainResult

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(file.parent.name for file in shipped_folder("hub_configs").glob("*/config.json"))
each_model = pytest.mark.parametrize("name", [FOUND, DEFAULT, *SHIPPED])


@pytest.fixture
def folder(name, runs):
    return shipped_folder("hub_configs") / name if name in SHIPPED else runs.zoo / name


@pytest.fixture
def copy(runs, tmp_path):
    """A model folder to damage."""
    return shutil.copytree(runs.zoo / FOUND, tmp_path / "model")


def change(file, *path, value):
    """Change one value in a JSON file."""
    content = part = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def again(runs, tmp_path_factory):
    """The found model, added once more, beside a default of another seed, place and pick."""
    zoo = tmp_path_factory.mktemp("again")
    shutil.copytree(runs.zoo / DEFAULT, zoo / "other")
    for name, value in (("seed", 7), ("dataset", "/elsewhere/compass"), ("pick", "4-3-3")):
        change(zoo / "other" / "metrics.json", "settings", name, value=value)
    written = runs.found / "model" / "model.onnx"  # to export the same weights again takes seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "export_onnx", lambda model, path, names: shutil.copy(written, path))
        return add(runs.found, "bmsn_resnet20_new", default="other", zoo=zoo)


# ONNX


@each_model
def test_onnx_takes_bytes_and_gives_the_same_logits(name, folder):
    model = timm.create_model(name, pretrained=True).eval()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    cfg = model.pretrained_cfg
    channels, side, _ = cfg["input_size"]
    for batch in (1, 3):
        pixels = torch.randint(0, 256, (batch, side, side, channels), dtype=torch.uint8)
        (logits,) = session.run(["logits"], {"images": pixels.numpy()})
        expected = model(normalise(pixels, cfg["mean"], cfg["std"])).detach().numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    about = session.get_modelmeta().custom_metadata_map
    assert about["layout"] == model.layout
    assert json.loads(about["label_names"]) == list(cfg["label_names"])
    rule = json.loads((folder / "config.json").read_text())["preprocessing"]
    assert rule in about["images"]
    assert f"one way: {rule}." in (folder / "README.md").read_text()


@pytest.mark.slow
def test_onnx_has_the_same_bytes_every_time(runs, tmp_path):
    folder = runs.found / "model"
    files = [folder / "model.onnx", tmp_path / "model.onnx"]
    export_onnx(load_model(folder), files[1], json.loads((folder / "config.json").read_text())["label_names"])
    assert files[0].read_bytes() == files[1].read_bytes()
    onnx.checker.check_model(files[0], full_check=True)


def test_onnx_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install 'bmsn_zoo\[onnx\]'"):
        require_onnx()


@pytest.mark.slow
def test_versions_that_do_not_fit_are_found_before_the_training(tmp_path):
    (tmp_path / "onnxscript").mkdir()
    (tmp_path / "onnxscript" / "__init__.py").write_text("")  # lacks all that torch needs of it
    done = subprocess.run(
        [sys.executable, "-m", "bmsn_zoo.training", "--layout", "4-3-3", "--onnx", "--output", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ONNX cannot be written with torch ")
    assert not (tmp_path / "run").exists()


# adding to the zoo


def test_add_refuses_what_would_mislead(runs, tmp_path):
    before = {file: file.read_bytes() for file in runs.zoo.rglob("*") if file.is_file()}
    for name, message in ((FOUND, "exists already"), ("resnet20", "does not start with bmsn_"), ("bmsn_../x", "small")):
        with pytest.raises(InputError, match=message):
            add(runs.found, name, zoo=runs.zoo)
    with pytest.raises(InputError, match="exists already"):
        add(runs.found, "bmsn_resnet20", zoo=runs.zoo)
    for folder, message in (
        (tmp_path, "holds no trained model: model is missing"),
        (tmp_path / "nowhere", "nowhere is neither a folder here nor a model of the zoo"),
        (runs.search, "is a search, whose supernets are no trained model"),
    ):
        with pytest.raises(InputError, match=message):
            add(folder, "bmsn_resnet20_new", zoo=runs.zoo)
    with pytest.raises(InputError, match="default bmsn_other is no model of the zoo"):
        add(runs.found, "bmsn_resnet20_new", default="bmsn_other", zoo=runs.zoo)
    assert {file: file.read_bytes() for file in runs.zoo.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("settings", "holdout"), 0.25, "another holdout"),
        (("settings", "epochs"), 2, "another epochs"),
        (("settings", "limit"), 10, "another limit"),
        (("dataset", "image_size"), 8, "another image_size"),
        (("dataset", "test_fingerprint"), "other", "another test_fingerprint"),
    ],
)
def test_only_models_trained_alike_are_compared(path, value, said, runs, tmp_path):
    zoo = tmp_path / "zoo"
    shutil.copytree(runs.zoo / DEFAULT, zoo / "other")
    change(zoo / "other" / "metrics.json", *path, value=value)
    with pytest.raises(InputError, match=f"other is not comparable: it was trained with {said}"):
        add(runs.found, "bmsn_resnet20_new", default="other", zoo=zoo)
    assert [file.name for file in zoo.iterdir()] == ["other"]


def test_models_of_another_seed_place_and_pick_are_compared(again):
    assert "Against the default layout" in (again / "README.md").read_text()


@pytest.fixture
def repeat(runs, tmp_path):
    """A function that makes run folders of the found training with another seed."""

    def make(seed, accuracy):
        made = shutil.copytree(runs.found, tmp_path / f"s{seed}-{accuracy}")
        record = made / "model" / "metrics.json"
        change(record, "seed", value=seed)
        change(record, "settings", "seed", value=seed)
        change(record, "test_accuracy", value=accuracy)
        return made

    return make


def test_repeats_with_other_seeds_are_told_of(runs, repeat, tmp_path, monkeypatch):
    written = runs.found / "model" / "model.onnx"  # to export the same weights again takes seconds
    monkeypatch.setattr(model_folder, "export_onnx", lambda model, path, names: shutil.copy(written, path))
    zoo = tmp_path / "zoo"
    shutil.copytree(runs.zoo / DEFAULT, zoo / DEFAULT)
    seeds = [repeat(1, 0.5), repeat(2, 0.75)]
    added = add(runs.found, "bmsn_resnet20_new", default=DEFAULT, repeats=seeds, zoo=zoo)
    first = TrainResult.read(runs.found / "model" / "metrics.json")
    found, text = TrainResult.read(added / "metrics.json"), (added / "README.md").read_text()
    assert (found.seeds, found.accuracies) == ([0, 1, 2], [first.test_accuracy, 0.5, 0.75])
    assert found.repeats[0].segments[0].commit == first.segments[0].commit
    assert str(tmp_path) not in (added / "metrics.json").read_text()
    over = f"{100 * mean(found.accuracies):.2f} ± {100 * stdev(found.accuracies):.2f} %"
    assert f"(seed 0; mean and deviation of 3 seeds: {over})" in text
    assert f"| {100 * first.test_accuracy:.2f} % | 0, 1, 2 | {over} |" in text
    assert "n = 1)." not in text and "was not measured" not in text
    assert f"value: {first.test_accuracy}\n" in text, "the weights' own accuracy is what can be measured again"
    load_model(added)
    shutil.copytree(added, tmp_path / "again" / "model")
    shutil.copy(added / "metrics.jsonl", tmp_path / "again")
    more = add(tmp_path / "again", "bmsn_resnet20_more", repeats=[repeat(3, 0.25)], zoo=zoo)
    assert TrainResult.read(more / "metrics.json").repeats[:2] == found.repeats, "those that it tells of are kept"
    assert TrainResult.read(more / "metrics.json").seeds == [0, 1, 2, 3]


def test_what_is_no_repeat_is_refused(runs, repeat, tmp_path):
    zoo = tmp_path / "zoo"
    for repeats, said in (
        ([repeat(0, 0.5)], "s0-0.5 is no repeat: seed 0 is there already, give another one"),
        ([repeat(1, 0.5), repeat(1, 0.75)], "s1-0.75 is no repeat: seed 1 is there already"),
        ([runs.default], "is no repeat: its layout is 4-3-3"),
        ([tmp_path], "holds no trained model: model is missing"),
    ):
        with pytest.raises(InputError, match=said):
            add(runs.found, "bmsn_resnet20_new", repeats=repeats, zoo=zoo)
    other = repeat(3, 0.5)
    change(other / "model" / "metrics.json", "settings", "epochs", value=7)
    with pytest.raises(InputError, match=r"s3-0\.5 is not comparable: it was trained with another epochs"):
        add(runs.found, "bmsn_resnet20_new", repeats=[other], zoo=zoo)
    assert not zoo.exists()


# reading


def poisoned(value):
    def change_weights(weights):
        weights["blocks.3.conv1.weight"][1, 2, 0, 0] = value

    return change_weights


def halved(weights):
    weights["fc.weight"] = weights["fc.weight"].half()


@pytest.mark.parametrize(
    ("damage", "said"),
    [(poisoned(float("nan")), "not finite"), (poisoned(-float("inf")), "not finite"), (halved, "torch.float16")],
    ids=["nan", "infinity", "half"],
)
def test_weights_that_no_training_saves_are_refused_by_all(damage, said, copy, runs, image_folder, tmp_path, capfd):
    weights = load_file(runs.zoo / FOUND / "model.safetensors")
    damage(weights)
    save_file(weights, copy / "model.safetensors")
    change(copy / "metrics.json", "weights_sha256", value=sha256(copy / "model.safetensors"))
    refused_by_all(copy, said, image_folder, tmp_path, capfd)


def test_a_flipped_bit_is_refused_by_all(copy, image_folder, tmp_path, capfd):
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1000] ^= 4  # the lowest bits of a number: other logits, and nothing else to see
    (copy / "model.safetensors").write_bytes(content)
    refused_by_all(copy, "model.safetensors is damaged: its checksum", image_folder, tmp_path, capfd)


def refused_by_all(model, said, image_folder, tmp_path, capfd):
    """Each way to read a model folder ends in one line, and nothing is written."""
    capfd.readouterr()
    commands = (
        (hub, "push", model, "alice/net"),
        (evaluate, model, "--dataset", image_folder),
        (hub, "add", tmp_path, "bmsn_resnet20_new"),
    )
    with pytest.raises(InputError, match=said):
        load_model(model)
    for command in commands:
        assert run(*command) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line
    assert not (shipped_folder("hub_configs") / "bmsn_resnet20_new").exists()


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("config.json", ("model_args", "layout"), "3-4-3"),
        ("metrics.json", ("layout",), "3-4-3"),
        ("metrics.json", ("parameters",), 7),
        ("config.json", ("pretrained_cfg", "mean"), [0.5, 0.5, 0.5]),
        ("config.json", ("pretrained_cfg", "input_size"), [3, 8, 8]),
        ("config.json", ("label_names",), ["south", "east", "north", "west"]),
        ("config.json", ("pretrained_cfg",), 3),
        ("metrics.json", ("test_accuracy",), "high"),
    ],
)
def test_files_that_do_not_agree_are_refused(file, path, value, copy):
    layout = load_model(copy).layout
    change(copy / file, *path, value="4-2-4" if value == layout else value)
    with pytest.raises(InputError) as caught:
        load_model(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "pickle", "text"])
def test_a_damaged_file_is_refused(damage, copy, runs, tmp_path):
    weights = copy / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save(load_file(runs.zoo / FOUND / "model.safetensors"), weights)
    else:
        (copy / "README.md").write_bytes(b"caf\xe9")
    if damage != "text":
        change(copy / "metrics.json", "weights_sha256", value=sha256(weights))
    with pytest.raises(InputError) as caught, warnings.catch_warnings():
        hub.push(copy, "alice/net")
    assert str(caught.value).startswith(str(copy))
    assert "\n" not in str(caught.value)
