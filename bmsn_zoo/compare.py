"""How good a ranking of layouts is, measured against the accuracies that they reach when trained alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

from scipy.stats import kendalltau

from .layout import Layout

Values = Mapping[Layout, float]


@dataclass(frozen=True)
class Quality:
    """What a ranking is worth; accuracies and regrets are fractions.

    Attributes:
        choice: the layout ranked first.
        tau: Kendall's tau-b with the truth, over all layouts.
        accuracy: true accuracy of the choice.
        regret: what the best layout of all has more.
        front_regret: the same within a budget, the mean over every layout's multiply-accumulates as the budget.
        worst_front_regret: the largest of these.
    """

    choice: Layout
    tau: float
    accuracy: float
    regret: float
    front_regret: float
    worst_front_regret: float


def quality(scores: Values, truth: Values, macs: Mapping[Layout, int], choice: Layout | None = None) -> Quality:
    """Measure a ranking against the truth.

    Args:
        scores: of every layout; higher is better. Among equal scores the cheaper layout is taken.
        truth: accuracy of every layout trained alone, a fraction; the same layouts.
        macs: multiply-accumulates of every layout.
        choice: what the method recommends, if not the layout of the highest score.

    Raises:
        ValueError: if the scores are not of the layouts of the truth.
    """
    if set(scores) != set(truth):
        raise ValueError(f"{len(scores)} scores are not of the {len(truth)} layouts whose accuracy is known")
    layouts = sorted(truth)
    first = _first(scores, macs, layouts) if choice is None else choice
    losses = []
    for budget in sorted(macs[layout] for layout in layouts):
        within = [layout for layout in layouts if macs[layout] <= budget]
        losses.append(max(truth[layout] for layout in within) - truth[_first(scores, macs, within)])
    tau = kendalltau([scores[layout] for layout in layouts], [truth[layout] for layout in layouts]).statistic
    best = max(truth.values())
    return Quality(first, float(tau), truth[first], best - truth[first], sum(losses) / len(losses), max(losses))


def _first(scores: Values, macs: Mapping[Layout, int], layouts: list[Layout]) -> Layout:
    return min(layouts, key=lambda layout: (-scores[layout], macs[layout]))


def expected_best(truth: Values, trained: int) -> float:
    """Expected true accuracy of the best of `trained` layouts drawn at random without replacement, a fraction."""
    ordered, count = sorted(truth.values()), len(truth)
    chances = [comb(place, trained - 1) / comb(count, trained) for place in range(count)]
    return sum(chance * accuracy for chance, accuracy in zip(chances, ordered, strict=True))
