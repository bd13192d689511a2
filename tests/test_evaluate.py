"""Accuracies measured again from published files."""

import csv
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from pictures import drawn
from small_runs import DEFAULT, FOUND, run

from bmsn_zoo import evaluate, runtime
from bmsn_zoo.config import TrainConfig, shipped_folder
from bmsn_zoo.data import DataSource

DATASETS = Path(__file__).parents[2] / "shared" / "datasets"  # real images, where they lie beside the checkout
SHIPPED = sorted(file.parent for file in shipped_folder("hub_configs").glob("*/config.json"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_model_of_the_zoo_is_as_accurate_as_its_card_says(folder):
    dataset = DATASETS / json.loads((folder / "metrics.json").read_text())["dataset"]["id"].split("/")[-1]
    if not dataset.is_dir():
        pytest.skip("its data set is not here")
    measured = evaluate.measure(folder.name, str(dataset))
    assert measured["images"] == 10_000
    assert measured["accuracy"] == pytest.approx(measured["recorded"], abs=3e-4)  # processors round differently


def test_the_command(runs, image_folder, capsys):
    recorded = json.loads((runs.found / "model" / "metrics.json").read_text())
    accuracy = f"{100 * recorded['test_accuracy']:.2f} %"
    expected = f"{accuracy} of {recorded['test_images']} test images are classified correctly, {accuracy} by its record"
    for folder in (runs.found / "model", runs.found):
        assert run(evaluate, folder, "--dataset", image_folder) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"{folder}: {expected}"
        assert re.fullmatch(r"95 % interval .* % to .* %; 100.00 % are among the first 4 labels", second)


def test_the_table_of_the_zoo_has_the_accuracies_of_its_cards():
    table = SHIPPED[0].parents[1] / "results" / "results.csv"
    rows = {row["model"]: float(row["top1"]) for row in csv.DictReader(table.read_text().splitlines())}
    recorded = {home.name: json.loads((home / "metrics.json").read_text())["test_accuracy"] for home in SHIPPED}
    assert rows == {name: pytest.approx(100 * accuracy, abs=0.03) for name, accuracy in recorded.items()}


def test_results_are_a_table_in_timms_columns(runs, image_folder, tmp_path, capsys):
    table = tmp_path / "new" / "results.csv"
    for folder in (runs.zoo / FOUND, runs.zoo / DEFAULT, runs.zoo / FOUND):
        assert run(evaluate, folder, "--dataset", image_folder, "--results-file", table) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["model"] for row in rows} == {FOUND, DEFAULT} and len(rows) == 2
    assert float(rows[0]["top1"]) >= float(rows[1]["top1"])
    for row in rows:
        recorded = json.loads((runs.zoo / row["model"] / "metrics.json").read_text())
        assert float(row["top1"]) == pytest.approx(100 * recorded["test_accuracy"], abs=1e-3)
        for top in ("top1", "top5"):
            assert float(row[top]) + float(row[f"{top}_err"]) == pytest.approx(100)
        assert (row["img_size"], row["param_count"]) == ("16", f"{recorded['parameters'] / 1e6:.2f}")
        assert (row["crop_pct"], row["interpolation"]) == ("1.0", "bicubic")
    table.write_text("name,accuracy\n")
    capsys.readouterr()
    assert run(evaluate, folder, "--dataset", image_folder, "--results-file", table) == 2
    assert "has other columns than model,img_size,top1," in capsys.readouterr().err
    assert table.read_text() == "name,accuracy\n"


def test_files_that_cannot_be_are_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place, fault in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.csv", "file, which is a file")):
        assert run(evaluate, "bmsn_nothing", "--results-file", place) == 2
        error = capsys.readouterr().err
        assert f"{fault}: give the name of a file" in error and error.count("\n") == 1


@drawn()
def test_every_class_is_told(runs, image_folder, tmp_path, capsys):
    assert run(evaluate, runs.found, "--dataset", image_folder, "--output", tmp_path / "new" / "classes") == 0
    rows = list(csv.DictReader((tmp_path / "new" / "classes" / "classes.csv").read_text().splitlines()))
    recorded = json.loads((runs.found / "model" / "metrics.json").read_text())
    assert [row["class"] for row in rows] == ["north", "east", "south", "west"]
    right = sum(float(row["accuracy"]) * int(row["images"]) for row in rows)
    assert right / sum(int(row["images"]) for row in rows) == pytest.approx(recorded["test_accuracy"])
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 1
        assert (row["most_often_taken_for"] == "") == (row["how_often"] == "0")
        assert row["most_often_taken_for"] != row["class"]
    assert (tmp_path / "new" / "classes" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_other_weights_are_measured_as_they_are(runs, image_folder, tmp_path):
    folder = shutil.copytree(runs.found / "model", tmp_path / "model")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "test_accuracy": 0.123}))
    measured = evaluate.measure(str(folder), str(image_folder))
    assert measured["recorded"] == 0.123
    assert measured["accuracy"] == metrics["test_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bmsn_nothing"], "neither a folder here"),
        ([SHIPPED[0].name, "--dataset", "digits-of-mine/"], "digits-of-mine"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    assert run(evaluate, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_other_classes_are_refused(image_dataset, image_folder, runs, tmp_path, capsys):
    assert run(evaluate, SHIPPED[0].name, "--dataset", image_folder) == 2
    assert "knows 10 classes" in capsys.readouterr().err
    names = ["north", "west", "south", "east"]
    renamed = image_dataset.cast_column("label", datasets.ClassLabel(names=names))
    renamed.save_to_disk(tmp_path / "renamed")
    assert run(evaluate, runs.found, "--dataset", tmp_path / "renamed") == 2
    assert "knows class 1 as 'east'" in capsys.readouterr().err


@pytest.fixture(params=["by default", "as asked"])
def tf32(request):
    """What says whether TF32 is used, as torch has it by default, or as its newer setting asks for it."""
    matmul = torch.backends.cuda.matmul
    if request.param == "by default":
        yield lambda: [getattr(where, name) for where, name, _ in runtime._tf32_switches()]
        return
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has one way to ask for TF32")
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield lambda: [matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
    matmul.fp32_precision = before


def test_recorded_accuracies_are_computed_in_full_float32(tf32, image_folder):
    """In TF32 convolutions would run by default on newer NVIDIA GPUs; what was set comes back, come what may."""
    data, seen = DataSource(TrainConfig(dataset=str(image_folder)), 1).test(), []

    class Watching(torch.nn.Module):
        def forward(self, images):
            seen.append(tf32())
            return torch.zeros(len(images), 4 if len(seen) == 1 else 1)

    before = tf32()
    assert before[1] in ("tf32", True), "torch's default has changed: is this still needed?"
    evaluate.evaluate(Watching(), data.images, data.mean, data.std, Accelerator())
    with pytest.raises(IndexError):  # one class is too few for the labels
        evaluate.evaluate(Watching(), data.images, data.mean, data.std, Accelerator())
    assert seen == [[exact for _, _, exact in runtime._tf32_switches()]] * 2
    assert tf32() == before


def test_the_accuracy_counts_what_the_first_labels_say_even_in_ties(image_folder):
    """The classes of metrics.json come from the labels, so that the two must not part where a network is dead."""
    data = DataSource(TrainConfig(dataset=str(image_folder)), 1).test()

    class Dead(torch.nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 10)

    best = torch.zeros(len(data.images), 5, dtype=torch.int64)
    measured = evaluate.evaluate(Dead(), data.images, data.mean, data.std, Accelerator(), best)
    assert measured["accuracy"] == pytest.approx(float((best[:, 0] == data.images.labels).float().mean()))
