"""The loop of a search by standalone trainings: a plan says which, until it has no more."""

import logging
import math
from collections.abc import Callable, Iterable
from itertools import accumulate, takewhile
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator

from .. import progress
from ..config import SearchConfig
from ..errors import InputError
from ..files import write_csv
from ..ranking import build_result
from ..results import Ranking, TrialResult
from ..run_folder import RunFolder
from ..search_base import SearchBase
from ..training import Training
from . import PLANS
from .protocol import Trial
from .runner import Runner, trial_config

_log = logging.getLogger(__name__)


class PlanSearch(SearchBase):
    """A search that trains layouts alone on one half of the training images and measures them on the other."""

    def __init__(self, config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        if accelerator.num_processes > 1:
            raise InputError(f"strategy {config.strategy} starts its own workers: launch one process, and give --jobs")
        if config.init_from is not None:
            raise InputError(f"init-from says nothing to strategy {config.strategy}: use --pretrained-from")
        super().__init__(config, folder, accelerator)
        config = self.config
        if config.batch_size > len(self.halves[0]):
            raise InputError(f"batch-size {config.batch_size} is more than the {len(self.halves[0])} images: use less")
        self.plan = PLANS[config.strategy](self.space, config)
        self.done: dict[Trial, TrialResult] = {}
        first = self.plan.next({})[0]
        if config.budget is not None and config.budget < self._work(first):
            raise InputError(
                f"budget {config.budget:.4g} is too small: the first training, of {first.layout} for {first.epochs} "
                f"epochs, needs {self._work(first)} multiply-accumulates"
            )

    def run(self) -> None:
        """Every trial of the plan, then the result."""
        work = self._planned()
        if self.accelerator.is_main_process:
            _log.info(
                f"search: {len(self.space)} layouts of {self.config.model} at {self.source.image_size} pixels "
                f"({self.source.size_origin}); {len(self.halves[0])} images train, {len(self.halves[1])} score; "
                f"{len(work)} trainings"
            )
        self.begin_run()
        with Runner(self.config, self.folder.path, self.accelerator) as runner:
            progress.begin(sum(work) / (runner.jobs if self.folder.dry else 1), dry=self.folder.dry)
            if self.folder.dry:
                self._try_dearest(runner)
            while trials := self._paid(
                self.plan.next({trial: each.holdout_accuracy for trial, each in self.done.items()}), self.done
            ):
                ended: dict[Trial, TrialResult] = {}
                runner.run(trials, lambda trial, result, ended=ended: self._told(ended, trial, result))  # type: ignore[misc]
                self.done |= {trial: ended[trial] for trial in trials}  # in the plan's order, whoever was first
        self._write_result()

    def _planned(self) -> list[int]:
        """Multiply-accumulates of every training of the plan, as expected: which layouts go on is not known yet."""
        plan, done = PLANS[self.config.strategy](self.space, self.config), dict[Trial, float]()
        while trials := self._paid(plan.next(done), done):
            done |= dict.fromkeys(trials, 0.5)
        return [self._work(trial) for trial in done]

    def _paid(self, trials: list[Trial], done: Iterable[Trial]) -> list[Trial]:
        """Those up to the first that the budget does not pay for: what follows may be cheaper, but is not its turn."""
        left = math.inf if self.config.budget is None else self.config.budget - sum(map(self._work, done))
        spent = accumulate(map(self._work, trials))
        return [trial for trial, _ in takewhile(lambda pair: pair[1] <= left, zip(trials, spent, strict=True))]

    def _work(self, trial: Trial) -> int:
        """Multiply-accumulates of a training and of its measurement, as its result states them."""
        weight, score = map(len, self.halves)
        trained = trial.epochs * (weight // self.config.batch_size) * self.config.batch_size
        return (3 * trained + score) * self.macs(trial.layout)

    def _try_dearest(self, runner: Runner) -> None:
        """A few steps of it, as a worker trains it; as many go on at a time as there are jobs."""
        dearest = max(self.space, key=lambda layout: self._work(Trial(layout, 0, 1)))
        config = trial_config(self.config, Trial(dearest, 0, 1), self.accelerator.mixed_precision, runner.threads)
        torch.set_num_threads(runner.threads)
        Training(config, self.folder, self.accelerator).run()

    def _told(self, ended: dict[Trial, TrialResult], trial: Trial, result: TrialResult) -> None:
        ended[trial] = result
        number, held = len(self.done) + len(ended), result.holdout_accuracy
        seconds = result.duration_seconds
        self.folder.log({**_describe(trial, result), "seconds": seconds})
        self.folder.touch()
        progress.reach(sum(map(self._work, [*self.done, *ended])), 0)
        progress.tell(
            f"training {number}: {trial.layout}, seed {trial.seed}, {trial.epochs} epochs: held-out accuracy "
            f"{100 * held:.2f} %, {seconds:.0f} s"
        )

    def _ranking(self, which: Callable[..., int]) -> Ranking:
        """The layouts, by those trainings of each whose epochs `which` chooses; of several seeds the mean."""
        chosen = {one: which(t.epochs for t in self.done if t.layout == one) for one in {t.layout for t in self.done}}
        accuracy = {
            layout: mean(r.holdout_accuracy for t, r in self.done.items() if t.layout == layout and t.epochs == epochs)
            for layout, epochs in chosen.items()
        }
        space = self.space.subset(accuracy)
        matrix = torch.tensor([[accuracy[layout]] for layout in space], dtype=torch.float64)
        trained = [chosen[layout] for layout in space] if len({*chosen.values()}) > 1 else None
        return build_result(space, matrix, self.macs, trained_epochs=trained)

    def _write_result(self) -> None:
        """Write search.json, and the table of a brute force."""
        config, found = self.config, self._ranking(max)
        if config.strategy == "brute-force":
            self._write_table()
        trials: list[Any] = [_describe(trial, result) for trial, result in self.done.items()]
        self.write_result(
            found,
            undecided=self.why_undecided(self._ranking(min)),  # after trainings that are all alike
            epochs=config.epochs or 1,
            spent_macs=sum(result.spent_macs for result in self.done.values()),
            details={"trials": trials},
        )

    def _write_table(self) -> None:
        """ground_truth.csv: a row for each layout and seed, accuracies in percent, as published tables have them."""
        rows = [
            {
                "layout": trial.layout,
                "standalone_top1": f"{100 * result.holdout_accuracy:.2f}",
                "seed": trial.seed,
                "epochs": trial.epochs,
                "held_out_images": result.holdout_images,
                "macs": result.macs,
            }
            for trial, result in sorted(self.done.items())
        ]
        write_csv(self.folder.path / "ground_truth.csv", rows)


def _describe(trial: Trial, result: TrialResult) -> dict[str, Any]:
    about = {"layout": str(trial.layout), "seed": trial.seed, "epochs": trial.epochs}
    return {**about, "accuracy": result.holdout_accuracy, "spent_macs": result.spent_macs}
