"""Published accuracies of all layouts of a search space, to measure a search against without training anything."""

import csv
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..layout import Layout

_FOLDER = Path(__file__).parent
_SOURCES = {
    "cifar10-resnet20": "Javan Roshtkhari, Toews, Pedersoli, Balanced Mixture of SuperNets for Learning the CNN "
    "Pooling Architecture, AutoML 2023, arXiv 2306.11982 (file of the 36 layouts beside the authors' code)"
}


@dataclass(frozen=True)
class Table:
    """What was published of every layout of one search space, on one data set.

    Attributes:
        name: of the table.
        source: where the numbers come from.
        accuracy: test accuracy of every layout trained alone, a fraction.
        deviation: of that accuracy over its repeats, a fraction.
        supernet: accuracy of every layout inside mixtures of M supernets, a fraction, by M.
    """

    name: str
    source: str
    accuracy: dict[Layout, float]
    deviation: dict[Layout, float]
    supernet: dict[int, dict[Layout, float]]


def names() -> list[str]:
    """The tables that we ship."""
    return sorted(_SOURCES)


def table(name: str) -> Table:
    """A table by its name, such as "cifar10-resnet20".

    Raises:
        InputError: if there is none of this name.
    """
    if name not in _SOURCES:
        raise InputError(f"reference {name!r} is unknown: use {' or '.join(names())}")
    with (_FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def column(key: str) -> dict[Layout, float]:
        return {Layout.parse(row["layout"]): round(float(row[key]) / 100, 6) for row in rows}

    sizes = [int(key.split("_")[1][1:]) for key in rows[0] if key.startswith("supernet_") and key.endswith("_top1")]
    supernet = {size: column(f"supernet_m{size}_top1") for size in sizes}
    return Table(name, _SOURCES[name], column("standalone_top1"), column("standalone_std"), supernet)
