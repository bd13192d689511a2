"""Searches played on a table of published accuracies, in seconds and without images.

The accuracy of a layout under any supernet of a mixture of M is the published one, from the first step to the last,
with the binomial noise of the images that measure it: batches of 128 in steps, half the training images in the end. So
a play shows what a strategy makes of noisy scores and what that costs, not how training changes what layouts share.
Published are balanced mixtures alone: groups that are fixed (fixed, few-shot) are played with the accuracies of a
mixture of their size, searches side by side with those of one supernet. Every supernet is charged the 100 epochs that
the published ones were trained for; ten steps in a row share a draw, and so their score is of ten batches. A training
alone has the published accuracy and deviation, sqrt(f) times that if it is f times shorter than 200 epochs. What learns
by gradients of its own (darts, gaea), or has weights that were not published (unshared), cannot be played.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import cost
from .config import SearchConfig
from .layout import Layout
from .reference import Table
from .search_space import SearchSpace
from .strategies import create_strategy, scorings
from .trials import PLANS, Trial

_IMAGES, _SIDE = 50_000, 32  # of CIFAR-10, for training; half of them train weights, the others score
_BATCH, _EPOCHS, _STANDALONE_EPOCHS = 128, 100, 200  # as published
_STEPS = 10  # to a draw, so that a play takes seconds


class Played(NamedTuple):
    """What a play ends with.

    Attributes:
        method: what was played.
        supernets: M.
        scores: of all layouts that it ranks, higher is better.
        spent_macs: multiply-accumulates that it would have spent.
        choice: what it recommends, if not the layout of the highest score.
        trained: whether that is trained by then.
    """

    method: str
    supernets: int
    scores: dict[Layout, float]
    spent_macs: float
    choice: Layout | None = None
    trained: bool = False


def macs_of(space: SearchSpace) -> dict[Layout, int]:
    """Multiply-accumulates of every layout for one image of the table's size."""
    return {layout: space.macs(layout, _SIDE) for layout in space}


def activations(space: SearchSpace) -> Played:
    """Layouts ranked by the numbers that their 3x3 convolutions put out, which needs no search."""
    channels = [count * (2 if unit else 1) for unit, count in enumerate(space.backbone.channels)]  # two in each block
    scores = {}
    for layout in space:
        sides = space.backbone.resolutions(layout, _SIDE)
        scores[layout] = float(sum(count * side**2 for count, side in zip(channels, sides, strict=True)))
    return Played("activations", 0, scores, 0)


def training_macs(macs: float) -> float:
    """Multiply-accumulates of training a layout of so many alone, for as long as the published ones were."""
    return 3 * _STANDALONE_EPOCHS * _IMAGES * macs


def play_plan(method: str, table: Table, space: SearchSpace, config: SearchConfig) -> Iterator[Played]:
    """The loop of a plan of standalone trainings on a table; for the arguments see `play`.

    Yields:
        what it ranks: of layouts that were trained for fewer epochs than others, the latter first.
    """
    plan, rng = PLANS[config.strategy](space, config), np.random.default_rng((config.seed, 11))
    done: dict[Trial, float] = {}
    while trials := plan.next(done):
        for trial in trials:
            deviation = table.deviation[trial.layout] * (_STANDALONE_EPOCHS / trial.epochs) ** 0.5
            done[trial] = float(rng.normal(table.accuracy[trial.layout], deviation))
    scores = dict(sorted((trial.layout, trial.epochs + accuracy) for trial, accuracy in done.items()))
    spent = sum(training_macs(space.macs(t.layout, _SIDE)) * t.epochs / _STANDALONE_EPOCHS for t in done)
    yield Played(method, 0, scores, spent, trained=True)


def play(method: str, table: Table, space: SearchSpace, config: SearchConfig) -> Iterator[Played]:
    """The loop of a sampled one-shot search on a table.

    Args:
        method: what to call it.
        space: the layouts of the table.
        config: `strategy`, `seed`, `mixture_size` (of the table's, for a mixture), and what the strategy asks for.

    Yields:
        what the evaluation of all layouts finds, then what the strategy's own scores say, if it draws by such.
    """
    strategy, rng = create_strategy(space, config), np.random.default_rng((config.seed, 11))
    supernets = config.mixture_size
    published = table.supernet[supernets if config.strategy in ("balanced", "fixed", "few-shot") else 1]
    truth, macs = np.array([published[layout] for layout in space]), list(macs_of(space).values())
    budget = supernets * _EPOCHS * (_IMAGES // 2 // _BATCH) * _BATCH * 4 * float(np.mean(macs))
    images, spent, step, scored = _STEPS * _BATCH, 0, 0, scorings(strategy, supernets)
    while spent < budget:
        getattr(strategy, "splits", bool)(spent / budget)
        draw = strategy.draw(step, spent / budget, range(supernets))
        scores = rng.binomial(images, truth[draw.layout], scored) / images
        strategy.update(draw, scores.tolist())
        spent, step = spent + (3 + scored) * images * macs[draw.layout], step + 1
    final = rng.binomial(_IMAGES // 2, np.tile(truth[:, None], supernets)) / (_IMAGES // 2)
    best = final.max(1) if strategy.own is None else final[np.arange(len(space)), strategy.own]
    evaluation = supernets * _IMAGES // 2 * cost.tree_macs(space, _SIDE)
    yield Played(method, supernets, dict(zip(space, best.tolist(), strict=True)), spent + evaluation)
    answer = strategy.result()
    for name in ("highest_score", "greedy_leaf"):
        if first := answer.get("details", {}).get(name):
            by_them = dict(zip(space, map(max, answer["scores"]), strict=True))
            yield Played(f"{method}, own", supernets, by_them, spent, Layout.parse(first[0]))
