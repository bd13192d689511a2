"""Real processes: launchers, several processes, kills, signals, and what reaches the terminal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_scripts import QUICK, found, search

from bmsn_zoo import train as train_module
from bmsn_zoo.config import TrainConfig
from bmsn_zoo.data import DataSource, stratified_split
from bmsn_zoo.evaluate import evaluate
from bmsn_zoo.model_folder import load_model

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(240)


def run(script, *arguments, launcher=(sys.executable,), cwd=None, **environment):
    """Run one of our scripts as a process of its own; returns it with its output as text."""
    return subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=200,
    )


def torchrun(count):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))


@pytest.mark.parametrize("parallel", ["data", "mixture"])
def test_two_processes_search_together(parallel, image_folder, tmp_path):
    output = tmp_path / "run"
    settings = ["--dataset", image_folder, *QUICK, "--threads", 1, "--parallel", parallel, "--output", output]
    done = run("search.py", *settings, launcher=torchrun(2), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "search.json").read_text())
    assert result["segments"][0]["processes"] == 2
    assert len(result["ranking"]) == 36
    scores = torch.tensor(result["scores"])
    assert sorted(set((scores != 1).sum(0).tolist())) != [0], "no score was ever updated"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(sum(row["draws"]) == 2 for row in rows)
    if parallel == "mixture":
        assert all(row["draws"] == [1, 1] for row in rows), "every process trains a supernet of its own"
        return
    # shards of a batch normalise on their own, but draws and batches are those of one process
    single = search(image_folder, tmp_path / "single")
    singles = [json.loads(line) for line in (tmp_path / "single" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["draws"] == singles[0]["draws"]
    assert result["dataset"]["fingerprint"] == single["dataset"]["fingerprint"]


@pytest.mark.parametrize(("processes", "ema_decay"), [(1, 0.9), (2, 0), (2, 0.9)])
def test_the_recorded_accuracy_is_that_of_the_saved_weights(processes, ema_decay, tmp_path):
    """Processes normalise by their own shards, but one network is held out, tested and saved."""
    output = tmp_path / "run"
    settings = ["--layout", "2-2-6", "--epochs", 1, "--batch-size", 64, "--limit", 1040, "--holdout", 0.25]
    settings += ["--ema-decay", ema_decay, "--mixed-precision", "no", "--output", output]  # two batches of each part
    if processes == 1:
        assert train_module.main([*map(str, settings)]) == 0
    else:
        done = run("train.py", *settings, launcher=torchrun(2), ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["segments"][0]["processes"] == processes

    source = DataSource(TrainConfig(limit=1040), 1)
    data, test = source.train(), source.test()
    _, held = stratified_split(data.images.labels.numpy(), 0.25, 0, "")
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    model = load_model(output / "model")
    for images, recorded in ((test.images, metrics["test_loss"]), (data.images.select(held), last["holdout_loss"])):
        measured = evaluate(model, images, data.mean, data.std, Accelerator())
        assert measured["loss"] == pytest.approx(recorded, rel=1e-5)


def test_processes_that_do_not_know_of_each_other_are_refused(image_folder, tmp_path):
    settings = ["--dataset", image_folder, *QUICK, "--output", tmp_path / "run"]
    done = run("search.py", *settings, WORLD_SIZE="2", RANK="0", LOCAL_RANK="-1")
    assert done.returncode == 2
    assert "ACCELERATE_USE_CPU=true torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_launched_process_uses_all_cores(image_folder, tmp_path):
    """accelerate's launcher exports OMP_NUM_THREADS=1 unasked."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch")
    settings = ["--dataset", image_folder, *QUICK[:-2], "--epochs", 1, "--output", "run"]
    done = run("search.py", *settings, launcher=launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    segment = json.loads((tmp_path / "run" / "search.json").read_text())["segments"][0]
    assert segment["threads"] == len(os.sched_getaffinity(0))
    assert "retrain the winner:   accelerate launch train.py --from-search run" in done.stdout


def test_import_is_light_and_offline():
    """No network, none of the heavy packages that only the commands need."""
    code = (
        "import socket, sys, timm; known = set(sys.modules);"
        "socket.socket.connect = lambda *a: sys.exit('network');"
        "import bmsn_zoo; new = {m.split('.')[0] for m in set(sys.modules) - known};"
        "bad = new & {'datasets', 'accelerate', 'matplotlib', 'sklearn', 'pandas', 'scipy'};"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("script", ["search.py", "train.py"])
def test_killed_and_resumed_equals_uninterrupted(script, image_folder, tmp_path):
    settings = ["--dataset", image_folder, "--epochs", 6, "--batch-size", 16, "--mixed-precision", "no"]
    settings += ["--threads", 1] + (["--mixture-size", 2] if script == "search.py" else ["--layout", "5-3-2"])
    settings += ["--ema-decay", 0.9, "--mixup", 0.2, "--alternate-flip"] if script == "train.py" else []
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(script, *settings, "--output", whole).returncode == 0

    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, settings), "--output", str(broken)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(broken.glob("checkpoint-[23456]/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = "search.json" if script == "search.py" else "metrics.json"
    assert not (broken / result).exists(), "the run ended before it was killed"
    resumed = run(script, "--output", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr

    expected, actual = (json.loads((folder / result).read_text()) for folder in (whole, broken))
    assert len(actual["segments"]) == 2
    if script == "search.py":
        assert found(actual) == found(expected)
        weights = "supernets.safetensors"
    else:
        assert actual["test_loss"] == expected["test_loss"]
        weights = "model/model.safetensors"
    expected, actual = (load_file(folder / weights) for folder in (whole, broken))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    epochs = [json.loads(line)["epoch"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4, 5, 6]


def test_recipe_with_unknown_key_as_a_process(image_folder, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"dataset: {image_folder}\nsearch:\n  epoch: 3\n")
    done = run("search.py", "--recipe", recipe, "--output", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: recipe {recipe} has the unknown setting 'epoch': did you mean epochs?"
    ]
    assert not (tmp_path / "run").exists()
