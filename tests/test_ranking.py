import random

import pytest
import torch

from bmsn_zoo import InputError, SearchSpace
from bmsn_zoo.ranking import build_result, tied, ties, why_undecided
from bmsn_zoo.results import Entry, Ranking, pareto_front

SPACE = SearchSpace("bmsn_resnet20")


def macs(layout):
    return SPACE.macs(layout, 32)


def result_of(accuracy, space=SPACE):
    return build_result(space, accuracy, macs)


def test_layouts_are_ranked_by_their_best_supernet():
    accuracy = torch.rand(36, 4, dtype=torch.float64)
    result = Ranking.model_validate_json(result_of(accuracy).model_dump_json())
    assert result.layouts == [str(layout) for layout in SPACE]
    assert result.accuracy_matrix == accuracy.tolist()
    assert (result.model, result.mixture_size) == ("bmsn_resnet20", 4)
    ranking = result.ranking
    assert sorted(entry.layout for entry in ranking) == sorted(result.layouts)
    assert [entry.accuracy for entry in ranking] == sorted(accuracy.max(1).values.tolist(), reverse=True)
    for entry in ranking:
        row = accuracy[SPACE.index(entry.layout)]
        assert entry.accuracy == row.max() == row[entry.supernet]
        assert entry.macs == SPACE.macs(SPACE[SPACE.index(entry.layout)], 32, 3)
    assert result.best == ranking[0]
    assert result.default.layout == "4-3-3"


def test_a_layout_may_be_ranked_by_its_own_supernet_alone():
    accuracy, own = torch.rand(36, 3, dtype=torch.float64), [layout % 3 for layout in range(36)]
    result = build_result(SPACE, accuracy, macs, own)
    assert Ranking.model_validate_json(result.model_dump_json()) == result
    for entry in result.ranking:
        layout = SPACE.index(entry.layout)
        assert (entry.supernet, entry.accuracy) == (own[layout], accuracy[layout, own[layout]])
    assert result.accuracy_matrix == accuracy.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_best_within_the_cost_of_the_default(seed):
    accuracy = torch.rand(36, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = result_of(accuracy)
    affordable = [entry for entry in result.ranking if entry.macs <= result.default.macs]
    assert 0 < len(affordable) < 36
    assert result.best_within_default_macs.accuracy == max(entry.accuracy for entry in affordable)
    assert result.best_within_default_macs in affordable


@pytest.mark.parametrize("layouts", [["1-1-8", "4-3-3", "5-3-2"], ["1-1-8", "5-3-2", "8-2"]])
def test_part_of_a_search_space_with_its_default_or_without(layouts):
    result = result_of(torch.tensor([[0.5], [0.3], [0.6]], dtype=torch.float64), SPACE.subset(layouts))
    assert result.layouts == sorted(layouts)
    assert result == type(result).model_validate_json(result.model_dump_json())
    assert (result.default is not None) == ("4-3-3" in layouts)
    for choice in ("default", "best_within_default_macs"):
        if result.default:
            assert result.pick(choice).layout in ("4-3-3", "1-1-8")
        else:
            with pytest.raises(InputError, match=f"pick {choice}: the default is none of the 3 layouts"):
                result.pick(choice)
    damaged = {**result.model_dump(), "layouts": layouts[:2]}
    with pytest.raises(ValueError, match="does not rank the 2 layouts"):
        type(result).model_validate(damaged)


def test_layouts_that_were_trained_for_longer_come_first_and_tie_with_their_like_alone():
    accuracy, epochs = torch.full((36, 1), 0.5, dtype=torch.float64), [3] * 36
    accuracy[7], accuracy[5], accuracy[9], epochs[5], epochs[9] = 0.9, 0.7, 0.69, 27, 27
    result = build_result(SPACE, accuracy, macs, trained_epochs=epochs)
    assert [entry.layout for entry in result.ranking[:3]] == [str(list(SPACE)[index]) for index in (5, 9, 7)]
    assert result.best.accuracy == 0.7
    assert [entry.layout for entry in result.ranking if tied(result, entry, 10)] == [str(list(SPACE)[9])]
    assert type(result).model_validate(result.content()) == result
    with pytest.raises(ValueError, match="its best is not what its score-split accuracy says"):
        type(result).model_validate({**result.content(), "trained_epochs": [3] * 36})


def test_cheaper_layout_wins_a_tie():
    result = result_of(torch.full((36, 2), 0.5, dtype=torch.float64))
    macs = [entry.macs for entry in result.ranking]
    assert macs == sorted(macs)
    assert result.pareto_front == [result.best] == [result.ranking[0]]


@pytest.mark.parametrize("seed", range(20))
def test_pareto_front(seed):
    rng = random.Random(seed)
    entries = [
        Entry(layout="1", accuracy=rng.randint(0, 9) / 9, macs=rng.randint(1, 12), supernet=0)
        for _ in range(rng.randint(1, 30))
    ]
    front = pareto_front(entries)
    assert all(entry in entries for entry in front)
    for key in ("macs", "accuracy"):
        values = [getattr(entry, key) for entry in front]
        assert values == sorted(set(values))
    for entry in entries:  # somebody on the front is at least as good in both
        assert any(good.accuracy >= entry.accuracy and good.macs <= entry.macs for good in front)
    for good in front:  # and nobody is better than one on the front
        rivals = [entry for entry in entries if entry.accuracy >= good.accuracy and entry.macs <= good.macs]
        assert all(rival == good for rival in rivals)


def test_equals_tie_in_nineteen_of_twenty_pairs():
    pairs = torch.distributions.Binomial(1000, torch.full((2000, 2), 0.7, dtype=torch.float64)).sample() / 1000
    assert sum(ties(one, other, 1000) for one, other in pairs.tolist()) / 2000 == pytest.approx(0.95, abs=0.015)


def undecided(accuracy, chance, images):
    return why_undecided(result_of(accuracy), chance, images)


def test_a_best_layout_is_told_from_chance_and_from_the_worst():
    accuracy = torch.linspace(0.6, 0.7, 72, dtype=torch.float64).view(36, 2)
    assert undecided(accuracy, 0.1, 25_000) is None
    assert "cannot be told from the worst, 1-1-8 with 60.14 %, on 300 score" in undecided(accuracy, 0.1, 300)
    assert "8-1-1 with 70.00 %, cannot be told from chance, 69.00 %, on 300" in undecided(accuracy, 0.69, 300)
    assert undecided(torch.full((36, 4), 1.0), 0.5, 10**6), "all perfect"
    assert undecided(torch.full((36, 4), 0.0), 0.5, 10**6), "all wrong"


@pytest.mark.parametrize(("images", "classes", "accuracy"), [(32, 4, None), (700, 10, 0.8), (25_000, 100, None)])
def test_layouts_that_are_alike_have_a_winner_in_one_of_twenty_searches_at_most(images, classes, accuracy):
    """Accuracies drawn as equal layouts would give them, at chance or well above it."""
    truth = accuracy or 1 / classes
    draws = torch.distributions.Binomial(images, torch.full((200, 36, 4), truth, dtype=torch.float64)).sample()
    winners = sum(undecided(matrix / images, 1 / classes, images) is None for matrix in draws)
    assert winners <= 18  # 5 % of 200, and 2.5 standard deviations
