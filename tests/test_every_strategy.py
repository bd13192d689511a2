"""Every strategy and plan on a slice of CIFAR-10: killed in a second epoch and resumed, it ends alike to the bit."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bmsn_zoo import report, searching
from bmsn_zoo.config import RELAXED
from bmsn_zoo.step import Lag
from bmsn_zoo.strategies import STRATEGIES
from bmsn_zoo.trials import PLANS

DATA = Path(__file__).parents[2] / "shared" / "datasets" / "cifar10" / "plain_text"
SETTINGS = "--image-size 16 --batch-size 32 --epochs 2 --max-macs 0.66x --confirm 0 --threads 1 --jobs 1 --no-latency"
STEPS = 4  # of an epoch
CASES = [f"--strategy {name} --mixture-size 2" for name in STRATEGIES]
CASES += [f"--strategy {name}" for name in RELAXED]
CASES += [f"--strategy {name} --trials 3" for name in PLANS]
CASES += ["--mixture-size 2 --scores pairs", "--mixture-size 2 --rate-decay cost", "--strategy darts --sharing same"]
CASES += ["--strategy uniform --draws permutation --evaluate-every 1 --evaluate-last 2"]
CASES += ["--mixture-size 2 --max-macs default --confirm 2 --confirm-epochs 2"]
TIMES = {"duration_seconds", "segments", "seconds", "peak_memory_mib", "started"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not DATA.exists(), reason="needs CIFAR-10 in ../shared/datasets"),
]


def search(arguments, killed_at):
    """A search as a process of its own; at some step it kills itself, as nothing that it could notice."""
    steps, push = 0, Lag.push

    def counted(self, *given, **named):
        nonlocal steps
        if (steps := steps + 1) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return push(self, *given, **named)

    Lag.push = counted
    report.draw_search = report.draw_training = lambda folder: None  # pictures would take the most time
    os._exit(searching.main(arguments))


@pytest.fixture(scope="module")
def processes():
    """Where processes come from that have imported what they need, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bmsn_zoo.searching", "matplotlib.pyplot"])
    return context


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The first 256 training images, and as many test images, which nothing opens."""
    folder, splits = tmp_path_factory.mktemp("data") / "slice", {}
    for split in ("train", "test"):
        (file,) = DATA.glob(f"{split}-*.parquet")
        rows = next(pyarrow.parquet.ParquetFile(file).iter_batches(256))
        splits[split] = datasets.Dataset(pyarrow.Table.from_batches([rows]))
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def run(processes, *arguments, killed_at=0):
    process = processes.Process(target=search, args=([*map(str, arguments)], killed_at))
    process.start()
    process.join()
    return process.exitcode


def timeless(value):
    """Content of a result without what two equal runs differ in."""
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def result(folder):
    """All that a run found: its records without times, and its tensors and tables byte for byte."""
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.suffix in (".safetensors", ".csv"))
    records = sorted(file.relative_to(folder) for file in folder.rglob("*.json") if file.name != "run.json")
    rows = [*map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    found = {str(name): timeless(json.loads((folder / name).read_text())) for name in records}
    rows = sorted(timeless(rows), key=str)  # those of trainings stand in the order of their ends
    return rows, found, {str(name): (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("case", CASES)
def test_killed_in_its_second_epoch_and_resumed_it_ends_alike_to_the_bit(case, processes, images, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = ["--dataset", images, *SETTINGS.split(), *case.split()]
    assert run(processes, *settings, "--output", whole) == 0
    alone = "confirm-epochs" in case or any(f"--strategy {name} " in case for name in PLANS)
    epoch = 9 if "halving" in case else 3 if alone else 1  # of a training that is not the first, or of the search
    assert run(processes, *settings, "--output", broken, killed_at=STEPS * epoch + 2) == -signal.SIGKILL
    assert not (broken / "search.json").exists()
    assert run(processes, "--output", broken, "--resume") == 0
    assert len(json.loads((broken / "run.json").read_text())["segments"]) == 2
    for resumed, uninterrupted in zip(result(broken), result(whole), strict=True):
        assert resumed == uninterrupted
