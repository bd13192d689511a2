"""Rankings against the published truth: check values, what a perfect and a bad ranking score, searches and plays."""

import csv
import math

import pytest

from bmsn_zoo import InputError, Layout, SearchSpace, benchmark, compare, reference
from bmsn_zoo.compare import expected_best, quality
from bmsn_zoo.config import SearchConfig, shipped_folder
from bmsn_zoo.results import SearchResult

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
    source = shipped_folder("hub_configs") / "bmsn_resnet20_cifar10" / "search.json"
    search = SearchResult.read(source)
    names = []
    for name, result in (
        ("found", search),
        ("told", search.model_copy(update={"undecided": "all are alike", "spent_macs": 3 * 10**14})),
        ("other", search.model_copy(update={"dataset": search.dataset.model_copy(update={"id": "me/photos"})})),
    ):
        (tmp_path / name).mkdir()
        result.write(tmp_path / name / "search.json")
        names.append(str(tmp_path / name))
    assert compare.main(names) == 0
    found, told, other = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    expected = quality({Layout.parse(entry.layout): entry.accuracy for entry in search.ranking}, TABLE.accuracy, MACS)
    assert found[:5] == ["found", "balanced", "4", "3-4-3", f"{100 * search.best.accuracy:.2f}"]
    assert found[5:7] == ["1.00", f"{expected.tau:.2f}"]
    assert found[9:] == ["90.92", "-"]
    assert told[3] == "4-3-3" and told[7:] == ["1.49", told[8], "90.52", "0.3"], "an undecided search keeps the default"
    assert other[6:] == ["-"] * 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "compare what? Give run folders, or --benchmark cifar10-resnet20"),
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
