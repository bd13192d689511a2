"""Rankings against the published truth: the check values of the design, and what a perfect and a bad ranking score."""

import pytest

from bmsn_zoo import InputError, SearchSpace, reference
from bmsn_zoo.compare import expected_best, quality

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
    assert (perfect.tau, perfect.regret, perfect.front_regret) == (1, 0, 0)
    reverse = quality({layout: -value for layout, value in TABLE.accuracy.items()}, TABLE.accuracy, MACS)
    assert reverse.tau == -1
    assert reverse.regret == max(TABLE.accuracy.values()) - min(TABLE.accuracy.values())
    assert reverse.worst_front_regret >= reverse.front_regret > 0


@pytest.mark.parametrize(("trained", "accuracy"), [(1, 90.12), (2, 90.75), (4, 91.18), (8, 91.52), (36, 92.01)])
def test_random_trainings(trained, accuracy):
    assert 100 * expected_best(TABLE.accuracy, trained) == pytest.approx(accuracy, abs=0.006)


def test_unknown_tables_and_other_layouts_are_refused():
    with pytest.raises(InputError, match="cifar10-resnet20"):
        reference.table("imagenet")
    with pytest.raises(ValueError, match="35 scores"):
        quality(dict(list(TABLE.accuracy.items())[1:]), TABLE.accuracy, MACS)
