"""How far a run is, and how long the rest of it takes: one live line for who watches, elsewhere what a log needs."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from shutil import get_terminal_size
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_log = logging.getLogger(__name__)
_WARM, _MEASURED = 2, 10  # steps before time is taken, which compile and allocate, and after
_meter: "Meter | None" = None


class Measured(Exception):
    """A dry run has measured what it wanted: in `seconds` the whole run would be done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Meter:
    """Work of a run, in multiply-accumulates: all of it, and what is done.

    Args:
        total: of the whole run, trainings within it included.
        done: before this segment.
        dry: whether to stop after a few steps, or their epoch, by `Measured`.
    """

    def __init__(self, total: float, done: float, dry: bool) -> None:
        self.total, self.dry, self.steps, self._stack = total, dry, 0, ExitStack()
        notebook = type(sys.stderr).__module__.startswith("ipykernel")  # which writes a line anew, as a terminal does
        watched = (sys.stderr.isatty() or notebook) and _log.isEnabledFor(logging.INFO)
        self.live = watched and PartialState().is_main_process
        form = "{desc} {percentage:3.0f}%|{bar:12}| {elapsed}, {remaining} left{postfix}"
        wide = min(80, get_terminal_size().columns)  # rows are given, since some terminals say that they have none
        self.line: Any = tqdm(
            total=total, initial=done, bar_format=form, smoothing=0, disable=not self.live, leave=False, ncols=wide,
            nrows=20, mininterval=1.0 if notebook else 0.1,
        )  # fmt: skip
        if self.live:
            self._stack.enter_context(logging_redirect_tqdm())
        self.begun, self.done, self.since, self._early = done, done, time.monotonic(), 1.0

    def add(self, work: float) -> None:
        """Count work that is done."""
        self.done += work
        self.line.update(work)

    @property
    def speed(self) -> float:
        """Multiply-accumulates a second in this segment."""
        done = self.done - self.begun
        return done / max(1e-9, time.monotonic() - self.since) if done else self._early

    def count_step(self) -> None:
        """Say after the first steps how long all will take, or end a dry run."""
        self.steps += 1
        if self.steps == _WARM:
            _wait()
            self._early = self.speed
            self.begun, self.since = self.done, time.monotonic()
        slow = PartialState().num_processes == 1 and time.monotonic() - self.since > 20 and self.steps > _WARM
        if slow or self.steps == _WARM + _MEASURED:
            stop_if_dry()
        if self.steps == _WARM + _MEASURED and PartialState().is_main_process:
            left = (self.total - self.done) / max(1.0, self.speed)
            _log.info("about %s left for all of it, as the first steps go", duration(left))

    def close(self) -> None:
        """Take the line away."""
        self.line.close()
        self._stack.close()


def begin(total: float, done: float = 0.0, dry: bool = False) -> None:
    """Begin to measure a run; one within another is a part of that."""
    global _meter
    _meter = _meter or Meter(total, done, dry)


def end() -> None:
    """End it, whether or not it was begun."""
    global _meter
    if _meter:
        _meter.close()
    _meter = None


def reach(added: float, since: float) -> None:
    """Correct what is done: so much since a value of `done`."""
    if _meter:
        _meter.add(max(0.0, since + added - _meter.done))


def done() -> float:
    """Work that is done."""
    return _meter.done if _meter else 0.0


def stop_if_dry() -> None:
    """End a dry run here, if this is one."""
    if _meter and _meter.dry:
        _wait()
        raise Measured(_meter.total / _meter.speed)


def rehearse(run: Callable[[], None]) -> float:
    """Begin a run whose folder is dry; seconds that all of it would take."""
    try:
        run()
    except Measured as measured:
        return measured.seconds
    finally:
        end()
    raise RuntimeError("a dry run came to its end")


def tell(text: str) -> None:
    """A line for an epoch or what is as long, with the time left; on a terminal the live line says it."""
    seconds = (_meter.total - _meter.done) / _meter.speed if _meter and _meter.speed > 1 else 0.0  # a step was done
    left = f", {duration(seconds)} left" if seconds >= 0.5 else ""
    _log.log(logging.DEBUG if _meter and _meter.live else logging.INFO, "%s%s", text, left)


class Bar:
    """Steps on the live line; of a command without `begin`, a line of its own.

    Args:
        items: one for each step.
        count: of them.
        title: shown before.
        work: of all of them, in multiply-accumulates.
        training: whether these are the steps that a dry run measures.
    """

    def __init__(self, items: Iterable[Any], count: int, title: str, work: float = 0.0, training: bool = True) -> None:
        self._items, self._count, self._title, self._work, self._training = items, count, title, work, training
        self._number = 0

    def __iter__(self) -> Iterator[Any]:
        if _meter is None:
            yield from tqdm(self._items, self._title, self._count, leave=False, disable=not sys.stderr.isatty())
            return
        _meter.line.set_description_str(self._title, refresh=False)
        _meter.line.set_postfix_str("", refresh=False)  # of what was before
        for item in self._items:
            yield item
            self.count()

    def count(self) -> None:
        """Count the step at hand as done, which a loop that breaks off does itself."""
        if _meter:
            _meter.add(self._work / self._count)
            if self._training:
                _meter.count_step()

    def show(self, text: str) -> None:
        """Show what the next step gave, whose values may come late."""
        self._number += 1
        if _meter:
            _meter.line.set_postfix_str(text, refresh=False)
        _log.debug("%s, step %d: %s", self._title, self._number, text)


def duration(seconds: float) -> str:
    """A time for people, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
