"""Runs over two hosts: network namespaces with a wire between them, and homes and caches of their own."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import QUICK, found

ROOT = Path(__file__).parents[1]
ALONE = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c")
WIRE = """
set -e
mount -t tmpfs none /run
for n in 0 1; do ip netns add host$n; ip -n host$n link set lo up; done
ip link add wire netns host0 type veth peer name wire netns host1
for n in 0 1; do ip -n host$n addr add 10.77.0.1$n/24 dev wire; ip -n host$n link set wire up; done
set +e
"""
BOTH = "for n in 0 1; do (ip netns exec host$n bash host$n.sh > said$n 2>&1; echo $? > code$n) & done; wait"


def can_make_hosts():
    return shutil.which("ip") and subprocess.run([*ALONE, WIRE], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_hosts(), reason="needs network namespaces"),
]


CONFIRMED = ("--confirm", 2, "--confirm-epochs", 1, "--max-macs", "default")  # which comes after --confirm 0 and wins


def start(base, *arguments, output="run", second=()):
    """Start a search on both hosts, as accelerate's documentation says; the second one may be given more."""
    for rank in (0, 1):
        home = base / f"home{rank}"
        home.mkdir(exist_ok=True)
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", 2, "--num_processes", 2]
        launch += ["--main_process_ip", "10.77.0.10", "--main_process_port", 29501, "--machine_rank", rank]
        search = [
            ROOT / "search.py",
            "--confirm",
            0,
            "--no-latency",
            *arguments,
            *(second if rank else ()),
            "--output",
            output,
        ]
        command = shlex.join(map(str, [sys.executable, "-m", *launch, *search]))
        own = f"HOME={home} HF_HOME={home}/hf HF_DATASETS_CACHE={home}/hf/datasets GLOO_SOCKET_IFNAME=wire"
        (base / f"host{rank}.sh").write_text(f"cd {home}; {own} exec {command}\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([*ALONE, WIRE + BOTH], cwd=base, env=environment)


def search(base, *arguments, **more):
    """A search on both hosts; exit codes, and our own last lines of what each said."""
    start(base, *arguments, **more).wait(280)
    said = [(base / f"said{rank}").read_text() for rank in (0, 1)]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in "".join(said)
    codes = [int((base / f"code{rank}").read_text()) for rank in (0, 1)]
    return codes, [[line for line in text.splitlines() if line.startswith("error: ")] for text in said], said


def test_search_over_two_hosts_resumes_where_the_first_one_left_it(image_folder, tmp_path):
    settings = ["--dataset", image_folder, *QUICK, "--epochs", 6, *CONFIRMED]
    codes, _, said = search(tmp_path, *settings, "--output", "whole", output="whole")
    assert codes == [0, 0], said
    process, run = start(tmp_path, *settings), tmp_path / "home0" / "run"
    deadline = time.monotonic() + 280
    while not list(run.glob("checkpoint-[2345]/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (run / "search.json").exists(), "the run ended before it was killed"
    assert not (tmp_path / "home1" / "run").exists(), "only the first host writes"

    started = time.monotonic()
    codes, errors, said = search(tmp_path, "--resume", *CONFIRMED)
    assert all(codes) and time.monotonic() - started < 200
    assert "copy the first host's run there, or use a shared disk" in errors[1][0], said
    assert errors[0] == ["error: process 1, on another host, was refused: it says why"]

    shutil.copytree(run, tmp_path / "home1" / "run")
    codes, _, said = search(tmp_path, "--resume", *CONFIRMED)
    assert codes == [0, 0], said
    whole, resumed = (json.loads((run.with_name(name) / "search.json").read_text()) for name in ("whole", "run"))
    assert found(resumed) == found(whole) and resumed["confirmed"] == whole["confirmed"]
    assert whole["confirmed"]["from_supernet"], "though the second host sees no file of the search"
    assert len(resumed["segments"]) == 2
    expected, actual = (load_file(run.with_name(name) / "supernets.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_mixture_parallel_needs_a_shared_disk(image_folder, tmp_path):
    settings = ["--dataset", image_folder, *QUICK, "--parallel", "mixture", *CONFIRMED]
    codes, errors, said = search(tmp_path, *settings)
    assert all(codes)
    assert errors[0] == [
        "error: parallel mixture: every host saves the supernets that it trains, but not all see run: "
        "give an --output on a shared disk, or --parallel data"
    ], said
    assert errors[1] == [errors[0][0].replace("error: ", "error: [rank 1] ")], said
    assert not list(tmp_path.glob("home?/run"))

    codes, _, said = search(tmp_path, *settings, output=tmp_path / "shared")
    assert codes == [0, 0], said
    result = json.loads((tmp_path / "shared" / "search.json").read_text())
    assert len(result["ranking"]) == 18 and result["confirmed"]["from_supernet"]
    assert result["segments"][0]["processes"] == 2


def test_hosts_that_were_started_differently_are_told_so(image_folder, tmp_path):
    codes, errors, said = search(tmp_path, "--dataset", image_folder, *QUICK, second=["--lr", 0.2])
    assert all(codes)
    expected = "process 1 was started with other settings, lr 0.05 (there 0.2): start all hosts alike"
    assert errors == [[f"error: {expected}"], [f"error: [rank 1] {expected}"]], said
