"""Curves in real trackers: every point once, whenever the run was interrupted, and nothing over the network."""

import importlib.util
import json
import socket

import pytest

from bmsn_zoo import searching, training
from bmsn_zoo.run_folder import RunFolder

SEARCH = (searching, ["--mixture-size", "2"])
TRAIN = (training, ["--layout", "4-3-3"])


def tensorboard_curves(home, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(home / name / "tensorboard"))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def trackio_curves(home, name):
    from trackio.sqlite_storage import SQLiteStorage

    assert (home / "trackio" / "bmsn_zoo.db").exists(), "beside the run"
    curves = {}
    for row in SQLiteStorage.get_logs("bmsn_zoo", name):
        for tag in row.keys() - {"step", "timestamp"}:
            curves.setdefault(tag, []).append((row["step"], row[tag]))
    return curves


CURVES = {"tensorboard": tensorboard_curves, "trackio": trackio_curves}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Of all these runs: trackio reads once where its tables are."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(("tracker", "kind"), [("tensorboard", SEARCH), ("trackio", TRAIN)])
def test_a_run_that_is_killed_between_point_and_checkpoint_continues_its_curves(
    tracker, kind, home, image_folder, monkeypatch, capsys
):
    (module, own), name = kind, f"{tracker[:5]}-run"
    arguments = ["--dataset", str(image_folder), "--batch-size", "16", "--epochs", "3", "--mixed-precision", "no"]
    arguments += ["--threads", "1", *own, "--output", str(home / name)]
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something was sent"))
        patch.setattr(RunFolder, "complete_checkpoint", dying(RunFolder.complete_checkpoint, 2))
        with pytest.raises(KeyboardInterrupt):
            module.main([*arguments, "--report-to", tracker])
        steps = {step for step, _ in CURVES[tracker](home, name)["loss"]}
        assert steps == {1, 2}, "the second epoch was shown, and will be again"
        patch.undo()
        assert module.main([*arguments, "--resume"]) == 0, "the tracker is remembered"
    rows = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
    curves = CURVES[tracker](home, name)
    for key in ("loss", "lr", "score_accuracy" if module is searching else "train_accuracy"):
        assert [step for step, _ in curves[key]] == [1, 2, 3]
        assert [value for _, value in curves[key]] == pytest.approx([row[key] for row in rows])
    if module is searching:
        assert [value for _, value in curves["draws/1"]] == [row["draws"][1] for row in rows]
        assert tracker == "trackio" or [step for step, _ in curves["by_spent_gmacs/loss"]] == [
            row["spent_macs"] // 10**9 for row in rows
        ]
    assert "* " not in capsys.readouterr().out, "only the result is printed"
    if tracker == "tensorboard":
        (told,) = (home / name / "tensorboard").glob("*/hparams.yml")
        assert "seed: 0" in told.read_text()
    else:
        import trackio

        (run,) = [run for run in trackio.Api().runs("bmsn_zoo") if run.name == name]
        assert run.config["seed"] == 0


def dying(method, epoch):
    def call(self, number, accelerator):
        if number == epoch:
            raise KeyboardInterrupt
        method(self, number, accelerator)

    return call


def test_a_tracker_that_is_not_there_or_would_send_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "board" in name else real(name, *a))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/mine")
    for tracker, said in {
        "tensorboard": 'report-to tensorboard: it is not installed: pip install "bmsn_zoo[trackers]"',
        "trackio": "report-to trackio: curves stay on this machine, and TRACKIO_SPACE_ID is set: unset it",
        "paper": "report-to 'paper' is unknown: use tensorboard, trackio or wandb",
    }.items():
        assert searching.main(["--report-to", tracker, "--output", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == f"error: {said}\n"
    assert not any(tmp_path.iterdir())
