"""Latency of layouts: sums of units, the space that a limit cuts, what a resumed run and other processes use."""

import json
import re
import shutil

import pytest
import torch
from small_runs import COMMON, run
from test_processes import run as start
from test_processes import torchrun

import bmsn_zoo
from bmsn_zoo import InputError, SearchSpace, cost, report, search_base
from bmsn_zoo import searching as search_module
from bmsn_zoo.card import search_card
from bmsn_zoo.one_shot import OneShotSearch
from bmsn_zoo.report import search_table
from bmsn_zoo.results import Latencies, LatencyResult, SearchResult, pareto_front
from bmsn_zoo.search_base import SearchBase

CPU = torch.device("cpu")


def timed(name, size=32, batch=1):
    space = SearchSpace(name)
    network = cost.deployable(space.backbone, 5, 3, CPU, torch.float32)
    images, sample = torch.rand(batch, 3, size, size), [space[0], space[-1]]
    return space, Latencies.of_times(batch, *cost.time_units(network, space, sample, images, seconds=0.05))


@pytest.mark.parametrize("name", ["bmsn_resnet20", "bmsn_resnet18", "resnetblur18"])
def test_a_layouts_latency_is_the_sum_of_its_units(name):
    space, found = timed(name)
    rows = {row for layout in space for row in cost.rows_of(layout)}
    assert set(found.table) == rows and len(found.units) == len(rows)
    assert found.rounds >= 3
    for unit in found.units:
        low, median, high = unit.milliseconds
        assert 0 < low <= median <= high
    for layout in space:
        flags, scale = layout.flags, 0
        total = found.table[len(flags), layout.num_scales - 1, False]
        for unit, flag in enumerate(flags):
            total += found.table[unit, scale, bool(flag)]
            scale += flag
        assert found.of(layout) == pytest.approx(total)
    assert [each.layout for each in found.checked] == [str(space[0]), str(space[-1])]
    for each in found.checked:  # on a busy machine, too
        assert 0.2 < each.milliseconds[1] / found.of(each.layout) < 5
        assert found.deviation[0] <= each.milliseconds[1] / found.of(each.layout) - 1 <= found.deviation[1]
    with pytest.raises(InputError, match="lack one of layout"):
        found.of("2-2-2-2-2-2")


@pytest.mark.parametrize("name", ["bmsn_resnet20", "resnet18"])
@torch.no_grad()
def test_what_is_timed_is_the_network_that_is_deployed(name):
    """Whole or unit by unit: norms use what they hold, not the batch, so that one image alone means the same."""
    space, state = SearchSpace(name), torch.get_rng_state()
    network = cost.deployable(space.backbone, 5, 3, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "a search draws what it would have drawn"
    images = torch.rand(3, 3, 64, 64)
    network.set_layout(space[7])
    whole, x = network(images), images
    assert torch.allclose(whole[1:2], network(images[1:2]), rtol=1e-3)
    for unit, flag in enumerate(space[7].flags):
        x = network.forward_unit(x, unit, bool(flag))
    assert torch.equal(network.forward_head(x), whole)
    assert not any(norm.training for norm in network.modules() if isinstance(norm, torch.nn.BatchNorm2d))


def test_a_limit_that_nothing_meets_tells_the_cheapest():
    space = SearchSpace("bmsn_resnet20")
    costs = {layout: 2.0 + index for index, layout in enumerate(space)}
    assert list(space.at_most(4.5, costs, "")) == list(space)[:3]
    with pytest.raises(InputError, match=r"max-latency 1 leaves none of 36.*1-1-8, costs 2\.0 ms"):
        space.at_most(1, costs, "max-latency 1", " ms")


class Ended(Exception):
    pass


def ended(*_):
    raise Ended


@pytest.fixture(scope="module")
def limited(image_folder, tmp_path_factory):
    """The run folder of a search within a latency, stopped after its first epoch and resumed; its measurement."""
    base, plain = tmp_path_factory.mktemp("limited"), SearchBase.measure_latency
    command = ["--dataset", image_folder, *COMMON, "--mixture-size", 1]
    seen = []

    def measured(search):
        seen.append(plain(search))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SearchBase, "measure_latency", measured)
        assert run(search_module, *command, "--max-latency", 1e-3, "--output", base / "none") == 2
        median = sorted(map(seen[0].single.of, SearchSpace("bmsn_resnet20")))[17]
        patch.setattr(SearchBase, "measure_latency", lambda search: seen[0])
        patch.setattr(OneShotSearch, "finish", ended)
        with pytest.raises(Ended):
            run(search_module, *command, "--max-latency", median, "--output", base / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SearchBase, "measure_latency", ended)
        assert run(search_module, "--output", base / "run", "--resume") == 0
    return base, seen[0]


def test_a_search_within_a_latency_is_that_of_its_table_also_when_it_is_resumed(limited):
    base, measured = limited
    assert not (base / "none").exists(), "nothing is left of what cannot be met"
    found = SearchResult.read(base / "run" / "search.json")
    assert found.latency == measured == LatencyResult.read(base / "run" / "latency.json")
    costs = {str(layout): measured.single.of(layout) for layout in SearchSpace("bmsn_resnet20")}
    assert found.layouts == [layout for layout, cost in costs.items() if cost <= found.settings["max_latency"]]
    assert len(found.layouts) == 18
    assert (measured.device, measured.precision) == ("cpu", "fp32")
    assert [batch.batch_size for batch in measured.batches] == [1, 64]


def test_a_limit_that_nothing_meets_is_one_line(image_folder, tmp_path, limited, monkeypatch, capsys):
    monkeypatch.setattr(SearchBase, "measure_latency", lambda search: limited[1])
    command = ["--dataset", image_folder, *COMMON, "--max-latency", 1e-3]
    assert run(search_module, *command, "--output", tmp_path / "run") == 2
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: max-latency 0.001 leaves none of 36 layouts: the cheapest, \S+, costs \S+ ms: .*", said[-1]
    )


def test_latencies_that_lack_a_unit_are_refused(limited, tmp_path):
    file, path = limited[0] / "run" / "search.json", tmp_path / "search.json"
    content = json.loads(file.read_text())
    units = content["latency"]["batches"][1]["units"]
    units.remove(next(unit for unit in units if unit["unit"] == 0))  # every layout has it
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"is not the result of a search: .*the latencies lack one of layout"):
        SearchResult.read(path)


@pytest.mark.slow
def test_several_processes_search_what_the_first_one_measured(image_folder, tmp_path):
    command = ["--dataset", image_folder, *COMMON, "--mixture-size", 2, "--threads", 1, "--no-latency"]
    command += ["--max-macs", "default", "--max-latency", 1e6, "--output", tmp_path / "run"]
    done = start("search.py", *command, launcher=torchrun(2), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    found = SearchResult.read(tmp_path / "run" / "search.json")
    assert found.latency.threads == 1
    assert found.layouts == [str(layout) for layout in SearchSpace("bmsn_resnet20").within(16, 3, "default")]


def test_what_is_too_dear_for_a_cpu_is_measured_with_one_image(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(search_base, "_BATCHED_ON_CPU", 0)
    command = ["--dataset", image_folder, *COMMON, "--mixture-size", 1, "--max-macs", "0.5x", "--latency"]
    assert run(search_module, *command, "--output", tmp_path / "run") == 0
    found = SearchResult.read(tmp_path / "run" / "search.json")
    assert [batch.batch_size for batch in found.latency.batches] == [1]
    assert not (tmp_path / "run" / "latency.json").exists(), "no limit depends on it"

    def too_much(search):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(SearchBase, "measure_latency", too_much)
    assert run(search_module, *command, "--output", tmp_path / "other") == 0
    assert SearchResult.read(tmp_path / "other" / "search.json").latency is None


def test_reports_tell_latencies(limited, tmp_path, capsys):
    folder = shutil.copytree(limited[0] / "run", tmp_path / "run")
    assert run(report, folder) == 0
    found, printed = SearchResult.read(folder / "search.json"), capsys.readouterr().out
    table = search_table(found)
    assert table in printed and max(map(len, table.splitlines())) <= 80
    assert "  MACs (M)       ms" in table and "ms: one image, cpu, fp32, 1 threads; whole networks " in table
    page, single = (folder / "report.html").read_text(encoding="utf-8"), found.latency.single
    assert "against milliseconds for one image (cpu, fp32, 1 threads), 18 layouts" in page
    rows = re.findall(r"<tr><th scope=.row.>([0-9-]+)[^<]*</th><td>([0-9.]+)</td><td>[0-9.]+</td><td>([0-9.]+) %", page)
    front = pareto_front(found.ranking, lambda entry: single.of(entry.layout))
    assert [layout for layout, _, _ in rows] == [entry.layout for entry in front]
    assert [float(took) for _, took, _ in rows] == sorted(round(single.of(entry.layout), 2) for entry in front)
    assert [float(accuracy) for _, _, accuracy in rows] == sorted(float(accuracy) for _, _, accuracy in rows)
    assert list(bmsn_zoo.SearchResult.load(folder).ranking["milliseconds"]) == [
        single.of(entry.layout) for entry in found.ranking
    ]
    card = search_card(found, "me/it")
    best = f"| {found.best.macs / 1e6:.1f} M | {single.of(found.best.layout):.2f} |"
    assert best in card and "Milliseconds are those of one image" in card
