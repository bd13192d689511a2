"""The learning rate at its ends and everywhere between, and optimizers that cannot be used."""

from itertools import pairwise

import pytest
import torch

from bmsn_zoo.config import SearchConfig, TrainConfig
from bmsn_zoo.errors import InputError
from bmsn_zoo.optimizer import create_optimizer, learning_rate, set_learning_rate


@pytest.mark.parametrize("sched", ["cosine", "poly", "constant"])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 5), (4, 1), (10, 7), (300, 3)])
@pytest.mark.parametrize("warmup", [0, 2, 1000])
def test_the_rate_rises_to_lr_and_goes_from_there_to_min_lr_without_a_jump(sched, epochs, steps, warmup):
    config = TrainConfig(sched=sched, epochs=epochs, warmup_epochs=warmup, lr=0.4, min_lr=0.001)
    rates = [learning_rate(config, steps, step) for step in range(epochs * steps)]
    top = min(warmup, epochs - 1) * steps  # the first step after the warm-up
    assert rates[top] == max(rates) == 0.4
    assert all(0 < a < b for a, b in pairwise(rates[: top + 1]))
    assert all(b - a == pytest.approx(0.4 / (top + 1)) for a, b in pairwise(rates[: top + 1]))
    decay = rates[top:]
    if sched == "constant":
        assert set(decay) == {0.4}
    elif len(decay) > 1:
        assert decay[-1] == 0.001
        assert all(a > b for a, b in pairwise(decay))
        assert decay[len(decay) // 2] == pytest.approx(0.2, abs=0.7 / len(decay))


def test_a_search_decays_by_a_cosine():
    config = SearchConfig(epochs=3, warmup_epochs=1, lr=0.1, min_lr=0.02)
    assert [learning_rate(config, 2, step) for step in (0, 2, 5)] == [pytest.approx(0.1 / 3), 0.1, 0.02]


def test_every_group_takes_the_rate():
    model = torch.nn.Linear(2, 2)
    optimizer = create_optimizer(model, TrainConfig(weight_decay=0.1))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25], "biases are a group of their own"


@pytest.mark.parametrize(("opt", "reason"), [("nothing", "nothing"), ("adahessian", "gradients of gradients")])
def test_optimizers_that_cannot_be_used_are_refused(opt, reason):
    with pytest.raises(InputError, match=rf"opt '{opt}'.*{reason}"):
        create_optimizer(torch.nn.Linear(2, 2), TrainConfig(opt=opt))
