"""Rankings against the published truth: check values, what a perfect and a bad ranking score, searches and plays."""

import csv
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_rel
from small_runs import latency_of

from bmsn_zoo import InputError, Layout, SearchSpace, benchmark, compare, reference, searching
from bmsn_zoo.compare import expected_best, quality
from bmsn_zoo.config import SearchConfig, shipped_folder
from bmsn_zoo.results import Choice, Confirmation, SearchResult, TrialResult
from bmsn_zoo.trials import repeat

SPACE = SearchSpace("bmsn_resnet20")
TABLE = reference.table("cifar10-resnet20")
MACS = {layout: SPACE.macs(layout, 32) for layout in SPACE}


def test_the_table_holds_every_layout_of_the_space():
    assert list(TABLE.accuracy) == list(SPACE)
    assert set(TABLE.supernet) == {1, 2, 4, 8}
    assert TABLE.accuracy[SPACE.default_layout] == 0.9052


@pytest.mark.parametrize(("size", "tau"), [(1, 0.146), (2, 0.312), (4, 0.598), (8, 0.531)])
def test_published_mixtures_have_the_tau_computed_from_their_table(size, tau):
    assert quality(TABLE.supernet[size], TABLE.accuracy, MACS).tau == pytest.approx(tau, abs=5e-4)


def test_cost_alone_ranks_better_than_published_one_shot_search_and_picks_the_dearest():
    found = quality(MACS, TABLE.accuracy, MACS)
    assert found.tau == pytest.approx(0.496, abs=5e-4)
    assert str(found.choice) == "8-1-1"
    assert found.regret == pytest.approx(0.0202, abs=1e-6)


def test_the_truth_itself_has_no_regret_and_its_reverse_the_most():
    perfect = quality(TABLE.accuracy, TABLE.accuracy, MACS)
    assert (perfect.tau, perfect.near_pairs, perfect.regret, perfect.front_regret) == (1, 1, 0, 0)
    reverse = quality({layout: -value for layout, value in TABLE.accuracy.items()}, TABLE.accuracy, MACS)
    assert (reverse.tau, reverse.near_pairs) == (-1, 0)
    assert reverse.regret == max(TABLE.accuracy.values()) - min(TABLE.accuracy.values())
    assert reverse.worst_front_regret >= reverse.front_regret > 0


@pytest.mark.parametrize(("trained", "accuracy"), [(1, 90.12), (2, 90.75), (4, 91.18), (8, 91.52), (36, 92.01)])
def test_random_trainings(trained, accuracy):
    assert 100 * expected_best(TABLE.accuracy, trained) == pytest.approx(accuracy, abs=0.006)


def test_unknown_tables_and_other_layouts_are_refused():
    with pytest.raises(InputError, match="cifar10-resnet20"):
        reference.table("imagenet")
    for scores in ({}, {**TABLE.accuracy, Layout((5, 5)): 0.5}):
        with pytest.raises(ValueError, match=f"{len(scores)} scores are not of the 36 layouts"):
            quality(scores, TABLE.accuracy, MACS)


def test_a_part_of_the_layouts_is_measured_against_all_of_them():
    some = {Layout.parse(text): TABLE.accuracy[Layout.parse(text)] for text in ("4-3-3", "5-3-2")}
    found = quality(some, TABLE.accuracy, MACS)
    assert (str(found.choice), found.tau, found.regret) == ("5-3-2", 1, pytest.approx(0.9201 - 0.9155))
    alone = quality({Layout((5, 3, 2)): 0.1}, TABLE.accuracy, MACS)
    assert math.isnan(alone.tau) and math.isnan(alone.near_pairs)
    # below 4-3-3's cost the cheapest layout, 1-1-8, stands in: nowhere worse than within the budget just below
    below = max(accuracy for layout, accuracy in TABLE.accuracy.items() if MACS[layout] < MACS[Layout((4, 3, 3))])
    assert found.worst_front_regret == pytest.approx(below - 0.8745)
    assert alone.front_regret > found.front_regret


def test_pairs_of_near_equal_cost():
    layouts = [Layout.parse(text) for text in ("3-4-3", "4-2-4", "8-1-1")]  # the first two cost the same within 10 %
    truth = dict(zip(layouts, (0.91, 0.90, 0.89), strict=True))
    assert quality(dict(zip(layouts, (2, 1, 3), strict=True)), truth, MACS).near_pairs == 1
    assert quality(dict(zip(layouts, (1, 2, 0), strict=True)), truth, MACS).near_pairs == 0
    assert quality(dict(zip(layouts, (1, 1, 0), strict=True)), truth, MACS).near_pairs == 0, "a tie orders nothing"


# the benchmark


def test_activations_rank_as_computed():
    found = quality(benchmark.activations(SPACE).scores, TABLE.accuracy, MACS)
    assert (found.tau, str(found.choice)) == (pytest.approx(0.548, abs=5e-4), "8-1-1")


def test_published_costs():
    """As the design computed them: 0.489 and four times that, 0.0217, 1.222 x 10^15."""
    assert benchmark.training_macs(MACS[SPACE.default_layout]) == pytest.approx(1.222e15, rel=2e-3)
    whole, own = benchmark.play("mcts", TABLE, SPACE, SearchConfig(strategy="mcts", mixture_size=1))
    assert own.spent_macs == pytest.approx(0.489e15, rel=2e-3)
    assert whole.spent_macs - own.spent_macs == pytest.approx(0.0217e15, rel=3e-3)
    assert set(whole.scores) == set(SPACE) and whole.choice is None and own.choice in SPACE
    assert max(abs(whole.scores[layout] - TABLE.supernet[1][layout]) for layout in SPACE) < 0.015
    assert min(abs(own.scores[layout] - TABLE.supernet[1][layout]) for layout in SPACE) > 0, "of other images"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(benchmark, "_EPOCHS", 2)


@pytest.mark.parametrize("strategy", ["uniform", "fixed", "few-shot", "boltzmann", "mcts", "balanced"])
def test_plays_depend_on_their_seed_alone_and_are_charged_for_every_supernet(strategy, short):
    def play(seed, supernets=2):
        config = SearchConfig(strategy=strategy, mixture_size=supernets, seed=seed)
        return list(benchmark.play(strategy, TABLE, SPACE, config))

    first = play(0)
    assert first == play(0) != play(1)
    assert len(first) == (2 if strategy in ("boltzmann", "mcts") else 1)
    one = play(0, 1)[0].spent_macs
    assert first[0].spent_macs == pytest.approx(2 * one, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_plans_are_played(seed):
    def play(strategy, **settings):
        config = SearchConfig(strategy=strategy, epochs=200, seed=seed, **settings)
        ((_, _, scores, spent, choice, trained),) = benchmark.play_plan(strategy, TABLE, SPACE, config)
        assert choice is None and trained
        return scores, spent

    scores, spent = play("brute-force")
    assert set(scores) == set(SPACE)
    assert spent == pytest.approx(52.9e15, rel=2e-3), "as the design computed it"
    assert quality(scores, TABLE.accuracy, MACS).regret < 0.004
    scores, spent = play("random", trials=5)
    assert len(scores) == 5 and spent == pytest.approx(sum(benchmark.training_macs(MACS[layout]) for layout in scores))
    scores, spent = play("halving")
    assert set(scores) == set(SPACE)
    assert spent < 0.2 * 52.9e15, "1000 epochs of 7200, whatever they cost"
    assert len(play("evolution", trials=12)[0]) == 12


def test_the_benchmark_prints_and_writes_every_play(short, tmp_path, capsys):
    table = ["--benchmark", "cifar10-resnet20", "--seeds", "2", "--output", str(tmp_path / "table.md")]
    assert compare.main(table) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert {row["seed"] for row in rows if row["method"] == "mcts warm"} == {"0", "1"}
    eight = next(row for row in rows if row["method"] == "random, k = 8")
    assert float(eight["accuracy"]) == pytest.approx(0.9152, abs=6e-5)
    assert float(eight["spent_macs"]) == pytest.approx(8 * 3 * 200 * 50_000 * 49.026e6, rel=1e-3)
    cost = next(row for row in rows if row["method"] == "multiply-accumulates")
    assert (cost["choice"], float(cost["regret"]), float(cost["spent_macs"])) == ("8-1-1", pytest.approx(0.0202), 0)
    methods = [line.split("  ")[0] for line in printed.splitlines()]
    assert methods.count("mcts warm") == methods.count("mcts warm, own") == 1, "seeds together"
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "--benchmark cifar10-resnet20 --seeds 2 --output" in text and "arXiv 2306.11982" in text
    assert "| multiply-accumulates | - | 8-1-1 | 0.50 | 2.02 |" in text
    assert f"| {sum(float(r['tau']) for r in rows if r['method'] == 'uniform') / 2:.2f}±" in text


def test_what_loses_to_random_trainings_is_shown_to(short, capsys):
    assert compare.main(["--benchmark", "cifar10-resnet20", "--seeds", "1"]) == 0
    lines = {line[:20].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["multiply-accumulates"] == lines["activations"] == "-1.03", "8-1-1 costs three trainings, worth 91.02"
    assert lines["random, k = 8"] == "+0.00"


# finished searches


def test_searches_are_measured_where_a_table_fits_and_compared_with_each_other(tmp_path, capsys):
    search = SearchResult.read(Path(__file__).parents[1] / "results" / "searches" / "recommended-s0.json")
    names = []
    for name, result in (
        ("found", search),
        ("told", search.model_copy(update={"undecided": "all are alike", "spent_macs": 3 * 10**14})),
        ("other", search.model_copy(update={"dataset": search.dataset.model_copy(update={"id": "me/photos"})})),
    ):
        (tmp_path / name).mkdir()
        result.write(tmp_path / name / "search.json")
        names.append(str(tmp_path / name))
    (tmp_path / "a training").mkdir()  # as one of runs/*
    assert compare.main([*names, str(tmp_path / "a training")]) == 0
    found, told, other = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    expected = quality({Layout.parse(entry.layout): entry.accuracy for entry in search.ranking}, TABLE.accuracy, MACS)
    assert found[:5] == ["found", "balanced", "1", "6-2-2", f"{100 * search.best.accuracy:.2f}"]
    assert found[5:7] == ["1.00", f"{expected.tau:.2f}"]
    assert found[9:] == ["91.83", f"{search.spent_macs / 1e15:.3g}"]
    assert told[3] == "4-3-3" and told[7:] == ["1.49", told[8], "90.52", "0.3"], "an undecided search keeps the default"
    assert other[6:-1] == ["-"] * 4


# layouts of one search


def test_layouts_are_trained_again_on_the_halves_of_their_search_and_tested_in_pairs(image_folder, tmp_path, capsys):
    home, shared = tmp_path / "search", ["--batch-size", "16", "--epochs", "1", "--mixed-precision", "no"]
    flags = ["--dataset", str(image_folder), *shared, "--strategy", "uniform", "--mixture-size", "1"]
    assert searching.main([*flags, "--output", str(home)]) == 0
    capsys.readouterr()
    asked = ["--layouts", "default, 2-3-5", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--from-search", str(home)]
    assert compare.main(asked) == 0
    first = capsys.readouterr().out
    head, default, other, told, timed, verdict = first.splitlines()
    assert max(map(len, (head, default, other))) <= 80
    column = head.index("ms")
    assert timed == "ms: the search timed none (--no-latency)" and default[column] == other[column] == "-"
    assert default.split()[0] == "4-3-3" and other.split()[0] == "2-3-5"
    for line in (default, other):
        files = sorted((home / "trials").glob(f"{line.split()[0]}_*/trial.json"))
        results = [TrialResult.read(file) for file in files]
        assert [result.seed for result in results] == [1, 2], "not the seed that the search and its confirmation had"
        assert float(line.split()[1]) == pytest.approx(50 * sum(r.holdout_accuracy for r in results), abs=0.01)
    assert told.startswith("32 held-out training images") and "test images stay closed" in told
    assert "2-3-5" in verdict and "times its cost" in verdict
    for file in (home / "trials").glob("*/model*"):
        raise AssertionError(f"{file}: a trial publishes nothing")
    times = {file: file.stat().st_mtime_ns for file in (home / "trials").rglob("*")}
    assert compare.main(asked) == 0
    assert capsys.readouterr().out == first
    search = SearchResult.read(home / "search.json")
    search.model_copy(update={"latency": latency_of(search, "here")}).write(home / "search.json")
    assert compare.main(asked) == 0
    head, *told = capsys.readouterr().out.splitlines()
    assert [line[head.index("ms") :].split()[0] for line in told[:2]] == ["22.00", "22.00"]
    assert told[3] == "ms: one image, cpu, fp32, 2 threads, as the search timed it"
    assert {file: file.stat().st_mtime_ns for file in (home / "trials").rglob("*")} == times, "nothing is trained twice"
    assert compare.main([*asked, "--layouts", "default,4-3-3"]) == 2
    assert "are all 4-3-3 in this search" in capsys.readouterr().err


def test_names_of_layouts_mean_what_was_confirmed_or_else_what_was_ranked_first():
    search = SearchResult.read(shipped_folder("hub_configs") / "bmsn_resnet20_cifar100" / "search.json")
    search = search.model_copy(update={"confirmed": None})
    best, within = search.best.layout, search.best_within_default_macs.layout
    names = "default,best,within"
    assert repeat.layouts_named(search, names) == list(dict.fromkeys(("4-3-3", best, within)))
    usual = Choice(layout="4-3-3", right=5, images=9, macs=1, better=0, worse=0, p_value=None)
    other = Choice(layout="1-1-8", right=9, images=9, macs=1, better=9, worse=0, p_value=1e-3)
    about = {"epochs": 1, "seed": 0, "spent_macs": 0}
    for choices, named in (([usual], ("4-3-3", best, within)), ([usual, other], ("4-3-3", "1-1-8"))):
        confirmed = search.model_copy(update={"confirmed": Confirmation.of(choices, "4-3-3", **about)})
        assert repeat.layouts_named(confirmed, names) == list(dict.fromkeys(named))


def test_images_vote_for_a_layout_by_seeds():
    one, other = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]] * 3), torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1]] * 3)
    other[2, 7] = 0  # two seeds of three
    cells, (*_, verdict) = repeat._cells({"4-3-3": one, "5-3-2": other}, {"4-3-3": 100, "5-3-2": 120})
    assert cells[2][6:] == ["+58.33", "40.41 to 76.26", "0.062"], "2 / 2^5, however many seeds repeat it"
    assert verdict == "5-3-2 ties with 4-3-3: +58.33 points at 1.20 times its cost"
    assert repeat._cells({"a": one[:1], "b": other[:1]}, {"a": 1, "b": 1})[0][1][2] == "13.68 to 69.43", "Wilson's"
    wide = {"a": one.repeat(1, 3), "b": other.repeat(1, 3)}
    assert "b beats a" in repeat._cells(wide, {"a": 1, "b": 1})[1][-1]
    assert "a is worse than b" in repeat._cells(dict(reversed(wide.items())), {"a": 1, "b": 1})[1][-1]


def test_seeds_that_disagree_show_nothing_however_many_images_vote():
    usual = torch.zeros(3, 1000, dtype=torch.int)
    usual[:, :500] = 1
    other = usual.clone()
    other[:2, 500:540] = 1  # better with two seeds, and with the third one far worse
    other[2, :100] = 0
    cells, (*_, verdict) = repeat._cells({"4-3-3": usual, "5-3-2": other}, {"4-3-3": 100, "5-3-2": 120})
    expected = ttest_rel(other.double().mean(1), usual.double().mean(1)).pvalue
    assert float(cells[2][-1]) == pytest.approx(expected, abs=5e-3)
    assert verdict.startswith("5-3-2 ties with 4-3-3: -0.67 points")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--layouts", "default,best"], "layouts and from-search go together"),
        (["tests", "--jobs", "2"], "layouts and from-search go together"),
        (["tests", "--output", "table.md"], "output is for the table of --benchmark"),
        (["--layouts", "default,best", "--from-search", "nowhere"], "nowhere is no run folder"),
        (["--layouts", "default,best", "--from-search", "nowhere", "--epochs", "0"], "epochs 0 is too small"),
        ([], "compare what? Give run folders, --benchmark cifar10-resnet20, or --layouts"),
        (["runs/x", "--benchmark", "cifar10-resnet20"], "compare what?"),
        (["--benchmark", "imagenet"], "reference 'imagenet' is unknown: use cifar10-resnet20"),
        (["--benchmark", "cifar10-resnet20", "--seeds", "0"], "seeds 0 is too small: it must be at least 1"),
        (["--benchmark", "cifar10-resnet20", "--seeds", "x"], "--seeds"),
        (["tests"], "search.json"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, capsys):
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
