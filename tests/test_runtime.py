import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bmsn_zoo import InputError, runtime
from bmsn_zoo.runtime import native_precision, run_command, usable_cores

# Importing takes long, so one process does it and forks another for each case: settings, precision before, variables.
START = """
import json, os, sys, torch
from bmsn_zoo import runtime
from bmsn_zoo.config import DataConfig

def run(settings, before):
    accelerator = runtime.start(DataConfig(**settings), before)
    print(json.dumps(runtime.describe(accelerator)))

for name, (settings, before, environment) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        os.environ.update(environment)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        sys.exit(runtime.run_command(lambda: run(settings, before)))
    with open(f"{sys.argv[2]}/{name}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
CASES = {
    "launched": ({}, None, {}),
    "asked": ({"threads": 1, "mixed_precision": "no"}, "bf16", {}),
    "by launcher": ({}, None, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "resumed": ({}, "no", {"LOCAL_WORLD_SIZE": "2"}),
    "fp16": ({"mixed_precision": "fp16"}, None, {}),
    "strangers": ({}, None, {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_CPU": "false"}),
}
# what `accelerate launch` exports on a CPU when it was asked for nothing
LAUNCHER = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Output, error and exit code of every case."""
    folder = tmp_path_factory.mktemp("processes")
    names = ("ACCELERATE_", "OMP_NUM", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    subprocess.run(
        [sys.executable, "-c", START, json.dumps(CASES), str(folder)],
        env={**inherited, **LAUNCHER, "PYTHONPATH": str(Path(runtime.__file__).parents[1])},
        check=True,
        timeout=100,
    )
    results = {}
    for name in CASES:
        output, error, code = ((folder / f"{name}.{end}").read_text() for end in ("out", "err", "code"))
        results[name] = (output, error, int(code))
    return results


def described(result):
    output, error, code = result
    assert code == 0, error
    return json.loads(output)


pytestmark = pytest.mark.timeout(120)


def test_launched_process_uses_all_cores_and_what_the_device_computes_natively(processes):
    found = described(processes["launched"])
    assert found["threads"] == usable_cores()
    assert found["precision"] == {"bf16": "bf16", "no": "fp32"}[native_precision(torch.device("cpu"))]
    assert (found["processes"], found["device"]) == (1, "cpu")
    assert f"{os.cpu_count()} cores" in found["hardware"]
    assert {"bmsn_zoo", "python", "torch", "timm", "accelerate"} <= set(found["versions"])


def test_threads_and_precision_that_were_asked_for_win(processes):
    found = described(processes["asked"])
    assert (found["threads"], found["precision"]) == (1, "fp32")


def test_precision_that_the_launcher_was_asked_for_is_taken(processes):
    assert described(processes["by launcher"])["precision"] == "bf16"


def test_resumed_run_keeps_its_precision_and_local_processes_share_the_cores(processes):
    found = described(processes["resumed"])
    assert found["precision"] == "fp32"
    assert found["threads"] == max(1, usable_cores() // 2)


def test_fp16_needs_a_gpu(processes):
    output, error, code = processes["fp16"]
    assert code == 2
    assert error == "error: mixed-precision fp16 needs a GPU, this is cpu: use bf16 or no\n"
    assert not output


@pytest.mark.skipif(torch.cuda.is_available(), reason="these two processes would find each other on GPUs")
def test_processes_that_do_not_know_of_each_other_are_refused_with_the_fix(processes):
    output, error, code = processes["strangers"]
    assert code == 2
    assert error.startswith("error: 2 processes were started that do not know of each other")
    assert "ACCELERATE_USE_CPU=true torchrun" in error
    assert error.count("\n") == 1
    assert not output


def test_native_precision_follows_the_processor():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("this system does not list its processor's flags")
    found = native_precision(torch.device("cpu"))
    assert found in ("bf16", "no")
    assert (found == "bf16") == bool({"avx512_bf16", "amx_bf16"} & set(flags))
    assert native_precision(torch.device("meta")) == "no"


def test_users_mistake_is_one_line_and_exit_code_2(capsys):
    def wrong():
        raise InputError("epochs 0 is too small")

    assert run_command(wrong) == 2
    assert capsys.readouterr().err == "error: epochs 0 is too small\n"
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().err == ""


def test_our_mistakes_are_not_hidden():
    def wrong():
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run_command(wrong)


def test_only_the_first_process_speaks(capsys, monkeypatch):
    def wrong():
        raise InputError("epochs 0 is too small")

    monkeypatch.setenv("RANK", "1")
    assert run_command(wrong) == 2
    assert capsys.readouterr().err == ""
