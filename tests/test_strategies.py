"""Who is trained next: the balanced mixture, what it is compared with, and strategies of one's own."""

import copy
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from bmsn_zoo import InputError, SearchSpace
from bmsn_zoo import searching as search
from bmsn_zoo.config import SearchConfig
from bmsn_zoo.optimizer import decay_powers
from bmsn_zoo.results import SearchResult
from bmsn_zoo.run_folder import RunFolder
from bmsn_zoo.strategies import STRATEGIES, BalancedMixture, Draw, create_strategy

ALL = range(4)
SPACE = SearchSpace("bmsn_resnet20")


def strategy(layouts=6, supernets=4, seed=0, max_sharpness=20.0, random_scores=True):
    config = SearchConfig(mixture_size=supernets, max_sharpness=max_sharpness, score_momentum=0.9, seed=seed)
    made = BalancedMixture(SPACE.subset(list(SPACE)[:layouts]), config)
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

    scoring, own = "all", None

    def __init__(self, space, config):
        self.sizes = len(space), config.mixture_size
        self.seen = torch.zeros(self.sizes)

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
    assert "strategy 'mine' is unknown: use balanced, " in capsys.readouterr().err


# what the balanced mixture is compared with


def made_of(name, space=SPACE, **settings):
    return create_strategy(space, SearchConfig(strategy=name, **{"mixture_size": 1, **settings}))


def play(made, steps, reward=lambda draw: 0.5, start=0, of=None, owned=None):
    """Draws of a strategy that learns a reward for each."""
    drawn, owned = [], range(made.config.mixture_size) if owned is None else owned
    for step in range(start, start + steps):
        drawn.append(made.draw(step, step / (of or steps), owned))
        made.update(drawn[-1], [reward(drawn[-1])])
    return drawn


def table_of(draws, supernets=1):
    table = np.zeros((len(SPACE), supernets))
    np.add.at(table, tuple(np.transpose(draws)), 1)
    return table


def uneven(draw):
    """A reward that tells all layouts apart."""
    return (draw.layout * 7 % 36) / 40


def cold(made):
    made.sharpness = lambda progress: 0.0
    return made


@pytest.mark.parametrize(
    "made",
    [
        lambda: made_of("uniform"),
        lambda: made_of("uniform", mixture_size=3),
        lambda: made_of("fixed"),
        lambda: made_of("balanced"),
        lambda: made_of("mcts", uniform_share=1),
        lambda: made_of("boltzmann", uniform_share=1),
        lambda: cold(made_of("boltzmann", uniform_share=0)),
        lambda: cold(made_of("boltzmann", uniform_share=0, mixture_size=3)),
    ],
)
def test_what_is_to_draw_uniformly_does(made):
    supernets = made().config.mixture_size
    assert agrees(table_of(play(made(), 4000, uneven), supernets), np.ones((36, supernets)))


@pytest.mark.parametrize(
    ("name", "supernets"),
    [("uniform", 1), ("uniform", 3), ("uniform", 4), ("uniform", 5), ("fixed", 4), ("balanced", 1), ("balanced", 4)],
)
def test_in_rounds_no_layout_is_more_than_one_draw_ahead(name, supernets):
    made, table = made_of(name, mixture_size=supernets, draws="permutation", seed=5), np.zeros((36, supernets))
    orders = set()
    for step, draw in enumerate(play(made, 36 * 7, uneven)):
        table[draw] += 1
        orders.add((step % 36, draw.layout))
        assert np.ptp(table.sum(1)) <= 1
        if name == "uniform":
            assert np.ptp(table) <= 1, "nor under one supernet"
    assert len(orders) > 36 * 4, "every round has an order of its own"
    if name != "balanced":
        assert np.ptp(table.sum(0)) <= 7


@pytest.mark.parametrize("name", ["uniform", "fixed"])
def test_owners_of_some_supernets_go_through_rounds_of_their_own(name):
    for first in (0, 1):
        made, owned = made_of(name, mixture_size=4, draws="permutation"), range(2 * first, 2 * first + 2)
        draws = [made.draw(step, 0, owned) for step in range(first, 36 * 3, 2)]
        table = table_of(draws, 4)
        mine = table.sum(1) > 0 if name == "fixed" else np.full(36, True)
        assert mine.sum() == (18 if name == "fixed" else 36)
        assert table[:, [m for m in ALL if m not in owned]].sum() == 0
        assert np.ptp(table[mine].sum(1)) <= 1


def test_rounds_of_a_balanced_mixture_need_all_supernets():
    with pytest.raises(InputError, match="draws permutation needs all supernets in one process: use --parallel data"):
        made_of("balanced", mixture_size=4, draws="permutation", parallel="mixture")


@pytest.mark.parametrize("supernets", [1, 4, 5])
def test_a_fixed_assignment_deals_layouts_evenly_and_ranks_by_it(supernets):
    made = made_of("fixed", mixture_size=supernets)
    assert all(draw.supernet == made.own[draw.layout] for draw in play(made, 300))
    sizes = np.bincount(made.own)
    assert len(sizes) == supernets and np.ptp(sizes) <= 1
    assert np.argmax(made.result()["assignment_matrix"], 1).tolist() == made.own
    assert supernets == 1 or made.own != made_of("fixed", mixture_size=supernets, seed=1).own
    with pytest.raises(InputError, match="mixture-size 40 leaves supernets without any of 36 layouts"):
        made_of("fixed", mixture_size=40)


def test_boltzmann_learns_and_decides():
    made = made_of("boltzmann", seed=1)
    draws = play(made, 3000, uneven)
    best = max(range(36), key=lambda layout: uneven(Draw(layout, 0)))
    late = table_of(draws[-500:])[:, 0]
    assert late.argmax() == best and late[best] > 250
    assert agrees(table_of(draws[:1200]), np.ones((36, 1))), "the first two fifths are uniform"
    assert made.result()["details"]["highest_score"] == [str(SPACE[best])]
    assert [made.sharpness(progress) for progress in (0, 0.4, 0.7, 1)] == pytest.approx([1, 1, 50.5, 100])
    scores = made.state["scores"][:, 0]
    assert np.allclose(
        scores[best], uneven(Draw(best, 0)) + 0.9 ** made.state["draws"][best, 0] * (1 - 0.875), atol=1e-9
    )


def sums_agree(made):
    visits = made.state["visits"]
    for parent, below in made.children.items():
        assert torch.equal(visits[parent], visits[below].sum(0))
    assert visits[0].sum() == made.state["draws"].sum()
    leaves = [path[-1] for path in made.paths]
    assert torch.equal(visits[leaves], made.state["draws"])


@pytest.mark.parametrize("supernets", [1, 3])
def test_visits_of_a_node_are_those_of_its_children(supernets):
    made = made_of("mcts", mixture_size=supernets)
    play(made, 400, uneven)
    sums_agree(made)
    assert made.state["visits"][0].min() > 0


def test_the_tree_has_the_nodes_of_every_cut():
    nodes = [len(made_of("mcts", SearchSpace(name)).state["visits"]) for name in ("bmsn_resnet20", "bmsn_resnet18")]
    assert nodes == [1 + 8 + 36, 1 + 6 + 21 + 56]
    mixed = made_of("mcts", SPACE.subset(["10", "8-2", "8-1-1", "1-9", "4-3-3"]), uniform_share=0)
    assert sorted(mixed.leaves.values()) == list(range(5))
    play(mixed, 50)
    sums_agree(mixed)
    assert (mixed.state["draws"] > 0).all()


def test_equal_rewards_visit_siblings_evenly():
    made = made_of("mcts", uniform_share=0)
    play(made, 500, lambda draw: 0.8)
    for below in made.children.values():
        assert np.ptp(made.state["visits"][below].numpy()) <= 1


def test_without_exploration_one_leaf_is_repeated():
    made = made_of("mcts", uniform_share=0, exploration=0)
    draws = play(made, 200, uneven)
    assert len(set(draws[-120:])) == 1
    assert made.result()["details"]["greedy_leaf"] == [str(SPACE[draws[-1].layout])]
    explored = play(made_of("mcts", uniform_share=0, mcts_temperature=5), 200, uneven)
    assert len(set(explored[-120:])) > 20


def test_tree_search_prefers_what_scores_well_and_smooths():
    def near(draw):
        first, second, _ = SPACE[draw.layout].units_per_scale
        return 0.9 - 0.05 * abs(first - 5) - 0.05 * abs(second - 3)

    made = made_of("mcts", exploration=0.1)
    draws = play(made, 1500, near)
    assert str(SPACE[int(table_of(draws[600:])[:, 0].argmax())]) == "5-3-2"
    assert made.result()["details"]["greedy_leaf"] == ["5-3-2"]
    fresh = made_of("mcts")
    for reward in (0.6, 0.2):
        fresh.update(Draw(3, 0), [reward])
    assert fresh.state["values"][fresh.paths[3], 0].tolist() == pytest.approx([0.95 * 0.6 + 0.05 * 0.2] * 3)


@pytest.mark.parametrize("draws", ["random", "permutation"])
@pytest.mark.parametrize("name", ["uniform", "fixed", "boltzmann", "mcts", "few-shot"])
def test_any_strategy_goes_on_bit_for_bit(name, draws):
    settings = {"mixture_size": 3, "draws": draws, "seed": 7}
    made, again = made_of(name, **settings), made_of(name, **settings)
    play(made, 250, uneven, of=400)
    state = made.state_dict()
    again.load_state_dict(state)
    made.report(0.5), made.result()
    assert play(again, 150, uneven, start=250, of=400) == play(made, 150, uneven, start=250, of=400)
    assert made.result() == again.result()
    assert not torch.equal(state["draws"], made.state["draws"]), "the state is a copy"
    with pytest.raises(ValueError, match="a state of shape"):
        made_of(name, mixture_size=2).load_state_dict(state)


def test_few_shot_splits_once_into_groups_of_similar_layouts():
    made, split = made_of("few-shot", mixture_size=4), []
    for step in range(1000):
        split.append(made.splits(step / 1000))
        draw = made.draw(step, step / 1000, ALL)
        made.update(draw, [0.5])
        assert draw.supernet == (made.own[draw.layout] if step >= 400 else 0)
    assert [step for step, now in enumerate(split) if now] == [400]
    assert np.bincount(made.own).tolist() == [9] * 4
    cuts = [sum(np.cumsum(layout.units_per_scale)[:-1]) for layout in SPACE]  # their sum orders mean log resolutions
    groups = [[cut for cut, own in zip(cuts, made.own, strict=True) if own == m] for m in ALL]
    assert all(max(low) <= min(high) for low, high in itertools.pairwise(groups))
    assert agrees(made.state["draws"].sum(1).numpy(), np.ones(36))
    with pytest.raises(InputError, match="few-shot copies one supernet to all others: use --parallel data"):
        made_of("few-shot", mixture_size=4, parallel="mixture")


def test_a_split_copies_the_first_supernet_and_starts_rates_anew(image_folder, tmp_path, monkeypatch):
    seen, rates, copy_first = [], [], search._Search._copy_first

    def watch(self):
        copy_first(self)
        seen.append([copy.deepcopy(trainer.supernet.state_dict()) for trainer in self.trainers.values()])

    def noted(optimizer, rate):
        rates.append(rate)

    monkeypatch.setattr(search._Search, "_copy_first", watch)
    monkeypatch.setattr(search, "set_learning_rate", noted)
    settings = ["--dataset", str(image_folder), "--batch-size", "4", "--mixture-size", "2", "--epochs", "1"]
    settings += ["--default-layout", "5-5", "--mixed-precision", "no", "--uniform-share", "0.5"]
    settings += ["--rate-decay", "schedule", "--lr", "0.1", "--min-lr", "0.001", "--strategy"]
    assert search.main([*settings, "few-shot", "--output", str(tmp_path / "run")]) == 0
    (weights,) = seen
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert rates[0] == 0.1 and rates[3] < 0.01 < 0.09 < rates[4] and rates[-1] == pytest.approx(0.001)


def test_late_accuracies_of_fixed_are_those_that_its_ranking_is_the_mean_of(image_folder, tmp_path):
    """Each layout's own supernet counts, however well it does under another one."""
    settings = ["--dataset", str(image_folder), "--batch-size", "8", "--mixture-size", "4", "--epochs", "2"]
    settings += ["--mixed-precision", "no", "--strategy", "fixed", "--evaluate-last", "2"]
    assert search.main([*settings, "--output", str(tmp_path / "run")]) == 0
    found = SearchResult.read(tmp_path / "run" / "search.json")
    accuracy = {entry.layout: entry.accuracy for entry in found.ranking}
    mean = np.mean(found.details["late_accuracies"], 0)
    assert mean.tolist() == pytest.approx([accuracy[layout] for layout in found.layouts])
    assert not np.allclose(mean, np.max(found.accuracy_matrix, 1)), "or this shows nothing"


def test_rates_and_momentum_are_those_of_the_layout_that_is_drawn(image_folder, tmp_path, monkeypatch):
    """As searches train by themselves: the rate decays by the layout's cost, each quarter by cost has its momentum."""
    steps, rates = [], {}

    def noted(optimizer, rate):
        rates[id(optimizer)] = rate

    def watched(trainer, layout, *more):
        steps.append((layout, id(trainer.optimizer), rates[id(trainer.optimizer)]))
        return train_and_score(trainer, layout, *more)

    train_and_score = search.train_and_score
    monkeypatch.setattr(search, "set_learning_rate", noted)
    monkeypatch.setattr(search, "train_and_score", watched)
    settings = ["--dataset", str(image_folder), "--batch-size", "8", "--epochs", "18", "--mixed-precision", "no"]
    assert search.main([*settings, "--output", str(tmp_path / "run")]) == 0
    space = list(SPACE)
    assert Counter(layout for layout, *_ in steps) == dict.fromkeys(space, 2), "72 steps, in rounds"
    macs = [SPACE.macs(layout, 16) for layout in space]
    powers = dict(zip(space, decay_powers(SearchConfig(), macs), strict=True))
    for step, (layout, _, rate) in enumerate(steps):
        assert rate == pytest.approx(0.05 * (1 - step / 71) ** powers[layout])
    by_cost = sorted(space, key=lambda layout: SPACE.macs(layout, 16))
    quarters = [{momentum for layout, momentum, _ in steps if layout in by_cost[n : n + 9]} for n in range(0, 36, 9)]
    assert [len(quarter) for quarter in quarters] == [1] * 4 and len(set().union(*quarters)) == 4


@pytest.mark.parametrize("name", ["uniform", "fixed", "boltzmann", "mcts"])
def test_owners_of_any_strategy_exchange_what_they_learned(name):
    made, owners = [made_of(name, mixture_size=4) for _ in range(2)], (range(2), range(2, 4))
    for each, owned in zip(made, owners, strict=True):
        draws = play(each, 200, uneven, start=owned.start * 50, of=400, owned=owned)
        assert {draw.supernet for draw in draws} == set(owned)
    columns = [each.state_dict() for each in made]
    for each, owned in zip(made, owners, strict=True):
        rows = (torch.cat([columns[0][key][:, :2].T, columns[1][key][:, 2:].T]) for key in each.state)
        each.exchange(owned, lambda mine, owned=owned, rows=rows: (whole := next(rows), mine[0] == whole[owned][0])[0])
    assert made[0].result() == made[1].result()
    assert all(torch.equal(made[0].state[key], made[1].state[key]) for key in made[0].state)


@pytest.mark.parametrize(
    "strategy",
    [
        ["few-shot"],
        pytest.param(["mcts"], marks=pytest.mark.slow),
        pytest.param(["uniform", "--draws", "permutation"], marks=pytest.mark.slow),
        pytest.param(["boltzmann"], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0],
)
def test_a_search_by_any_strategy_that_was_killed_goes_on_bit_for_bit(strategy, image_folder, tmp_path, monkeypatch):
    settings = ["--dataset", str(image_folder), "--batch-size", "4", "--mixture-size", "2", "--epochs", "2"]
    settings += ["--image-size", "8", "--default-layout", "5-5", "--mixed-precision", "no", "--uniform-share", "0.3"]
    settings += ["--strategy", *strategy]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert search.main([*settings, "--output", str(whole)]) == 0
    log = RunFolder.log

    def die(folder, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt
        log(folder, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "log", die)
        search.main([*settings, "--output", str(killed)])
    assert search.main(["--output", str(killed), "--resume"]) == 0
    one, other = (SearchResult.read(folder / "search.json") for folder in (whole, killed))
    for key in ("ranking", "accuracy_matrix", "assignment_matrix", "scores", "details", "spent_macs"):
        assert getattr(one, key) == getattr(other, key)
    assert (whole / "supernets.safetensors").read_bytes() == (killed / "supernets.safetensors").read_bytes()
    assert sum(map(sum, one.details["draws"])) == 16
    if strategy[0] == "few-shot":
        own = [row.index(1) for row in one.assignment_matrix]
        assert all(entry.supernet == own[one.layouts.index(entry.layout)] for entry in one.ranking)
