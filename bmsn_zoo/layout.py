"""`Layout`: where a network downsamples, as data. No torch here."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from .errors import InputError, brief

_MAX_ENTRY, _MAX_SCALES = 9999, 32
_TEXT = re.compile(r" *[0-9]{1,4}(?: *[-,] *[0-9]{1,4})* *")


def halve_down(side: int) -> int:
    """Half a side in pixels as 2x2 pools leave it, an odd last row being dropped."""
    return side // 2


def halve_up(side: int) -> int:
    """Half a side in pixels as strides of 2 leave it, an odd last row being kept."""
    return -(-side // 2)


@dataclass(frozen=True, order=True)
class Layout:
    """How many consecutive units of a backbone work at each resolution (paper, section 3).

    `Layout((5, 3, 2))` runs units 0 to 4 at full resolution, 5 to 7 at half and 8 to 9 at a quarter.

    Args:
        units_per_scale: units at each resolution, full resolution first; every entry is at least 1.

    Raises:
        InputError: if empty, or an entry is not a whole number of at least 1.
    """

    units_per_scale: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.units_per_scale:
            raise InputError("layout is empty: give the units at each resolution, such as 5-3-2")
        if len(self.units_per_scale) > _MAX_SCALES:
            raise InputError(f"layout of {len(self.units_per_scale)} scales: it has at most {_MAX_SCALES}")
        name = "-".join(brief(entry) for entry in self.units_per_scale)[:80]
        for entry in self.units_per_scale:
            if isinstance(entry, bool) or not isinstance(entry, int):
                raise InputError(f"layout {name} has {brief(entry)}: every entry is a whole number, such as in 5-3-2")
            if entry < 1:
                raise InputError(
                    f"layout {name} has {brief(entry)}: every resolution needs at least 1 unit, such as 5-3-2"
                )
            if entry > _MAX_ENTRY:
                raise InputError(f"layout {name} has an entry above {_MAX_ENTRY}: no backbone has that many units")

    @classmethod
    def parse(cls, value: "str | Sequence[Any] | Layout") -> "Layout":
        """Read a layout from text ("5-3-2", "5,3,2"), a tuple or a JSON list.

        Raises:
            InputError: if the value is none of these or not a valid layout.
        """
        if isinstance(value, Layout):
            return value
        if isinstance(value, str):
            if len(value) > 500:
                raise InputError(f"layout of {len(value)} characters: it has at most {_MAX_SCALES} scales")
            if not _TEXT.fullmatch(value):
                raise InputError(f"layout {brief(value)} is not a list of whole numbers: write it as 5-3-2")
            return cls(tuple(int(entry) for entry in re.split("[-,]", value)))
        if isinstance(value, list | tuple):
            return cls(tuple(value))
        raise InputError(f"layout {brief(value)} is not text or a list: write it as 5-3-2 or [5, 3, 2]")

    def __str__(self) -> str:
        return "-".join(str(entry) for entry in self.units_per_scale)

    @property
    def num_units(self) -> int:
        """Units in all."""
        return sum(self.units_per_scale)

    @property
    def num_scales(self) -> int:
        """Resolutions; one more than there are downsamplings."""
        return len(self.units_per_scale)

    @property
    def flags(self) -> tuple[int, ...]:
        """For each unit 1 if its input is downsampled, else 0; `flags[0]` is 0."""
        return tuple(int(scale > 0 and unit == 0) for scale, n in enumerate(self.units_per_scale) for unit in range(n))

    def check(
        self,
        num_units: int,
        image_size: int | None = None,
        halve: Callable[[int], int] = halve_down,
        stem: Callable[[int], int] = int,
    ) -> "Layout":
        """Return this layout if a backbone of `num_units` units can run it on images of `image_size` pixels.

        Args:
            halve: what a downsampling makes of a side.
            stem: what runs before the first unit makes of the image's.

        Raises:
            InputError: if the units do not add up, or a downsampling would have no two pixels to make one of.
        """
        if self.num_units != num_units:
            raise InputError(f"layout {self} sums to {self.num_units}, the backbone has {num_units} units")

        def fits(size: int) -> bool:
            sides = self.resolutions(stem(size), halve)
            return sides[-1] >= 1 and all(sides[unit - 1] > 1 for unit, flag in enumerate(self.flags) if flag)

        if image_size is not None and not fits(image_size):
            raise InputError(
                f"layout {self} has {self.num_scales} scales, too many for {image_size}-pixel images: "
                f"use images of at least {next(filter(fits, count(1)))} pixels or fewer scales"
            )
        return self

    def resolutions(self, image_size: int, halve: Callable[[int], int] = halve_down) -> tuple[int, ...]:
        """Side of each unit's feature map in pixels, for square images of `image_size` pixels.

        Args:
            halve: what a downsampling makes of a side; pools round down, strides up.
        """
        sides = [image_size]
        for _ in self.units_per_scale[1:]:
            sides.append(halve(sides[-1]))
        return tuple(side for side, units in zip(sides, self.units_per_scale, strict=True) for _ in range(units))
