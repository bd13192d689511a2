"""The commands as users run them, called in this process: search, retrain, resume, and every mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from closeness import close
from pictures import drawn
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau

import bmsn_zoo
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.config import SearchConfig
from bmsn_zoo.data import DataSource, normalise, to_pixels
from bmsn_zoo.results import SearchResult
from bmsn_zoo.runtime import computes_bf16
from bmsn_zoo.supernet import Mixture, count_correct

ROOT = Path(__file__).parents[1]
QUICK = ["--batch-size", "16", "--mixture-size", "2", "--epochs", "2", "--mixed-precision", "no", "--threads", "1"]


def search(folder, output, *arguments):
    assert search_module.main(["--dataset", str(folder), *QUICK, "--output", str(output), *map(str, arguments)]) == 0
    return json.loads((Path(output) / "search.json").read_text())


def found(result):
    return result["ranking"], result["accuracy_matrix"], result["assignment_matrix"], result["scores"]


@pytest.fixture(scope="session")
@drawn()
def searched(image_folder, tmp_path_factory):
    """A finished search of two epochs."""
    output = tmp_path_factory.mktemp("search") / "run"
    return output, search(image_folder, output)


def test_search_ranks_every_layout_and_keeps_its_evidence(searched):
    output, result = searched
    assert len(result["layouts"]) == len(result["ranking"]) == 36
    matrix = torch.tensor(result["accuracy_matrix"])
    assert matrix.shape == (36, 2)
    assert bool(((matrix >= 0) & (matrix <= 1)).all())
    for entry in result["ranking"]:
        row = matrix[result["layouts"].index(entry["layout"])]
        assert entry["accuracy"] == pytest.approx(float(row.max()))
        assert float(row[entry["supernet"]]) == pytest.approx(entry["accuracy"])
    accuracies = [entry["accuracy"] for entry in result["ranking"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert result["best"] == result["ranking"][0]
    assert result["best_within_default_macs"]["macs"] <= result["default"]["macs"]
    assert result["default"]["layout"] == "4-3-3"
    shares = torch.tensor(result["assignment_matrix"], dtype=torch.float64).mean(0)
    assert torch.allclose(shares * 2, torch.ones(2, dtype=torch.float64), atol=0.01)
    assert result["dataset"]["weight_images"] + result["dataset"]["score_images"] == 64
    assert {"processes", "threads", "precision", "hardware", "versions", "commit"} <= set(result["segments"][0])
    for picture in ("assignment", "accuracy_macs", "curves"):
        assert (output / "pictures" / f"{picture}.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(sum(row["draws"]) == 2 for row in rows)
    assert not list(output.glob("checkpoint-*"))


def test_supernet_weights_reproduce_the_matrix(searched, image_dataset):
    output, result = searched
    space = bmsn_zoo.SearchSpace("bmsn_resnet20")
    mixture = Mixture(space, 2, 4, 3, seed=5)
    mixture.load_state_dict(load_file(output / "supernets.safetensors"))
    rows = load_file(output / "split.safetensors")["score_rows"]
    score = image_dataset["train"].select(rows.tolist())
    pixels = torch.stack([torch.from_numpy(to_pixels(image, 16, 3).copy()) for image in score["image"]])
    labels = torch.tensor(score["label"])
    data = result["dataset"]
    for m, supernet in enumerate(mixture.supernets):
        correct = count_correct(supernet, space, normalise(pixels, data["mean"], data["std"]), labels)
        # one batch holds the whole split, so its order does not matter but for rounding
        expected = torch.tensor(result["accuracy_matrix"])[:, m]
        assert (correct / len(labels) - expected).abs().max() <= 1.01 / len(labels)


def test_equal_seeds_agree_bit_for_bit_and_others_differ(searched, image_folder, tmp_path):
    again = search(image_folder, tmp_path / "again")
    other = search(image_folder, tmp_path / "other", "--seed", 1)
    assert found(again) == found(searched[1])
    assert found(other) != found(searched[1])


def test_evaluating_in_between_changes_nothing(searched, image_folder, tmp_path):
    watched = search(image_folder, tmp_path / "run", "--evaluate-every", 1)
    assert found(watched) == found(searched[1])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(rows[0]["accuracy"]) == watched["layouts"]
    assert all(0 < accuracy <= 1 for accuracy in rows[0]["accuracy"].values())
    assert "accuracy" not in rows[1], "search.json has that of the last epoch"


@pytest.mark.slow
@pytest.mark.skipif(not computes_bf16(torch.device("cpu")), reason="bf16 is emulated here, and slow")
def test_bf16_ranks_a_trained_supernet_as_float32_does(tmp_path):
    search("digits", tmp_path / "run", "--batch-size", 64, "--epochs", 4, "--mixture-size", 1)
    torch.set_num_threads(2)  # the search had one
    mixture = Mixture(bmsn_zoo.SearchSpace("bmsn_resnet20"), 1, 10, 3, seed=0)
    mixture.load_state_dict(load_file(tmp_path / "run" / "supernets.safetensors"))
    supernet = mixture.supernets[0].to(memory_format=torch.channels_last)
    some = mixture.space.subset(list(mixture.space)[::3])
    data = DataSource(SearchConfig(), 1).train()
    score = data.images.select(load_file(tmp_path / "run" / "split.safetensors")["score_rows"].numpy())
    ((pixels, labels),) = score.batches([np.arange(len(score) // 2)])
    accuracy = []
    for kind in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            correct = count_correct(supernet, some, normalise(pixels, data.mean, data.std), labels)
        accuracy.append(correct / len(labels))
    full, half = accuracy
    assert float(full.max() - full.min()) > 0.1, "nothing to rank"
    assert float((full - half).abs().mean()) < 0.01
    assert kendalltau(full, half).statistic > 0.9
    assert float(full[half.argmax()]) > float(full.max()) - 0.01


def test_a_search_that_shows_nothing_names_no_winner_and_train_takes_the_default(image_dataset, tmp_path, capsys):
    """Images of noise alone: whatever is best of 72 accuracies on 32 images is so by luck."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    data = {"image": list(noise), "label": [0, 1, 2, 3] * 16}
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict(data, features=image_dataset["train"].features), test=image_dataset["test"]
    ).save_to_disk(tmp_path / "noise")
    result = search(tmp_path / "noise", tmp_path / "run")
    assert "cannot be told from chance, 25.00 %, on 32 score images" in result["undecided"]
    printed = capsys.readouterr().out
    assert f"no winner: {result['undecided']}: keep the default 4-3-3\n" in printed
    assert printed.count("4-3-3, the default: nothing else is shown to be better\n") == 2

    found, logged = SearchResult.read(tmp_path / "run" / "search.json"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module._log, "warning", lambda *message: logged.append(message[0] % message[1:]))
        for pick in ("best", "best_within_default_macs"):
            assert train_module.settings_from_search(found, pick)["layout"] == "4-3-3"
            assert logged.pop() == f"training the default layout 4-3-3: {found.undecided}"
        assert train_module.settings_from_search(found, "7-1-2")["layout"] == "7-1-2"
        decided = found.model_copy(update={"undecided": None})
        assert train_module.settings_from_search(decided, "best")["layout"] == found.best.layout
    assert not logged


def test_train_takes_a_layout_of_the_search_and_timm_loads_it(searched, image_dataset, tmp_path):
    output, result = searched
    best = result["best"]["layout"]
    common = ["--from-search", str(output), "--epochs", "1", "--batch-size", "16", "--mixed-precision", "no"]
    assert train_module.main([*common, "--pick", best, "--output", str(tmp_path / "best")]) == 0
    metrics = json.loads((tmp_path / "best" / "metrics.json").read_text())
    assert metrics["layout"] == best
    assert metrics["test_images"] == 32
    assert metrics["macs"] == result["best"]["macs"]
    model_folder = tmp_path / "best" / "model"
    names = {file.name for file in model_folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "metrics.json", "search.json"} <= names

    model = timm.create_model(f"local-dir:{model_folder}", pretrained=True).eval()
    assert model.layout == metrics["layout"]
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data)
    test = image_dataset["test"]
    inputs = torch.stack([transform(image) for image in test["image"]])
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(1) == torch.tensor(test["label"])).float().mean())
    assert accuracy == pytest.approx(metrics["test_accuracy"]), "timm's own transform gives the measured accuracy"


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits(runs, tmp_path):
    model_folder = runs.found / "model"
    model = timm.create_model(f"local-dir:{model_folder}", pretrained=True).eval()
    inputs = torch.randn(3, 3, 16, 16)
    code = (
        "import sys, timm, torch, bmsn_zoo; from safetensors.torch import load_file, save_file;"
        "m = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval();"
        "save_file({'y': m(load_file(sys.argv[2])['x']).detach()}, sys.argv[3])"
    )
    save_file({"x": inputs}, tmp_path / "x.safetensors")
    arguments = [str(model_folder), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with torch.no_grad():
        close(load_file(tmp_path / "y.safetensors")["y"], model(inputs))


def test_train_learns_with_every_switch_on(image_folder, tmp_path):
    arguments = ["--dataset", str(image_folder), "--layout", "2-2-6", "--epochs", "8", "--batch-size", "16"]
    arguments += ["--lr", "0.05", "--no-flip", "--crop-padding", "1", "--holdout", "0.25", "--label-smoothing", "0.1"]
    arguments += ["--mixup", "0.1", "--cutmix", "0.1", "--ema-decay", "0.9", "--drop-rate", "0.1"]
    arguments += ["--mixed-precision", "no", "--opt", "adamw", "--output", str(tmp_path / "run")]
    assert train_module.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(0 <= row["holdout_accuracy"] <= 1 for row in rows)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_images"] == 48


@pytest.mark.parametrize("module", [search_module, train_module], ids=["search", "train"])
def test_a_run_that_diverges_stops_in_one_line(module, image_folder, tmp_path, capfd):
    settings = ["--dataset", image_folder, "--batch-size", 16, "--lr", 1e38, "--epochs", 3, "--mixed-precision", "no"]
    settings += ["--output", tmp_path / "run", *(["--layout", "2-2-6"] if module is train_module else [])]
    assert module.main([*map(str, settings)]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: the loss became (nan|inf) in epoch [123], step \d: try a lower lr, .*", error)
    assert not {"metrics.json", "search.json"} & {file.name for file in (tmp_path / "run").iterdir()}


def test_search_never_opens_the_test_images(image_dataset, tmp_path):
    """The test images are unreadable: search does not notice, train does."""
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}] * 8, "label": [0, 1, 2, 3] * 2},
        features=image_dataset["test"].features,
    )
    datasets.DatasetDict(train=image_dataset["train"], test=broken).save_to_disk(tmp_path / "data")
    search(tmp_path / "data", tmp_path / "run")
    arguments = ["--from-search", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "16"]
    arguments += ["--mixed-precision", "no"]
    assert train_module.main([*arguments, "--output", str(tmp_path / "train")]) == 2


def test_resume_refuses_other_settings_but_takes_another_environment(image_folder, tmp_path, capsys):
    output = tmp_path / "run"
    settings = ["--dataset", str(image_folder), *QUICK, "--output", str(output)]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module._Search, "_evaluate_all", stop)
        with pytest.raises(KeyboardInterrupt):
            search_module.main(settings)
    assert search_module.main([*settings, "--resume", "--lr", "0.2"]) == 2
    assert "lr 0.05 (now 0.2)" in capsys.readouterr().err
    assert search_module.main(["--output", str(output), "--resume", "--threads", "2"]) == 0
    segments = json.loads((output / "search.json").read_text())["segments"]
    assert [segment["threads"] for segment in segments] == [1, 2]
    assert segments[1]["precision"] == segments[0]["precision"] == "fp32"
    assert search_module.main(["--output", str(output), "--resume"]) == 2
    assert "finished" in capsys.readouterr().err


@pytest.fixture(scope="session")
def bad_datasets(image_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    train = image_dataset["train"]
    (folder / "empty").mkdir()
    train.select([]).to_parquet(folder / "empty" / "train.parquet")
    datasets.DatasetDict(train=train.select(range(0, 64, 4))).save_to_disk(folder / "oneclass")
    (folder / "nothing").mkdir()
    return folder


MISTAKES = {
    "layout sum": (["--default-layout", "5-3-3"], "5-3-3 sums to 11"),
    "layout zero": (["--default-layout", "5-0-5"], "every resolution needs at least 1 unit"),
    "layout scales": (["--default-layout", "1-1-1-1-1-5", "--image-size", "16"], "too many for 16-pixel images"),
    "model": (["--model", "resnet19"], "'resnet19'"),
    "family": (["--model", "skresnet18"], "skresnet18 cannot be re-laid: its blocks are of the kind Selective"),
    "other depth": (["--model", "resnet18", "--default-layout", "4-3-3"], "4-3-3 sums to 10, the backbone has 8 units"),
    "small images": (["--model", "resnet18", "--image-size", "16"], "use images of at least 17 pixels"),
    "odd maps": (["--model", "resnetaa50d", "--image-size", "36"], "unit 2 of this model cannot take maps of 9 x 9"),
    "nothing within": (["--max-macs", "1000"], "leaves none of 36 layouts: the cheapest, 1-1-8, costs"),
    "no weights": (["--pretrained"], "there are no weights for the model bmsn_resnet20"),
    "data set": (["--dataset", "./nowhere"], "'./nowhere' is not a folder"),
    "hub data set": (["--dataset", "nobody/nothing"], "'nobody/nothing' cannot be loaded"),
    "image column": (["--image-column", "picture"], "no column 'picture'"),
    "label column": (["--label-column", "class"], "no column 'class'"),
    "recipe": (["--recipe", "nothing"], "recipe 'nothing'"),
    "mixture size": (["--mixture-size", "0"], "mixture-size 0 is too small"),
    "epochs": (["--epochs", "2.5"], "is not a whole number"),
    "learning rate": (["--lr", "nan"], "is not a finite number"),
    "batch": (["--batch-size", "4096"], "batch-size 4096"),
    "optimizer": (["--opt", "nothing"], "opt 'nothing'"),
    "flag": (["--mixturesize", "4"], "--mixturesize"),
    "precision": (["--mixed-precision", "fp8"], "mixed-precision 'fp8' is unknown"),
    "resume nothing": (["--resume"], "to resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(mistake, image_folder, tmp_path, capfd):
    arguments, expected = MISTAKES[mistake]
    output = tmp_path / "run"
    base = ["--dataset", str(image_folder), *QUICK, "--output", str(output)]
    assert search_module.main([*base, *arguments]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "expected"), [("empty", "is empty"), ("oneclass", "one class"), ("nothing", "empty folder")]
)
def test_data_sets_that_cannot_be_learned(name, expected, bad_datasets, tmp_path, capfd):
    output = tmp_path / "run"
    assert search_module.main(["--dataset", str(bad_datasets / name), *QUICK, "--output", str(output)]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
    assert not output.exists()


def test_output_that_holds_a_run_is_left_alone(searched, image_folder, capfd):
    output, _ = searched
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert search_module.main(["--dataset", str(image_folder), *QUICK, "--output", str(output)]) == 2
    assert "already holds" in capfd.readouterr().err
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
