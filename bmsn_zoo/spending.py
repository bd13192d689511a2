"""What a search spends, in multiply-accumulates of convolutions, and how far that brings it."""

import math
from collections.abc import Sequence

from .config import SearchConfig
from .errors import InputError

_LATE = 0.25  # share of a budget at whose end the evaluations lie that a ranking is the mean of


class Spending:
    """How far a search is, and what it has spent.

    Training costs three forwards, a scoring one. A search ends after its epochs, or, with `budget`, before a step
    of the dearest layout would no longer be paid for; its schedules run over its steps, or, with a budget, over what
    they cost. What the evaluations need that its ranking comes from is put aside.

    Args:
        config: `budget`, `epochs`, `evaluate_last`, `evaluate_every`, `parallel`.
        epoch_steps: of all processes.
        costs: multiply-accumulates of a step with each layout.
        evaluation: multiply-accumulates of one evaluation of all layouts.

    Attributes:
        paid: multiply-accumulates of all processes before this epoch, without the evaluations of the ranking.
        own: of this process's steps of this epoch.
        late: evaluations of the ranking so far.
        dearest: multiply-accumulates of the dearest step.
        last: position of the last step.

    Raises:
        InputError: if the budget is too small for one step, or there are fewer epochs than evaluations.
    """

    def __init__(self, config: SearchConfig, epoch_steps: int, costs: Sequence[int], evaluation: int) -> None:
        self.paid, self.own, self.late = 0, 0, 0
        self.config, self.epoch_steps, self.evaluation = config, epoch_steps, evaluation
        self._mean, self.dearest, self._limit = sum(costs) / len(costs), max(costs), math.inf
        if config.budget is None:
            assert config.epochs
            if config.evaluate_last > config.epochs:
                raise InputError(f"evaluate-last {config.evaluate_last}: there are {config.epochs} epochs: use less")
            self.last: float = config.epochs * epoch_steps - 1
            return
        self._limit = config.budget - config.evaluate_last * evaluation
        if config.parallel == "mixture":
            raise InputError("budget: parallel mixture ends after epochs alone: use --parallel data, or give --epochs")
        if self._limit < self.dearest:
            least = config.evaluate_last * evaluation + self.dearest
            late = f"{config.evaluate_last} evaluations" if config.evaluate_last > 1 else "an evaluation"
            raise InputError(
                f"budget {config.budget:.4g} is too small: give at least {least} multiply-accumulates, which pay for "
                f"one step and {late} of all layouts"
            )
        self.last = self._limit / self._mean

    @property
    def total(self) -> float:
        """Multiply-accumulates of the whole search, as expected; of its budget, all."""
        config, every = self.config, self.config.evaluate_every
        watched = config.epochs // every if every and config.epochs else 0
        steps = (self.last + 1) * self._mean
        return config.budget or steps + (config.evaluate_last + watched) * self.evaluation

    @property
    def spent(self) -> int:
        """Multiply-accumulates so far."""
        return self.paid + self.own + self.late * self.evaluation

    def affords(self, cost: int) -> bool:
        """Whether so much more may be spent; without a budget it always may."""
        return self.paid + self.own + cost <= self._limit

    def over(self, step: int) -> bool:
        """Whether a search that has done so many steps ends here."""
        return step > self.last if self.config.budget is None else not self.affords(self.dearest)

    def position(self, step: int) -> float:
        """How far a search is that has done so many steps, in steps; with a budget, in steps of mean cost."""
        return step if self.config.budget is None else (self.paid + self.own) / self._mean

    def progress(self, step: int) -> float:
        """The same as a share of the whole search."""
        return self.position(step) / max(1, self.last)

    def late_due(self, step: int) -> int:
        """Evaluations of the ranking that belong before this step: after each of the last epochs, all but the last
        one, or, with a budget, at even distances in its last quarter."""
        count = self.config.evaluate_last
        if self.config.budget is None:
            assert self.config.epochs
            return max(0, step // self.epoch_steps - (self.config.epochs - count))
        return sum(self.progress(step) >= 1 - _LATE * (count - done) / count for done in range(1, count))
