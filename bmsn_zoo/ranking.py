"""What a search found: layouts ranked from its matrices. Pure functions."""

from torch import Tensor

from .results import Entry, Ranking, pareto_front
from .search_space import SearchSpace


def build_result(space: SearchSpace, accuracy: Tensor, image_size: int, in_chans: int) -> Ranking:
    """Ranking, accuracies, the best layouts and the Pareto front.

    A layout's accuracy is its best over the supernets (paper, section 3.2); with equal accuracy the cheaper layout
    comes first.

    Args:
        accuracy: score-split accuracy of every layout under every supernet, fractions, (L, M).
        image_size: side of the images in pixels, for the multiply-accumulates.
        in_chans: channels of the images.
    """
    best, supernet = accuracy.max(1)
    entries = [
        Entry(
            layout=str(layout),
            accuracy=float(best[index]),
            macs=space.macs(layout, image_size, in_chans),
            supernet=int(supernet[index]),
        )
        for index, layout in enumerate(space)
    ]
    ranking = sorted(entries, key=Entry.order)
    default = entries[space.index(space.default_layout)]
    return Ranking(
        model=space.name,
        mixture_size=accuracy.shape[1],
        default=default,
        best=ranking[0],
        best_within_default_macs=next(entry for entry in ranking if entry.macs <= default.macs),
        pareto_front=pareto_front(entries),
        ranking=ranking,
        layouts=[str(layout) for layout in space],
        accuracy_matrix=accuracy.tolist(),
    )
