"""Cards, written from a run's records: what they say, and what they must not say."""

import copy
import json

import numpy as np
import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image
from small_runs import DEFAULT, FOUND

from bmsn_zoo import Layout
from bmsn_zoo.card import portable, search_card, write_card
from bmsn_zoo.data.pixels import to_pixels
from bmsn_zoo.results import SearchResult, TrainResult

pytestmark = pytest.mark.timeout(120)
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def record(runs):
    return json.loads((runs.found / "metrics.json").read_text())


def table(text, title):
    """Rows of the first table under a title, without its head."""
    lines = text.split(f"## {title}\n", 1)[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_metadata(runs):
    data = ModelCard.load(runs.zoo / FOUND / "README.md").data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert {"timm", "bmsn_zoo", "image-classification"} <= set(data.tags)
    assert data.metrics == ["accuracy"]
    assert data.model_name == FOUND
    assert data.datasets is None, "the images are a local folder"
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("compass", "test")


def test_results_compare_with_the_default(runs):
    text = (runs.zoo / FOUND / "README.md").read_text()
    found, default = (json.loads((runs.zoo / name / "metrics.json").read_text()) for name in (FOUND, DEFAULT))
    rows = table(text, "Results")
    assert [row[0] for row in rows] == ["4-3-3 (default)", found["layout"]]
    assert [row[3] for row in rows] == [f"{100 * m['test_accuracy']:.2f} %" for m in (default, found)]
    assert [row[2] for row in rows] == [f"{m['macs'] / 1e6:.1f} M" for m in (default, found)]
    points = 100 * (found["test_accuracy"] - default["test_accuracy"])
    assert f"{points:+.2f} points at {found['macs'] / default['macs']:.2f} times" in text
    assert "n = 1" in text
    assert len(table((runs.zoo / DEFAULT / "README.md").read_text(), "Results")) == 1


def test_the_layout_is_drawn(runs):
    text = (runs.zoo / FOUND / "README.md").read_text()
    layout = json.loads((runs.found / "metrics.json").read_text())["layout"]
    rows = table(text, "Layout")
    assert [row[2] for row in rows] == [f"{side}x{side}" for side in Layout.parse(layout).resolutions(16)]
    assert [row[3] for row in rows] == [f"{side}x{side}" for side in Layout.parse("4-3-3").resolutions(16)]
    assert [row[1] for row in rows] == ["16"] * 4 + ["32"] * 3 + ["64"] * 3


def test_origin_and_training_are_told(runs):
    text = (runs.zoo / FOUND / "README.md").read_text()
    metrics, search = (json.loads((runs.zoo / FOUND / name).read_text()) for name in ("metrics.json", "search.json"))
    assert "Ranked 1 of 36 by a balanced mixture of 2 supernets (1 epoch in all, seed 0, n = 1 search)" in text
    assert f"{100 * search['best']['accuracy']:.2f} % in the search on 32 training images" in text
    assert f"accelerate launch train.py --from-search bmsn-zoo/{FOUND}\n" in text
    assert "1 epoch, seed 0, 64 training images." in text
    assert metrics["hardware"] in text
    assert f"torch {metrics['versions']['torch']}" in text
    assert metrics["commit"] in text
    assert "from_search: search.json" in text
    assert "arXiv:2306.11982" in text
    plain = (runs.zoo / DEFAULT / "README.md").read_text()
    assert "It is the layout of the original network" in plain
    assert "accelerate launch train.py --layout 4-3-3 --dataset compass\n" in plain


def test_usage_without_a_zoo_name(runs):
    text = (runs.found / "model" / "README.md").read_text()
    assert 'timm.create_model("hf-hub:YOUR_NAME/THIS_REPOSITORY", pretrained=True)' in text
    assert text.count("```python") == 2
    assert (runs.default / "model" / "README.md").read_text().count("```python") == 1, "it has no model.onnx"
    zoo = (runs.zoo / FOUND / "README.md").read_text()
    assert f'timm.create_model("{FOUND}", pretrained=True)' in zoo
    assert zoo.index("```python") < zoo.index("## Results")


@pytest.mark.parametrize(
    ("dataset", "dataset_id", "shown", "listed", "said"),
    [
        ("uoft-cs/cifar100", None, "uoft-cs/cifar100", True, "published without a licence"),
        ("../shared/cifar10", "uoft-cs/cifar10", "uoft-cs/cifar10", True, "published without a licence"),
        ("ethz/food101", None, "ethz/food101", True, "https://huggingface.co/datasets/ethz/food101"),
        ("/home/me/photos", None, "photos", False, "may have a licence of their own"),
        ("./photos", None, "photos", False, "may have a licence of their own"),
        ("digits", None, "digits", False, "may have a licence of their own"),
    ],
)
def test_data_sets_are_named_by_the_hub(dataset, dataset_id, shown, listed, said, record, runs, tmp_path):
    record["settings"].update(dataset=dataset, dataset_id=dataset_id)
    record["dataset"].update(id=dataset_id or dataset, on_hub=listed)
    record["segments"][0]["command"] = ["train.py", "--dataset", dataset, "--lr", "0.2", "--dataset-id=x"]
    record["settings"]["from_search"] = None
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text((runs.zoo / FOUND / "config.json").read_text())
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ([shown] if listed else None)
    assert card.data.eval_results[0].dataset_type == shown
    assert said in card.text
    assert f"accelerate launch train.py --lr 0.2 --dataset {shown}\n" in card.text
    assert dataset in shown or dataset not in card.content


def test_portable_records_name_no_folder_and_stay_as_they_are(record):
    before = copy.deepcopy(record)

    def treated(**changed):
        return portable(TrainResult(**{**record, **changed})).model_dump()

    record["segments"][0]["command"] = [
        "/home/me/bmsn_zoo/train.py",
        *("--output", "/home/me/runs/x", "--resume", "--lr=0.1", "--from-search=/home/me/s", "--no-flip"),
        *("--recipe", "/home/me/mine.yaml", "--recipe=digits-resnet20"),
        *("--push-to-hub", "me/net", "--private", "--revision", "trial", "--create-pr", "--dataset", "/home/me/photos"),
    ]
    once = treated()
    assert portable(TrainResult(**once)).model_dump() == once
    assert once["segments"][0]["command"] == [
        *("bmsn_zoo/train.py", "--lr=0.1", "--no-flip", "--recipe", "mine.yaml", "--recipe", "digits-resnet20")
    ]
    assert once["settings"]["from_search"] == "search.json"
    assert once["settings"]["dataset"] == once["dataset"]["id"] == "compass"
    assert {key: once[key] for key in once if key not in ("segments", "settings", "dataset")} == {
        key: before[key] for key in before if key not in ("segments", "settings", "dataset")
    }
    assert treated(recipe="/home/me/mine.yaml")["recipe"] == "mine.yaml"
    record["settings"].update(from_search=f"me/found@{SHA}", init_from="/home/me/runs/old")
    settings = treated()["settings"]
    assert (settings["from_search"], settings["init_from"]) == (f"me/found@{SHA}", "old")
    record["settings"]["init_from"] = f"me/found@{SHA}"
    assert treated()["settings"]["init_from"] == f"me/found@{SHA}"
    for command in ([], ["-c"], ["/usr/lib/ipykernel_launcher.py", "-f", "/home/me/k.json"]):
        record["segments"][0]["command"] = command
        assert "/home" not in json.dumps(treated()["segments"][0]["command"])


def test_search_card(runs):
    result = portable(SearchResult.read(runs.search / "search.json"))
    text = search_card(result, "me/search")
    card = ModelCard(text)
    assert card.data.library_name == "bmsn_zoo"
    assert "neural-architecture-search" in card.data.tags
    rows = table(text, "Ranking")
    expected = [entry.layout for entry in result.ranking]
    assert [row[1].removesuffix(" (default)") for row in rows[:10]] == expected[:10]
    assert sum(row[1] == "4-3-3 (default)" for row in rows) == 1
    assert "accelerate launch -m bmsn_zoo.train --from-search me/search " in text
    assert "accelerate launch -m bmsn_zoo.search --lr 0.05 --dataset compass\n" in text
    assert str(runs.base) not in text
    for picture in ("accuracy_macs", "assignment", "curves"):
        assert f"pictures/{picture}.png" in text
        assert (runs.search / "pictures" / f"{picture}.png").exists()


def test_timms_transform_prepares_upright_opaque_images_to_the_pixel_as_training_does():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(1, 90, 2)
        size, chans = int(rng.integers(4, 40)), int(rng.choice([1, 3]))
        if max(width, height) > 16 * min(width, height):
            continue
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(
            {1: "L", 3: "RGB"}[chans]
        )
        transform = timm.data.create_transform(
            (chans, size, size), interpolation="bicubic", crop_pct=1.0, normalize=False
        )
        expected = transform(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(to_pixels(image, size, chans), expected, f"{width}x{height} to {size}")
    assert to_pixels(Image.new("RGB", (3, 60_000)), 200, 3).shape == (200, 200, 3), "a strip takes no memory"
