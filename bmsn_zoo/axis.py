"""Where values lie along the side of a chart, and which of them are written beside it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator


@dataclass(frozen=True)
class Axis:
    """Values along one side of a chart, from `start` to `end` in its picture.

    Attributes:
        low: value at the start.
        high: value at the end.
        start: place in the picture.
        end: place in the picture.
        log: whether equal ways are equal ratios.
        ticks: values to write beside it.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[float]

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> "Axis":
        """An axis that holds some values."""
        found = list(values)
        low, high = min(found), max(found)
        if log := log and low > 0 and high > 2 * low:
            subs, wide = (1, 2, 5) if high > 10 * low else (1, 2, 3, 5, 7), high > 4 * low
            ticks = [10.0**ten * sub for ten in range(math.floor(math.log10(low)), 10) for sub in subs]
            low, high = low / 1.15, high * 1.05
        else:
            room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
            wide, low, high = False, low - room, high + room
        if not wide:
            ticks = list(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        return cls(low, high, start, end, log, [tick for tick in map(float, ticks) if low <= tick <= high])

    def at(self, value: float) -> float:
        """Where in the picture a value lies."""
        share = (value - self.low) / (self.high - self.low)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + (self.end - self.start) * share, 1)
