"""What a search found: layouts ranked from its matrices. Pure functions."""

from collections.abc import Callable, Sequence
from math import comb, hypot, sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .results import Entry, Ranking, rank
from .search_space import SearchSpace

_Z = NormalDist().inv_cdf(0.975)  # of 95 %, two-sided


def build_result(
    space: SearchSpace,
    accuracy: Tensor,
    macs: Callable[[Layout], int],
    own: Sequence[int] | None = None,
    probability: Sequence[float] | None = None,
    trained_epochs: Sequence[int] | None = None,
) -> Ranking:
    """Ranking, accuracies, the best layouts and the Pareto front.

    A layout's accuracy is its best over the supernets (paper, section 3.2); with equal accuracy the cheaper layout
    comes first.

    Args:
        accuracy: score-split accuracy of every layout under every supernet, fractions, (L, M).
        macs: multiply-accumulates of a layout.
        own: the supernet that alone says how good each layout is; the best of all says so if None.
        probability: of every layout, (L,), what to rank by instead.
        trained_epochs: of every layout, (L,), if some were trained alone for longer: they come first.
    """
    supernet = accuracy.argmax(1) if own is None else torch.tensor(own)
    best = accuracy[torch.arange(len(space)), supernet]
    entries = [
        Entry(
            layout=str(layout),
            accuracy=float(best[index]),
            macs=macs(layout),
            supernet=int(supernet[index]),
        )
        for index, layout in enumerate(space)
    ]
    layouts = [str(layout) for layout in space]
    values = None if probability is None else dict(zip(layouts, probability, strict=True))
    trained = None if trained_epochs is None else dict(zip(layouts, trained_epochs, strict=True))
    longer: dict[str, Any] = {} if trained_epochs is None else {"trained_epochs": list(trained_epochs)}
    return Ranking(
        model=space.name,
        mixture_size=accuracy.shape[1],
        **rank(entries, str(space.default_layout), values, trained),
        layouts=layouts,
        accuracy_matrix=accuracy.tolist(),
        probability=None if probability is None else list(probability),
        **longer,
    )


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error of an accuracy (both fractions) measured on so many images; never 0."""
    likely = (accuracy * images + 1) / (images + 2)  # all right of a few images is no certainty
    return (likely * (1 - likely) / images) ** 0.5


def spread(accuracy: float, first: float, images: int, first_images: int | None = None) -> float:
    """Half the 95 % interval of the difference of two accuracies (fractions), each on so many images.

    As if on other images for each, which is the wider interval. The first one's are as many, unless they are given.
    """
    return _Z * hypot(standard_error(accuracy, images), standard_error(first, first_images or images))


def ties(accuracy: float, first: float, images: int) -> bool:
    """Whether two accuracies (fractions) on so many images are no further apart than their `spread`."""
    return abs(first - accuracy) <= spread(accuracy, first, images)


def tied(found: Ranking, entry: Entry, images: int) -> bool:
    """Whether a layout, not the first, cannot be told from it by accuracies, where these rank both."""
    trained = found.trained or {}
    alike = found.probability is None and trained.get(entry.layout) == trained.get(found.best.layout)
    return alike and entry.layout != found.best.layout and ties(entry.accuracy, found.best.accuracy, images)


def why_undecided(found: Ranking, chance: float, images: int) -> str | None:
    """Why no layout can be called the best; None if one can.

    An accuracy a on n images has a variance of a (1 - a) / n. The best one must exceed chance by more than z standard
    errors of chance, and the worst one, if there are two, by z of their difference. z is the one-sided normal quantile
    of 5 % over the number of comparisons that it was picked from: L x M accuracies, L (L - 1) / 2 pairs of layouts.
    Where probabilities rank the layouts, the first must be more probable than the second, beyond rounding.

    Args:
        found: what was ranked.
        chance: share of the most frequent class among the score images, what a constant answer would reach.
        images: n, of the score split.
    """

    def told_apart(high: float, low: float, variance: float, comparisons: int) -> bool:
        return high - low > NormalDist().inv_cdf(1 - 0.05 / max(1, comparisons)) * sqrt(variance / images)

    best, worst, layouts = found.ranking[0], found.ranking[-1], len(found.ranking)
    if found.probability is not None:
        equal = [layout for layout, p in found.values.items() if p >= (1 - 1e-6) * found.values[best.layout]]
        return f"{' and '.join(equal[:2])} are equally probable" if len(equal) > 1 else None
    high, low = best.accuracy, worst.accuracy
    reached = f"{best.layout} with {100 * high:.2f} %"
    if not told_apart(high, chance, chance * (1 - chance), layouts * found.mixture_size):
        return f"the best, {reached}, cannot be told from chance, {100 * chance:.2f} %, on {images} score images"
    if layouts > 1 and not told_apart(high, low, high * (1 - high) + low * (1 - low), comb(layouts, 2)):
        lowest = f"{worst.layout} with {100 * low:.2f} %"
        return f"the best, {reached}, cannot be told from the worst, {lowest}, on {images} score images"
    return None
