"""The benchmark that decisions rest on still runs; its numbers are committed, not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.slow
@pytest.mark.long
def test_search_speed_measures_what_is_asked_and_keeps_the_rest(tmp_path):
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"loading": "measured before"}))
    settings = ["--images", "256", "--steps", "1", "--repeats", "1", "--mixed-precision", "no"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "search_speed.py", *settings, "--output", output]
        + ["--only", "search_step", "share_of_bare_convolutions", "time_of_a_step"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=180,
    )
    kept = json.loads(output.read_text())
    assert kept.pop("loading") == "measured before"
    assert list(kept) == ["search_step", "share_of_bare_convolutions", "time_of_a_step"]
    step, share, parts = (part["result"] for part in kept.values())
    assert 0 < step["smallest"] <= step["ratio"] <= step["largest"]
    assert step["plain_seconds"] > 0 and step["our_seconds"] > 0
    assert share["median"] > 0
    assert sum(parts.values()) == pytest.approx(1, abs=0.01)
    assert parts["convolutions"] > 0.1 and parts["batch normalisation"] > 0.01
    assert kept["search_step"]["environment"]["precision"] == "fp32"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path):
    for part in json.loads(path.read_text()).values():
        environment = part["environment"]
        assert {"command", "threads", "precision", "hardware", "versions", "commit"} <= set(environment)
        assert not any(word.startswith("/") for word in environment["command"])
