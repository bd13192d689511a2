"""What a run says of itself: tried without a trace, quietly, at length, and on a real terminal."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bmsn_zoo import progress, searching, training

pty = pytest.importorskip("pty", reason="no terminals here")
ROOT = Path(__file__).parents[1]
QUICK = ["--batch-size", "16", "--epochs", "2", "--mixed-precision", "no", "--threads", "1"]
RUNS = {
    "search": (searching, ["--mixture-size", "2", "--confirm", "2"], "36, the dearest 8-1-1 with "),
    "one step an epoch": (searching, ["--limit", "32", "--confirm", "2", "--confirm-epochs", "1"], "36, the dearest"),
    "relaxed": (searching, ["--strategy", "darts"], "36, the dearest 8-1-1"),
    "plan": (searching, ["--strategy", "halving"], "36, the dearest 8-1-1"),
    "training": (training, ["--layout", "4-3-3"], "4-3-3 with 10.2 M MACs\n"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(name, image_folder, tmp_path, monkeypatch, capsys, caplog):
    module, arguments, layouts = RUNS[name]
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", str(image_folder), *QUICK, *arguments, "--dry-run"]
    loud = {"search": ["--verbose"], "relaxed": ["--quiet"]}.get(name, [])
    assert module.main([*arguments, *loud]) == 0
    printed = capsys.readouterr().out
    assert f"layouts:  {layouts}" in printed
    assert re.search(r"^time:     about \d+ (s|min) for all of it$", printed, re.M)
    assert int(re.search(r"^memory:   ([\d,]+) MiB", printed, re.M)[1].replace(",", "")) > 100
    assert "batch_size: 16\n" in printed and "seed: 0\n" in printed
    assert not any(tmp_path.iterdir())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("bmsn_zoo")]
    assert bool(said) == ("--quiet" not in loud)
    assert any(line.startswith("versions: bmsn_zoo") for line in said) == ("--verbose" in loud)
    assert any(re.match(r"epoch 1/2, step 1: loss", line) for line in said) == ("--verbose" in loud)
    if name == "training":
        (header,) = [line for line in said if line.startswith("train: ")]
        assert "layout 4-3-3 of bmsn_resnet20 at 16 pixels" in header and "8 steps in 2 epochs" in header
        assert any(line.startswith("device: cpu (") and "1 threads, fp32" in line for line in said)


def test_flags_that_contradict_each_other_are_refused(tmp_path, capsys):
    for flags, said in {
        ("--quiet", "--verbose"): "argument --verbose: not allowed with argument --quiet (see --help)",
        (
            "--dry-run",
            "--resume",
            "--output",
            "x",
        ): "dry-run tries a new run and leaves nothing behind: leave out --res",
    }.items():
        assert searching.main(list(flags)) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.slow
def test_a_terminal_has_one_live_line_for_the_whole_run_and_a_log_a_line_for_each_epoch(
    image_folder, tmp_path, capsys, caplog
):
    """The search, its evaluation and its confirmation."""
    settings = [
        "--dataset",
        str(image_folder),
        *QUICK,
        "--mixture-size",
        "1",
        "--confirm",
        "2",
        "--confirm-epochs",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    main, side = pty.openpty()
    command = [sys.executable, str(ROOT / "search.py"), *settings, "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side, env=environment)
    os.close(side)
    said = b""
    with pytest.raises(OSError):  # its end
        while part := os.read(main, 4096):
            said += part
    assert process.wait() == 0
    text = said.decode()
    live = [line for line in re.split(r"[\r\n]+", text) if " left" in line]
    assert any(re.search(r"epoch \d/2 +\d+%\|.*\d\d:\d\d left", line) for line in live), text
    assert all(len(line) <= 80 for line in live)
    assert not re.search(r"^epoch \d/2: loss", text, re.M), "epochs do not scroll"

    assert searching.main([*settings, "--output", str(tmp_path / "log")]) == 0
    assert "\r" not in capsys.readouterr().err
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert len(re.findall(r"^epoch \d/2: loss .*, \d+ s, \d+ s left$", said, re.M)) == 2, said
    assert len(re.findall(r"^[\d-]+ alone, epoch 1/1: loss", said, re.M)) == 2
    assert " 0 s left" not in said


def test_the_time_left_is_that_of_all_work(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress.begin(1000.0, done=400.0)
    progress.begin(5.0)  # a training within the run
    caplog.set_level("INFO", "bmsn_zoo")
    for _ in progress.Bar(range(4), 4, "epoch", work=100.0):
        now[0] += 5
    progress.tell("epoch 1")
    progress.reach(350.0, since=400.0)
    progress.tell("epoch 2")
    progress.reach(600.0, since=400.0)
    progress.tell("epoch 3")
    progress.end()
    progress.tell("after")
    # the first two steps do not count
    said = [record.getMessage() for record in caplog.records]
    assert said == ["epoch 1, 2 min left", "epoch 2, 8 s left", "epoch 3", "after"]
    assert [progress.duration(seconds) for seconds in (3.4, 89, 600, 9000)] == ["3 s", "89 s", "10 min", "2.5 h"]
