"""How classes fare: what a training records, and what the page makes of several."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bmsn_zoo.config import shipped_folder
from bmsn_zoo.evaluate import count_classes
from bmsn_zoo.page import write_page
from bmsn_zoo.results import TrainResult

# class 1 is taken for class 0 twice and for class 2 once; class 2 has no images
LABELS, FOUND = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 0, 2, 1])


def test_counts_are_those_of_the_images():
    counts = count_classes(LABELS, FOUND, 3)
    assert counts["class_images"] == [2, 4, 0] and counts["class_right"] == [1, 1, 0]
    assert counts["confused"] == [[1, 0, 2], [0, 1, 1], [1, 2, 1]], "the most frequent first"


@pytest.fixture(scope="module")
def recorded():
    """Results of the zoo, with made counts of their ten classes, by their name and what class 3 loses."""

    def make(name, lost, **changed):
        result = TrainResult.read(shipped_folder("hub_configs") / name / "metrics.json")
        labels = torch.arange(10_000) % 10
        found = labels.clone()
        found[3 : 10 * lost : 10] = 5  # cats that are taken for dogs
        return TrainResult(**{**dict(result), **count_classes(labels, found, 10), **changed})

    return make


def page(tmp_path, *results):
    from bmsn_zoo.epochs import TrainEpoch

    rows = [TrainEpoch(epoch=1, loss=1.0, train_accuracy=0.5, holdout_accuracy=None)]
    write_page(
        [(Path(f"runs/{number}"), result, rows) for number, result in enumerate(results)], tmp_path / "page.html"
    )
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_sets_a_found_layout_against_the_default(recorded, tmp_path):
    found, default = recorded("bmsn_resnet20_cifar10", 100), recorded("bmsn_resnet20_cifar10_default", 300)
    again = recorded("bmsn_resnet20_cifar10_default", 200)
    text = page(tmp_path, default, found, again)
    assert f"Every class: {found.layout} against the default 4-3-3" in text
    assert f"1 training of {found.layout} and 2 of 4-3-3" in text
    assert '<th scope="row">cat</th><td>90.00 %</td><td>75.00 %</td><td><strong>+15.0</strong></td>' in text, (
        "seeds together"
    )
    assert '<th scope="row">cat</th><td>dog</td><td>100</td><td>250</td>' in text, "a training's mean"
    assert "Every class" not in page(tmp_path, default, again), "nothing to compare"
    other = found.dataset.model_copy(update={"test_fingerprint": "0" * 64})
    elsewhere = found.model_copy(update={"dataset": other})
    assert "Every class" not in page(tmp_path, default, elsewhere), "other test images"


@pytest.mark.parametrize(
    "changed",
    [{"class_right": [10_000] * 10}, {"class_images": [1] * 10}, {"class_right": None}, {"confused": [[0, 10, 1]]}],
)
def test_counts_that_do_not_fit_are_refused(changed, recorded):
    with pytest.raises(ValidationError):
        recorded("bmsn_resnet20_cifar10", 1, **changed)


def test_counts_are_read_as_they_were_written(recorded, tmp_path):
    result = recorded("bmsn_resnet20_cifar10", 7)
    result.write(tmp_path / "metrics.json")
    assert TrainResult.read(tmp_path / "metrics.json") == result
    assert json.loads((tmp_path / "metrics.json").read_text())["confused"] == [[3, 5, 7]]
