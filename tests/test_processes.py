"""Real processes: launchers, several processes, kills, signals, and what reaches the terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from test_scripts import QUICK, found, search

from bmsn_zoo import SearchSpace, cost
from bmsn_zoo import training as train_module
from bmsn_zoo.config import TrainConfig
from bmsn_zoo.data import DataSource, stratified_split
from bmsn_zoo.evaluate import evaluate
from bmsn_zoo.model_folder import load_model

ROOT = Path(__file__).parents[1]


def run(script, *arguments, launcher=(sys.executable,), cwd=None, **environment):
    """Run one of our scripts as a process of its own; returns it with its output as text."""
    quick = ("--confirm", "0", "--no-latency") if script == "search.py" else ()
    return subprocess.run(
        [*launcher, str(ROOT / script), *quick, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=200,
    )


def torchrun(count):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "mixture"])
def test_two_processes_search_together(parallel, image_folder, tmp_path):
    output = tmp_path / "run"
    settings = ["--dataset", image_folder, *QUICK, "--threads", 1, "--parallel", parallel, "--output", output]
    settings += ["--report-to", "tensorboard"]
    done = run("search.py", *settings, launcher=torchrun(2), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "search.json").read_text())
    assert result["segments"][0]["processes"] == 2
    assert len(list((output / "tensorboard").glob("events*"))) == 1, "the main process alone shows curves"
    assert len(result["ranking"]) == 36
    scores = torch.tensor(result["scores"])
    assert sorted(set((scores != 1).sum(0).tolist())) != [0], "no score was ever updated"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(sum(row["draws"]) == 2 for row in rows)
    if parallel == "mixture":
        assert all(row["draws"] == [1, 1] for row in rows), "every process trains a supernet of its own"
        space = SearchSpace("bmsn_resnet20")
        drawn = [space.macs(space[layout], 16) for layout, _ in (scores != 1).nonzero().tolist()]
        assert len(drawn) == 4, "a layout was drawn twice: take another seed"
        assert result["spent_macs"] == 4 * 16 * sum(drawn) + 2 * 32 * cost.tree_macs(space, 16), "of both processes"
        return
    # shards of a batch normalise on their own, but draws and batches are those of one process
    single = search(image_folder, tmp_path / "single")
    singles = [json.loads(line) for line in (tmp_path / "single" / "metrics.jsonl").read_text().splitlines()]
    assert [rows[0][key] for key in ("draws", "spent_macs")] == [singles[0][key] for key in ("draws", "spent_macs")]
    assert result["dataset"]["fingerprint"] == single["dataset"]["fingerprint"]


@pytest.mark.parametrize(
    ("processes", "ema_decay"),
    [(1, 0.9), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(2, 0.9, marks=pytest.mark.slow)],
)
def test_the_recorded_accuracy_is_that_of_the_saved_weights(processes, ema_decay, tmp_path):
    """Processes normalise by their own shards, but one network is held out, tested and saved."""
    output = tmp_path / "run"
    settings = ["--layout", "2-2-6", "--epochs", 1, "--batch-size", 64, "--limit", 1040, "--holdout", 0.25]
    settings += [
        "--image-size",
        16,
        "--ema-decay",
        ema_decay,
        "--mixed-precision",
        "no",
        "--output",
        output,
    ]  # two batches of each part
    if processes == 1:
        assert train_module.main([*map(str, settings)]) == 0
    else:
        done = run("train.py", *settings, launcher=torchrun(2), ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["segments"][0]["processes"] == processes

    source = DataSource(TrainConfig(limit=1040, image_size=16), 1)
    data, test = source.train(), source.test()
    _, held = stratified_split(data.images.labels.numpy(), 0.25, 0, "")
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    model = load_model(output / "model")
    for images, recorded in ((test.images, metrics["test_loss"]), (data.images.select(held), last["holdout_loss"])):
        measured = evaluate(model, images, data.mean, data.std, Accelerator())
        assert measured["loss"] == pytest.approx(recorded, rel=1e-5)


@pytest.mark.slow
def test_statistics_are_the_mean_over_the_processes(image_folder, tmp_path):
    """Of a batch in two shards the mean is that of the whole, as long as the weights hardly move."""
    settings = ["--dataset", image_folder, "--layout", "5-3-2", "--epochs", 1, "--batch-size", 16, "--lr", 1e-9]
    settings += ["--mixed-precision", "no", "--weight-decay", 0, "--no-flip", "--output"]
    means = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        done = run("train.py", *settings, output, launcher=torchrun(processes), ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        state = load_file(output / "model" / "model.safetensors")
        means.append(state["bn1.running_mean"])  # of what no other normalisation came before
    torch.testing.assert_close(*means, rtol=1e-3, atol=1e-5)


def launched(tmp_path, **content):
    """A launcher with a file as `accelerate config` writes it."""
    alone = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_machines": 1, "num_processes": 1}
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({**alone, **content}))
    return (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file))


@pytest.mark.slow
def test_one_launched_process_uses_all_cores(image_folder, tmp_path):
    """accelerate's launcher exports OMP_NUM_THREADS=1 unasked."""
    launcher = launched(tmp_path, use_cpu=True, debug=True, enable_cpu_affinity=True, mixed_precision="bf16")
    settings = ["--dataset", image_folder, *QUICK[:-2], "--epochs", 1, "--output", "run"]
    done = run("search.py", *settings, launcher=launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    segment = json.loads((tmp_path / "run" / "search.json").read_text())["segments"][0]
    assert segment["threads"] == len(os.sched_getaffinity(0))
    assert segment["precision"] == "fp32", "the flag wins over the file"
    script = os.path.relpath(ROOT / "train.py", tmp_path)
    assert f" accelerate launch {script} --from-search run\n" in done.stdout, "from where it was started"


@pytest.mark.slow
def test_training_compiles_where_the_file_says_so(image_folder, tmp_path):
    """By a backend that needs no compiler."""
    launcher = launched(tmp_path, use_cpu=True, dynamo_config={"dynamo_backend": "EAGER"})
    settings = ["--dataset", image_folder, "--layout", "5-3-2", "--epochs", 1, "--batch-size", 16]
    done = run("train.py", *settings, "--output", tmp_path / "run", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["segments"][0]["compiled"] == "eager"


@pytest.mark.slow
def test_fsdp_is_refused_where_it_is_known(image_folder, tmp_path):
    """By torchrun inside accelerate's launcher, whose own report follows our line."""
    launcher = launched(tmp_path, distributed_type="FSDP", use_cpu=False, fsdp_config={"fsdp_version": 1})
    settings = ["--dataset", image_folder, *QUICK, "--output", tmp_path / "run"]
    done = run("search.py", *settings, launcher=(*launcher, "--main_process_port", "0"))
    assert "error: ACCELERATE_USE_FSDP=true is not supported: launch on one device" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def alive(pids):
    """Those of some processes that still run."""
    return [pid for pid in pids if (stat := Path(f"/proc/{pid}/stat")).exists() and ") Z" not in stat.read_text()]


def descendants(pid):
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *descendants(child)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_run_and_its_readers_at_once_with_one_line(number, image_folder, tmp_path):
    output = tmp_path / "run"
    script, *settings = (
        ("search.py", "--mixture-size", 2) if number == signal.SIGINT else ("train.py", "--layout", "5-3-2")
    )
    settings += ["--dataset", image_folder, "--epochs", 500, "--batch-size", 16, "--memory-limit", 0, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, settings), "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1"},  # left over, so it silences nothing
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: list(output.glob("checkpoint-*/complete.json")))
    until(lambda: descendants(process.pid))
    readers = descendants(process.pid)
    process.send_signal(number)
    error = process.communicate(timeout=10)[1]
    assert process.returncode == 128 + number
    last = error.splitlines()[-1]
    epochs = re.fullmatch(
        rf"ended by {number.name}; epoch (\d+) was the last whole one: start again with --output {output} --resume",
        last,
    )
    assert (output / f"checkpoint-{epochs[1]}" / "complete.json").exists()
    assert "Traceback" not in error
    until(lambda: not alive(readers), 3)


@pytest.mark.slow
def test_processes_end_when_their_launcher_is_lost(image_folder, tmp_path):
    output = tmp_path / "run"
    settings = ["--dataset", image_folder, *QUICK, "--epochs", 500, "--output", output]
    with (tmp_path / "error").open("w") as file:
        launcher = subprocess.Popen(
            [*torchrun(2), str(ROOT / "search.py"), *map(str, settings)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
            stderr=file,
        )
    until(lambda: list(output.glob("checkpoint-*/complete.json")))
    workers = descendants(launcher.pid)
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait()
    until(lambda: not alive(workers), 10)
    error = (tmp_path / "error").read_text()
    assert "Traceback" not in error
    assert error.count("ended by the end of its launcher; epoch ") == 1


EACH = """
import os, sys
from bmsn_zoo.searching import main
sys.exit(main([*sys.argv[1:], "--epochs", "0" if os.environ["RANK"] == "1" else "2"]))
"""


@pytest.mark.slow
def test_error_of_a_later_process_is_said_and_ends_the_first_which_waits_for_it(image_folder, tmp_path):
    (tmp_path / "each.py").write_text(EACH)
    settings = ["--dataset", image_folder, *QUICK, "--output", tmp_path / "run"]
    done = run(tmp_path / "each.py", *settings, launcher=torchrun(2), ACCELERATE_USE_CPU="true")
    assert done.stderr.count("error: [rank 1] epochs 0 is too small") == 1
    assert "ended by SIGTERM\n" in done.stderr
    assert not (tmp_path / "run").exists()


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
def test_full_disk_is_one_line(image_folder, tmp_path):
    """A limit on the size of files stands in for a full disk: weights do not fit, text does."""
    settings = ["--dataset", image_folder, "--layout", "5-3-2", "--batch-size", 16, "--output", tmp_path / "run"]
    done = run("train.py", *settings, launcher=(sys.executable, "-c", LIMITED, sys.executable))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'run' / 'checkpoint-1' / 'model.safetensors'}: File too large: make room, or choose a "
        f"place that can be written; no epoch was whole yet: start again with --output {tmp_path / 'run'} --resume"
    )


@pytest.mark.parametrize(
    "command",
    [
        "hub",
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ("search", "train", "evaluate", "report", "compare", "predict")
        ),
    ],
)
def test_help_and_mistaken_settings_are_answered_without_torch(command, tmp_path):
    """No time is measured: what takes it is not imported."""
    runs = command in ("search", "train")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    console = tmp_path / f"bmsn-{command}"  # as pip writes it for what pyproject.toml declares
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        console.name
    ].partition(":")
    console.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    for start in [["-m", module], [str(console)]] + [[str(ROOT / f"{command}.py")]] * runs:
        usage = f"python -m {module}" if start[0] == "-m" else Path(start[0]).name
        cases = [(["--help"], 0, f"usage: {usage} ")]
        if runs:
            cases += [
                (["--epoch", "3"], 2, "error: unknown argument '--epoch': did you mean --epochs?\n"),
                (["--recipe", "digits-resnet20", "--lr", "x"], 2, "error: lr 'x' is not a number\n"),
            ]
        for arguments, code, expected in cases:
            done = subprocess.run(
                [sys.executable, *start, *arguments], capture_output=True, text=True, env=environment, timeout=60
            )
            assert done.returncode == code
            assert (done.stdout or done.stderr).startswith(expected)
            if code == 0:
                launched = "accelerate launch " * runs
                prefix = f"{launched or 'python '}-m bmsn_zoo." if start[0] == "-m" else "bmsn-"
                prefix = launched if start[0].endswith(".py") else prefix
                assert f"\n  {prefix}{command}" in done.stdout.partition("example:")[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["search.py", "train.py"])
def test_killed_and_resumed_equals_uninterrupted(script, image_folder, tmp_path):
    settings = ["--dataset", image_folder, "--epochs", 6, "--batch-size", 16, "--mixed-precision", "no"]
    settings += ["--threads", 1] + (
        ["--mixture-size", 2, "--confirm", 0] if script == "search.py" else ["--layout", "5-3-2"]
    )
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


def test_mistake_is_one_line_of_utf8_in_any_locale(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("search:\n  epöchs: 3\n", encoding="utf-8")
    locale = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = run("search.py", "--recipe", recipe, "--output", tmp_path / "run", **locale)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: recipe {recipe} has the unknown setting 'epöchs': did you mean epochs?"
    ]
    assert not (tmp_path / "run").exists()
