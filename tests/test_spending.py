"""What a search spends and when it ends: budgets, late evaluations, and rates that depend on cost."""

import json

import pytest

from bmsn_zoo import InputError, SearchSpace, cost
from bmsn_zoo import searching as search_module
from bmsn_zoo.config import SearchConfig, over_recipe
from bmsn_zoo.optimizer import cost_quarters, decay_powers, learning_rate
from bmsn_zoo.spending import Spending

SPACE = SearchSpace("bmsn_resnet20")
MACS = [SPACE.macs(layout, 16) for layout in SPACE]
TREE = cost.tree_macs(SPACE, 16)
SMALL = ["--mixture-size", "2", "--mixed-precision", "no", "--threads", "1"]


def of_budget(budget, **more):
    return Spending(SearchConfig(budget=budget, **more), 10, [100, 200, 300], 1000)


def spend(spending, steps):
    """Progress before every step of the mean cost, until the search is over."""
    progress = []
    for step in range(steps):
        if spending.over(step):
            break
        progress.append(spending.progress(step))
        spending.own += 200
    return progress


def test_epochs_run_over_steps():
    spending = Spending(SearchConfig(epochs=3, evaluate_last=2), 10, [100, 300], 1000)
    progress = spend(spending, 100)
    assert progress == [step / 29 for step in range(30)]
    assert [spending.late_due(step) for step in (0, 19, 20, 29)] == [0, 0, 1, 1], "the last is that of the end"
    assert spending.spent == 30 * 200


def test_a_budget_pays_for_steps_and_evaluations_and_no_more():
    spending = of_budget(5000, evaluate_last=2)
    progress = spend(spending, 100)
    assert progress == pytest.approx([step * 200 / 3000 for step in range(len(progress))])
    spending.late = 2
    assert 5000 - 300 < spending.spent <= 5000, "less than a step of the dearest layout is left"
    assert not spending.affords(301)


def test_late_evaluations_lie_at_even_distances_in_the_last_quarter():
    spending = of_budget(30_000, evaluate_last=5)
    due = []
    for progress in (0.79, 0.81, 0.86, 0.91, 0.96, 1.0):
        spending.paid = progress * 25_000
        due.append(spending.late_due(0))
    assert due == [0, 1, 2, 3, 4, 4]


def test_the_least_budget_is_named_and_suffices():
    with pytest.raises(InputError, match="budget 1200 is too small: give at least 1300 multiply-accumulates"):
        of_budget(1200)
    assert len(spend(of_budget(1300), 9)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1e6, "parallel": "mixture"}, "parallel mixture ends after epochs alone"),
        ({"epochs": 3, "evaluate_last": 4}, "evaluate-last 4: there are 3 epochs: use less"),
    ],
)
def test_ends_that_cannot_be_had(settings, message):
    with pytest.raises(InputError, match=message):
        Spending(SearchConfig(**settings), 10, [100], 1000)


def test_epochs_and_a_budget_are_not_both_given_but_either_wins_over_a_recipe():
    with pytest.raises(InputError, match="budget and epochs 3 are two ends of one search: give one of them"):
        SearchConfig(budget=1e9, epochs=3)
    assert over_recipe({"epochs": 400, "lr": 0.1}, {"budget": "1.4e14"}) == {"lr": 0.1, "budget": "1.4e14"}
    assert over_recipe({"budget": 1e9}, {"epochs": 2}) == {"epochs": 2}
    alone = {"strategy": "random", "budget": 1e14}  # whose trainings have epochs each
    assert over_recipe({"epochs": 400}, alone) == {"epochs": 400, **alone}
    assert SearchConfig(epochs=3, **alone).epochs == 3
    mixture = {"mixture_size": 2}
    assert over_recipe(mixture, {"strategy": "darts"}) == {"strategy": "darts"}, "which trains one supernet"
    assert over_recipe(mixture, {"strategy": "balanced"}) == {"strategy": "balanced", **mixture}
    assert over_recipe(mixture, {"strategy": "fixed", "mixture_size": 3})["mixture_size"] == 3
    assert SearchConfig(budget="1.4e14").budget == 140_000_000_000_000


@pytest.mark.slow
def test_a_budget_is_spent_as_counted_and_a_resumed_search_spends_it_alike(image_folder, tmp_path, caplog):
    evaluation, budget = 2 * 32 * TREE, 30 * 5 * 8 * sum(MACS) // 36 + 2 * 2 * 32 * TREE
    settings = ["--dataset", str(image_folder), *SMALL, "--budget", str(budget), "--evaluate-last", "2"]
    settings += ["--lr", "0.01", "--min-lr", "0.001", "--rate-decay", "cost", "--scores", "pairs"]
    trained, train_and_score, end_epoch = [], search_module.train_and_score, search_module._Search.end_epoch

    def watched(trainer, layout, *more):
        trained.append(SPACE.macs(layout, 16))
        return train_and_score(trainer, layout, *more)

    def stopped(self, epoch, *more):
        end_epoch(self, epoch, *more)
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "train_and_score", watched)
        assert search_module.main([*settings, "--output", str(tmp_path / "whole")]) == 0
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "36 layouts of bmsn_resnet20 at 16 pixels (the median shorter side of 64 images); 32 images train" in said
    assert "mixture of 2, batches of 8; about 30 steps, 15 for each supernet 15 steps for each supernet: below" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module._Search, "end_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            search_module.main([*settings, "--output", str(tmp_path / "killed")])
    assert search_module.main(["--output", str(tmp_path / "killed"), "--resume"]) == 0

    whole, resumed = (json.loads((tmp_path / run / "search.json").read_text()) for run in ("whole", "killed"))
    rows, again = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    )
    assert whole["spent_macs"] == 5 * 8 * sum(trained) + 2 * evaluation, "trained at 3, two scored at 1 each"
    assert budget - 5 * 8 * max(MACS) < whole["spent_macs"] <= budget
    assert [row["spent_macs"] for row in rows] == sorted({row["spent_macs"] for row in rows})
    assert rows[-1]["spent_macs"] == whole["spent_macs"] - evaluation, "one evaluation is that of the end"
    assert whole["epochs"] == len(rows) > 3 and whole["settings"]["epochs"] is None
    assert whole["settings"]["batch_size"] == 8, "as 64 images ask for"
    late = whole["details"]["late_accuracies"]
    assert len(late) == 2 and late[0] != late[1]
    for key in ("ranking", "accuracy_matrix", "scores", "assignment_matrix", "spent_macs", "details", "epochs"):
        assert whole[key] == resumed[key]
    for row in (*rows, *again):
        del row["seconds"], row["peak_memory_mib"]
    assert rows == again


def test_rates_of_cheap_layouts_decay_first():
    powers = dict(zip(map(str, SPACE), decay_powers(SearchConfig(), [SPACE.macs(a, 32) for a in SPACE]), strict=True))
    expected = {"1-1-8": 4, "2-4-4": 3.127, "4-3-3": 2.585, "5-3-2": 1.808, "7-1-2": 1.139, "8-1-1": 0.25}
    assert {layout: round(powers[layout], 3) for layout in expected} == expected
    assert decay_powers(SearchConfig(gamma_cheap=1, gamma_dear=1), MACS) == [1] * 36
    assert decay_powers(SearchConfig(), [7]) == [0.25], "one layout has no cheaper one"


def test_a_power_of_one_is_linear_decay_and_others_are_the_power_of_what_is_left():
    config = SearchConfig(epochs=4, lr=0.2, min_lr=0)
    rates = [learning_rate(config, 5, step, power=1.0) for step in range(20)]
    assert rates == pytest.approx([0.2 * (1 - step / 19) for step in range(20)])
    assert learning_rate(config, 5, 9.5, power=3.0) == pytest.approx(0.2 / 8)
    assert learning_rate(SearchConfig(epochs=4, min_lr=0.01), 5, 18, power=4.0) == 0.01


def test_quarters_are_of_equal_size_and_ordered_by_cost():
    quarters = cost_quarters(MACS)
    assert [quarters.count(q) for q in range(4)] == [9] * 4
    for q in range(3):
        assert max(m for m, of in zip(MACS, quarters, strict=True) if of == q) <= min(
            m for m, of in zip(MACS, quarters, strict=True) if of == q + 1
        )
    assert cost_quarters([5, 3]) == [2, 0]


@pytest.mark.parametrize("strategy", ["uniform", "balanced", "boltzmann"])
def test_a_search_pays_for_scores_only_where_something_learns_from_them(strategy, image_folder, tmp_path):
    settings = ["--dataset", str(image_folder), "--mixture-size", "1", "--mixed-precision", "no", "--threads", "1"]
    settings += ["--batch-size", "16", "--epochs", "2", "--confirm", "0", "--strategy", strategy, "--no-latency"]
    settings += ["--max-macs", str(MACS[0]), "--default-layout", str(SPACE[0]), "--output", str(tmp_path / "run")]
    assert search_module.main(settings) == 0
    result = json.loads((tmp_path / "run" / "search.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = strategy == "boltzmann"
    step = (3 + scored) * 16 * MACS[0]
    assert [row["spent_macs"] for row in rows] == [2 * step, 4 * step], "32 images train in two steps"
    assert all(("score_accuracy" in row, "train_accuracy" in row) == (scored, not scored) for row in rows)
    assert ("scores" in result) == scored
    assert (tmp_path / "run" / "pictures" / "curves.png").is_file()
