"""Trials: trainings that are measured on held-out training images, and the plans that are made of them."""

import pytest

from bmsn_zoo import hub
from bmsn_zoo import train as train_module
from bmsn_zoo.errors import InputError
from bmsn_zoo.results import TrialResult
from bmsn_zoo.run_folder import load_tensors

COMMON = ("--batch-size", "16", "--epochs", "1", "--mixed-precision", "no")


def run(module, *arguments):
    """Call a command in this process; returns its exit code."""
    return module.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def closed(image_dataset, tmp_path_factory):
    """The images, with test images that cannot be read."""
    import datasets

    broken = {"bytes": b"no image", "path": None}
    features = image_dataset["train"].features
    bad = datasets.Dataset.from_dict({"image": [broken] * 8, "label": [0, 1, 2, 3] * 2}, features=features)
    folder = tmp_path_factory.mktemp("closed") / "compass"
    datasets.DatasetDict(train=image_dataset["train"], test=bad).save_to_disk(folder)
    return folder


def test_a_trial_is_measured_on_held_out_images_and_never_opens_the_test_images(closed, tmp_path, capsys):
    output = tmp_path / "trial"
    arguments = ("--dataset", closed, "--layout", "4-3-3", "--holdout", "0.5", "--measure", "holdout", *COMMON)
    assert run(train_module, *arguments, "--output", output) == 0
    assert "held-out training images (no test accuracy)" in capsys.readouterr().out
    result = TrialResult.read(output / "trial.json")
    right = load_tensors(output / "right.safetensors")["right"]
    assert len(right) == result.holdout_images == result.train_images == 32
    assert right.sum() / 32 == pytest.approx(result.holdout_accuracy)
    assert result.spent_macs == (3 * 32 + 32) * result.macs
    assert not (output / "metrics.json").exists() and not (output / "model").exists()
    with pytest.raises(InputError, match="neither a model"):
        hub.push(output, "someone/something")
    with pytest.raises(InputError):
        hub.add(output, "bmsn_resnet20_trial", zoo=tmp_path / "zoo")


@pytest.mark.parametrize(
    "extra",
    [(), ("--holdout", "0.5", "--onnx"), ("--holdout", "0.5", "--push-to-hub", "someone/something")],
    ids=["nothing held out", "onnx", "push"],
)
def test_what_a_trial_cannot_do_is_one_line(extra, closed, tmp_path, capsys):
    output = tmp_path / "trial"
    assert (
        run(train_module, "--dataset", closed, "--measure", "holdout", "--layout", "4-3-3", *extra, "--output", output)
        == 2
    )
    assert capsys.readouterr().err.startswith("error: measure holdout")
    assert not output.exists()
