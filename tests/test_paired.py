"""Scores in pairs: assignments follow evidence, not noise and not the clock."""

import functools

import numpy as np
import pytest
import torch

from bmsn_zoo import InputError, SearchSpace
from bmsn_zoo.config import SearchConfig
from bmsn_zoo.strategies import Draw, PairedMixture, create_strategy

SPACE = SearchSpace("bmsn_resnet20")


def learn(supernets, steps, better=0.0, seed=0, **settings):
    """A mixture that saw batches of 128 images: supernet m is `better` with every layout whose index is m modulo M."""
    made = PairedMixture(SPACE, SearchConfig(mixture_size=supernets, scores="pairs", **settings))
    rng = np.random.default_rng(seed)
    for step in range(steps):
        drawn = made.draw(step, step / steps, range(supernets))
        truth = np.full(supernets, 0.6 + 0.1 * rng.standard_normal())  # batches are easy or hard for all
        truth[drawn.layout % supernets] += better
        made.update(drawn, rng.binomial(128, truth.clip(0, 1)) / 128)
    return made


@functools.cache
def right(supernets, steps, better):
    """Mean probability of the better supernet."""
    assignment = learn(supernets, steps, better).assignment(1.0)
    return float(assignment[range(len(SPACE)), torch.arange(len(SPACE)) % supernets].mean())


@pytest.mark.parametrize(
    ("supernets", "steps"),
    [(2, 100), (4, 1000), (8, 100), *(pytest.param(m, 1500, marks=pytest.mark.slow) for m in (2, 4, 8))],
)
def test_noise_leaves_the_assignment_near_uniform(supernets, steps):
    surest = [float(learn(supernets, steps, seed=seed).assignment(1.0).max(1).values.mean()) for seed in range(3)]
    assert np.median(surest) < 1.1 / supernets
    assert max(surest) < 2 / supernets


def test_a_real_difference_makes_it_sharp_and_a_larger_one_sooner():
    assert right(2, 1500, 0.1) > 0.95
    assert right(4, 1500, 0.1) > 0.9
    assert right(4, 300, 0.1) > right(4, 300, 0.05) > 0.3
    assert right(4, 1500, 0.05) > right(4, 300, 0.05), "with evidence"


def test_supernets_are_used_equally_all_along():
    for steps in (0, 1, 30, 500):
        report = learn(4, steps, 0.1).report(0.5)
        assert report["usage"] == pytest.approx([0.25] * 4, rel=0.01)
        assert 0 <= report["sharpness"] <= 100


def test_no_sharpness_exceeds_the_largest():
    assert learn(2, 1000, 0.2, max_sharpness=20).sharpnesses().max() == 20


def test_scores_are_a_mean_first_then_a_moving_average_and_equal_accuracies_are_no_evidence():
    made = PairedMixture(SPACE, SearchConfig(mixture_size=2, scores="pairs"))
    for first in (0.2, 0.4, 0.9):
        made.update(Draw(3, 0), [first, first])
    assert made.scores[3].tolist() == pytest.approx([0.5, 0.5])
    for _ in range(17):
        made.update(Draw(3, 0), [0.5, 0.5])
    assert torch.equal(made.assignment(1.0), torch.full((36, 2), 0.5, dtype=torch.float64))
    made.update(Draw(3, 1), [1.0, 0.5])
    assert made.scores[3].tolist() == pytest.approx([0.55, 0.5])
    assert (made.scores[:3] == 1).all()


def test_a_restored_state_goes_on_bit_for_bit():
    made, rng = learn(4, 200, 0.05), np.random.default_rng(5)
    again = PairedMixture(SPACE, SearchConfig(mixture_size=4, scores="pairs"))
    again.load_state_dict(made.state_dict())
    for step in range(200, 400):
        drawn = made.draw(step, 0.5, range(4))
        assert again.draw(step, 0.5, range(4)) == drawn
        seen = rng.random(4)
        made.update(drawn, seen), again.update(drawn, seen)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in made.state_dict().items())
    assert made.result() == again.result()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture_size": 1}, "scores pairs compare supernets: give a mixture-size of 2 or more"),
        ({"strategy": "uniform"}, "scores pairs: strategy uniform assigns nothing by scores"),
    ],
)
def test_what_has_no_pairs_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        create_strategy(SPACE, SearchConfig(scores="pairs", **settings))
