"""The list of runs: finished, unfinished, damaged."""

import json
import shlex
import shutil

from small_runs import confirm

from bmsn_zoo import runs as runs_module
from bmsn_zoo.results import TrainResult
from bmsn_zoo.usage import wrapped


def test_runs_are_listed_with_what_they_found_and_how_to_resume_them(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/opt/bin/bmsn-runs"])
    assert runs_module.main([]) == 2
    assert (
        capsys.readouterr().err
        == "error: no runs in runs: start one with bmsn-search, or give the folder they are in\n"
    )

    shutil.copytree(runs.search, "runs/search-compass-m2-s0")
    shutil.copytree(runs.default, "runs/train-compass-4-3-3-s0-with-a-name-that-is-long-enough")
    shutil.copytree(runs.search, "runs/killed")
    state = json.loads((tmp_path / "runs/killed/run.json").read_text())
    (tmp_path / "runs/killed/run.json").write_text(json.dumps({**state, "finished": False}))
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/run.json").write_text("{")
    (tmp_path / "runs/trackio").mkdir()  # no run
    assert runs_module.main([]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert all(len(line) <= 80 for line in printed.splitlines() if "damaged" not in line), printed
    assert "found " in lines["runs/search-compass-m2-s0"] and lines["runs/search-compass-m2-s0"].endswith("  finished")
    assert lines["runs/killed"].endswith("  1 of 1 epochs")
    assert "  resume it:\n    bmsn-search --output runs/killed --resume\n" in printed
    assert "damaged: run.json" in printed
    long, below = printed[printed.index("runs/train-") :].splitlines()[:2]
    assert long == "runs/train-compass-4-3-3-s0-with-a-name-that-is-long-enough"
    accuracy = TrainResult.read(runs.default / "metrics.json").test_accuracy
    assert f"4-3-3, {100 * accuracy:.2f} % on test" in below
    assert below.index("compass") == lines["folder"].index("data"), "columns are aligned"


def test_a_confirmed_search_is_listed_with_what_its_layout_reached_alone(runs, tmp_path):
    folder = shutil.copytree(runs.search, tmp_path / "run")
    for p_value, said in ((0.004, "found 5-3-2, 55.00 % alone"), (0.3, "keeps 4-3-3, 50.00 % alone")):
        confirm(folder, p_value)
        assert runs_module.describe_run(folder)[0][2] == said


def test_long_commands_are_broken_within_80_columns_and_can_be_copied():
    command = (
        f"accelerate launch train.py --from-search 'runs/my photos of {'y' * 20} --b' --pick best_within_default_macs"
    )
    broken = wrapped(command)
    assert (
        broken.count("\n") == 2
        and "--b'" in broken.splitlines()[1]
        and all(len(line) <= 80 for line in broken.splitlines())
    )
    assert shlex.split(broken.replace("\\\n", "")) == shlex.split(command)
    assert wrapped("bmsn-runs") == "    bmsn-runs"
