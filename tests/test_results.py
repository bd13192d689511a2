"""Result files: what is read back is what was written, and nothing malformed is."""

import json
import time
from pathlib import Path

import pytest

from bmsn_zoo import InputError
from bmsn_zoo.config import shipped_folder
from bmsn_zoo.results import SearchResult, TrainResult

SHIPPED = shipped_folder("hub_configs")
SEARCH = Path(__file__).parents[1] / "results" / "searches" / "dev-pairs2-s100.json"  # of two supernets


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*/*s*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_shipped_results_are_written_as_they_are_read(file, tmp_path):
    if file.name == "config.json":
        return
    kind = SearchResult if file.name == "search.json" else TrainResult
    kind.read(file).write(tmp_path / file.name)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_layouts_are_picked_by_name_or_as_they_are():
    result = SearchResult.read(SEARCH)
    assert result.pick("best") == result.pick(result.ranking[0].layout) == result.ranking[0]
    assert result.pick("default").layout == "4-3-3"
    assert [result.place(entry.layout) for entry in result.ranking] == list(range(1, 37))
    with pytest.raises(InputError, match="pick 5-5 is none of the 36 layouts"):
        result.pick("5-5")


def parts(value, path=()):
    """Every key and index in JSON, all the way down."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from parts(inner, (*path, key))


BROKEN = [float("nan"), float("inf"), 10**400, -1, "x" * 9999, None, True, [], {}, [[[]]], {"\n": 1}, "\ud800"]


def test_nothing_malformed_is_read(tmp_path):
    """Any part of a result, replaced or dropped: it is read with a value that it may have, or it is one line."""
    started, refused = time.monotonic(), 0
    for kind, file in ((SearchResult, SEARCH), (TrainResult, SHIPPED / "bmsn_resnet20_cifar10" / "metrics.json")):
        content = json.loads(file.read_text())
        for number, path in enumerate(parts(content)):
            if len(path) > 1 and number % 7:
                continue
            changed = json.loads(json.dumps(content))
            home = changed
            for key in path[:-1]:
                home = home[key]
            if number % 5:
                home[path[-1]] = BROKEN[number % len(BROKEN)]
            else:
                del home[path[-1]]
            damaged = Path(tmp_path / "damaged.json")
            damaged.write_text(json.dumps(changed))
            try:
                kind.read(damaged)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
                assert len(str(error)) < 400 + len(str(tmp_path))
    assert refused > 100
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result["ranking"].pop(),
        lambda result: result["best"].update(accuracy=0.5),
        lambda result: result["accuracy_matrix"].pop(),
        lambda result: result["scores"][3].append(0.5),
        lambda result: result["pareto_front"][0].update(layout="5-5"),
        lambda result: result["settings"].update(lr=float("nan")),
        lambda result: result["dataset"]["mean"].pop(),
    ],
)
def test_what_contradicts_itself_is_refused(change, tmp_path):
    result = json.loads(SEARCH.read_text())
    change(result)
    (tmp_path / "search.json").write_text(json.dumps(result))
    with pytest.raises(InputError):
        SearchResult.read(tmp_path / "search.json")


def test_what_only_some_strategies_say_may_be_missing_and_must_be_json(tmp_path):
    result, file = json.loads(SEARCH.read_text()), tmp_path / "search.json"
    for key in ("assignment_matrix", "scores"):
        del result[key]
    file.write_text(json.dumps({**result, "spent_macs": 10**15, "details": {"visits": [[1, 2], []], "rung": None}}))
    read = SearchResult.read(file)
    assert (read.assignment_matrix, read.scores, read.spent_macs) == (None, None, 10**15)
    read.write(tmp_path / "again.json")
    assert SearchResult.read(tmp_path / "again.json") == read
    for wrong in ({"details": {"w": [float("nan")]}}, {"details": []}, {"spent_macs": -1}, {"scores": [[0.5]]}):
        file.write_text(json.dumps({**result, **wrong}))
        with pytest.raises(InputError):
            SearchResult.read(file)
