"""Who is trained next: the balanced mixture, and strategies of one's own."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from bmsn_zoo import search
from bmsn_zoo.config import SearchConfig
from bmsn_zoo.results import SearchResult
from bmsn_zoo.strategies import STRATEGIES, BalancedMixture, Draw

ALL = range(4)


def strategy(layouts=6, supernets=4, seed=0, max_sharpness=20.0, random_scores=True):
    config = SearchConfig(mixture_size=supernets, max_sharpness=max_sharpness, score_momentum=0.9, seed=seed)
    made = BalancedMixture(layouts, config)
    if random_scores:
        made.scores.copy_(torch.rand(layouts, supernets, generator=torch.Generator().manual_seed(1)))
    return made


def counts(made, owned, draws=3000, progress=0.2):
    table = np.zeros(made.scores.shape)
    for step in range(draws):
        table[made.draw(step, progress, owned)] += 1
    return table


def agrees(observed, probabilities):
    """Whether counts may come from these probabilities (rare cells are counted together)."""
    expected = np.ravel(probabilities) / np.sum(probabilities) * observed.sum()
    observed, common = np.ravel(observed), expected >= 5
    groups = [np.append(values[common], values[~common].sum()) for values in (observed, expected)]
    keep = groups[1] > 0
    assert (observed[expected == 0] == 0).all()
    return chisquare(groups[0][keep], groups[1][keep]).pvalue > 1e-3


def test_draws_depend_on_seed_step_and_scores_alone():
    first, second, other = strategy(seed=3), strategy(seed=3), strategy(seed=4)
    backwards = {step: second.draw(step, 0.5, ALL) for step in reversed(range(50))}
    np.random.seed(9)
    torch.manual_seed(9)
    forwards = [first.draw(step, 0.5, ALL) for step in range(50)]
    assert forwards == [backwards[step] for step in range(50)]
    assert forwards != [other.draw(step, 0.5, ALL) for step in range(50)]
    assert len(set(forwards)) > 5


def test_layouts_are_uniform_and_supernets_come_from_their_row():
    made = strategy()
    table = counts(made, ALL)
    assert agrees(table.sum(1), np.ones(6))
    assert agrees(table, made.assignment(0.2).numpy())
    assert not agrees(table, np.ones((6, 4))), "these scores were to tell the supernets apart"


def test_an_owner_of_some_supernets_draws_those_evenly_and_layouts_from_their_columns():
    made = strategy()
    table = counts(made, range(1, 3))
    assert table[:, [0, 3]].sum() == 0
    assert agrees(table[:, 1:3].sum(0), np.ones(2))
    for supernet in (1, 2):
        assert agrees(table[:, supernet], made.assignment(0.2).numpy()[:, supernet])


def test_owners_together_draw_what_one_process_does():
    made = strategy()
    together = sum(counts(made, range(m, m + 1), draws=800) for m in range(4))
    assert agrees(together, made.assignment(0.2).numpy())


def test_one_supernet_is_plain_one_shot_search():
    made = strategy(layouts=36, supernets=1)
    assert made.report(1.0)["usage"] == [1.0]
    assert agrees(counts(made, range(1)), np.ones((36, 1)))


def test_first_draws_are_uniform_over_everything():
    made = strategy(random_scores=False)
    assert (made.scores == 1).all()
    assert agrees(counts(made, ALL, progress=0.0), np.ones((6, 4)))


def test_sharpness_grows_linearly_from_one():
    made = strategy(max_sharpness=100)
    assert [made.sharpness(progress) for progress in (0, 0.5, 1)] == [1, 50.5, 100]
    decided = [made.assignment(progress).max(1).values.mean() for progress in (0, 0.5, 1)]
    assert decided == sorted(set(decided))


@pytest.mark.parametrize("supernets", [1, 2, 4, 8])
def test_usage_is_balanced_all_along(supernets):
    made = strategy(layouts=36, supernets=supernets, max_sharpness=300)
    for progress in np.linspace(0, 1, 5):
        assert made.report(progress)["usage"] == pytest.approx([1 / supernets] * supernets, rel=0.01)


def test_update_smooths_the_score_of_what_was_drawn():
    made = strategy(random_scores=False)
    drawn = made.draw(0, 0.0, ALL)
    made.update(drawn, [0.25])
    assert made.scores[drawn.layout, drawn.supernet] == pytest.approx(0.9 * 1 + 0.1 * 0.25)
    assert (made.scores == 1).sum() == 6 * 4 - 1


def test_learning_changes_what_is_drawn():
    made = strategy(random_scores=False, max_sharpness=50)
    for layout in range(6):
        for _ in range(20):
            made.update((drawn := made.draw(0, 0, ALL))._replace(layout=layout, supernet=layout % 4), [1.0])
            made.update(drawn._replace(layout=layout, supernet=(layout + 1) % 4), [0.2])
    assignment = made.assignment(1.0)
    assert all(assignment[layout, layout % 4] > assignment[layout, (layout + 1) % 4] for layout in range(6))


def test_a_restored_state_goes_on_bit_for_bit():
    """The state includes where balancing starts, or draws near a boundary would part after resuming."""
    made, again = strategy(max_sharpness=100), strategy(random_scores=False, max_sharpness=100)
    for step in range(300):
        if step == 150:
            state = made.state_dict()
            again.load_state_dict(state)
        drawn = made.draw(step, step / 300, ALL)
        assert step < 150 or again.draw(step, step / 300, ALL) == drawn
        for each in (made, again):
            each.update(drawn, [(step * 7 % 10) / 10])
    assert torch.equal(again.state_dict()["offset"], made.state_dict()["offset"])
    assert again.result() == made.result()
    assert not torch.equal(again.scores, state["scores"]), "the state is a copy"


def test_reporting_leaves_later_draws_alone():
    """Only the main process may report."""
    quiet, asked = strategy(), strategy()
    for step in range(50):
        asked.report(step / 50), asked.result()
        assert asked.draw(step, step / 50, ALL) == quiet.draw(step, step / 50, ALL)
    assert torch.equal(asked.state_dict()["offset"], quiet.state_dict()["offset"])


def test_owners_exchange_what_they_learned():
    first, second = strategy(), strategy()
    first.scores[:, :2], second.scores[:, 2:] = 0.1, 0.9
    rows = torch.cat([first.scores[:, :2].T, second.scores[:, 2:].T])
    first.draw(0, 0.5, range(2))
    for each, owned in ((first, range(2)), (second, range(2, 4))):
        each.exchange(owned, lambda mine, owned=owned: rows if torch.equal(mine, rows[owned]) else None)
    assert torch.equal(first.scores, second.scores)
    assert (first.scores == torch.tensor([0.1, 0.1, 0.9, 0.9], dtype=torch.float64)).all()
    assert all(torch.equal(first.state_dict()[key], second.state_dict()[key]) for key in ("scores", "offset"))


class Alternating:
    """A strategy of one's own: layouts and supernets in turn, every supernet scored."""

    scores_all = True

    def __init__(self, num_layouts, config):
        self.sizes, self.seen = (num_layouts, config.mixture_size), torch.zeros(num_layouts, config.mixture_size)

    def draw(self, step, progress, owned):
        return Draw(step % self.sizes[0], owned[step % len(owned)])

    def update(self, draw, accuracies):
        assert len(accuracies) == self.sizes[1]
        self.seen[draw] += 1

    def exchange(self, owned, gather):
        self.seen.copy_(gather(self.seen[:, owned.start : owned.stop].T.contiguous()).T)

    def report(self, progress):
        return {"seen": self.seen.count_nonzero().item()}

    def result(self):
        return {"assignment_matrix": (self.seen / self.seen.sum()).tolist(), "scores": self.seen.clamp_max(1).tolist()}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen.copy_(state["seen"])


def test_a_strategy_of_ones_own_is_a_line_in_the_registry(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STRATEGIES, "alternating", Alternating)
    settings = ["--dataset", str(image_folder), "--batch-size", "16", "--mixture-size", "2", "--epochs", "2"]
    settings += ["--mixed-precision", "no", "--strategy"]
    assert search.main([*settings, "alternating", "--output", str(tmp_path / "run")]) == 0
    result = SearchResult.read(tmp_path / "run" / "search.json")
    assert result.settings["strategy"] == "alternating"
    assert [row.index(1) for row in result.scores[:4]] == [0, 1, 0, 1]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["seen"] == 4
    assert search.main([*settings, "mine", "--output", str(tmp_path / "no")]) == 2
    assert "strategy 'mine' is unknown: use balanced or alternating" in capsys.readouterr().err
