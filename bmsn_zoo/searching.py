"""The search: a mixture of supernets over pooling layouts, top to bottom (arXiv:2306.11982)."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, PartialState

from . import hub, report, runtime
from .command import run_command, speak, take_dry_run
from .config import RELAXED, SearchConfig, load_recipe, over_recipe
from .errors import InputError
from .one_shot import OneShotSearch
from .optimizer import cost_quarters, create_optimizer, decay_powers, set_learning_rate
from .progress import rehearse
from .relaxed import RelaxedSearch
from .run_folder import RunFolder, last_precision, open_run, resolve_config, run_name
from .starts import find_start
from .step import Lag, Trainer, check_finite, train_and_score
from .strategies import STRATEGIES, Draw, Strategy, create_strategy, scorings
from .trials import PLANS
from .trials.plan_search import PlanSearch
from .usage import parser_of

_EXCHANGE_STEPS = 32  # steps between exchanges among processes that own supernets


def search(config: SearchConfig, output: Path | None = None, resume: bool = False) -> Path:
    """Search the pooling layouts of a backbone on a data set.

    Args:
        config: see `SearchConfig`.
        output: folder of the run; a new one under runs/ if None.
        resume: continue the run in `output` after its last whole epoch.

    Returns:
        the folder, which holds `search.json`, the supernets' weights, metrics and pictures.

    Raises:
        InputError: for a setting that cannot be used (nothing is written then), or if the loss diverges.
    """
    kind = _kind(config.strategy)
    accelerator = runtime.start(config, last_precision(output) if output and resume else None)
    with open_run("search", output, resume, run_name(config)) as folder:
        kind(config, folder, accelerator).run()
    return folder.path


def _kind(strategy: str) -> Any:
    kinds: dict[str, Any] = {**dict.fromkeys(STRATEGIES, _Search), **dict.fromkeys(RELAXED, RelaxedSearch)}
    kinds |= dict.fromkeys(PLANS, PlanSearch)
    if strategy not in kinds:
        raise InputError(f"strategy {strategy!r} is unknown: use {', '.join(kinds)}")
    return kinds[strategy]


def try_search(config: SearchConfig) -> Path:
    """Print what a search would do, and how long it would take, as a few of its steps show; it writes to no folder."""
    kind, accelerator = _kind(config.strategy), runtime.start(config)
    run = kind(config, RunFolder(Path(os.devnull), dry=True), accelerator)
    seconds = rehearse(run.run)
    dearest = max(run.space, key=run.macs)
    if accelerator.is_main_process:
        layouts = f"{len(run.space)}, the dearest {dearest} with {run.macs(dearest) / 1e6:.1f} M MACs"
        report.print_dry_run(run.config, layouts, seconds, runtime.peak_memory_mib(accelerator.device))
    return run.folder.path


class _Search(OneShotSearch):
    """A search that trains one supernet with one layout in each step, both drawn (paper, Algorithm 1)."""

    strategy: Strategy

    def __init__(self, config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, folder, accelerator)
        config = self.config  # as the images complete it
        self.strategy = create_strategy(self.space, config)
        self.splits = getattr(self.strategy, "splits", lambda done: False)
        self.takes_scores = self.strategy.scoring != "none"
        self.scored = list(self.mixture.supernets) if self.strategy.scoring == "all" else None
        if self.scored and config.parallel == "mixture":
            raise InputError("parallel mixture: this search scores all supernets in every step: use --parallel data")
        # multiply-accumulates of a step: training costs three forwards, a scoring one
        scored = scorings(self.strategy, len(self.mixture))
        macs = [self.macs(layout) for layout in self.space]
        self.costs = [(3 + scored) * config.batch_size * one for one in macs]
        self.count_costs(self.costs)
        # with rates by cost, each quarter of the layouts moves the same weights with momentum of its own
        by_cost = config.rate_decay == "cost"
        self.powers = decay_powers(config, macs) if by_cost else [None] * len(macs)
        self.quarter = cost_quarters(macs) if by_cost else [0] * len(macs)
        self.quarters = {m: [self._with_momentum(m, q) for q in range(max(self.quarter) + 1)] for m in self.trainers}

    def _with_momentum(self, supernet: int, quarter: int) -> Trainer:
        trainer = self.trainers[supernet]
        if quarter == 0:
            return trainer
        optimizer = self.accelerator.prepare_optimizer(create_optimizer(trainer.supernet, self.config))
        self.optimizers[f"supernet-{supernet}-quarter-{quarter}"] = optimizer
        return trainer._replace(optimizer=optimizer)

    def _copy_first(self) -> None:
        """Make all supernets copies of the first one, whose optimizers start anew."""
        weights = self.trainers[0].supernet.state_dict()
        for trainer in (each for quarters in self.quarters.values() for each in quarters):
            trainer.supernet.load_state_dict(weights)
            trainer.optimizer.optimizer.state.clear()

    def run(self) -> None:
        """All epochs, or what the budget pays for, then the last evaluation of every layout under every supernet."""
        config, accelerator, role, spending = self.config, self.accelerator, self.role, self.spending
        self.begin()
        epoch = self.folder.epoch
        while not spending.over(epoch * self.epoch_steps):
            started = time.monotonic()
            steps, bar = self.steps(epoch), self.batches(epoch)
            lag, sums = Lag[tuple[int, Draw]](), np.zeros(2 + config.mixture_size)

            for step, batch, score_batch in bar:
                self.evaluate_late(spending.late_due(step))
                progress = spending.progress(step)
                if self.splits(progress):
                    self._copy_first()
                draw = self.strategy.draw(step, progress, role.owned)
                trainer = self.quarters[draw.supernet][self.quarter[draw.layout]]
                set_learning_rate(trainer.optimizer, self.learning_rate(step, self.powers[draw.layout]))
                values = train_and_score(trainer, self.space[draw.layout], batch, score_batch, accelerator, self.scored)
                if role.shard[1] > 1:  # all processes learn the same, or their draws would part
                    values = accelerator.reduce(values, "mean")

                spending.own += self.costs[draw.layout]
                last = step == steps[-1] or spending.over(step + 1)
                for (done, drawn), (loss, *accuracies) in lag.push((step, draw), values, last):
                    check_finite(loss, epoch, done % self.epoch_steps)
                    self.strategy.update(drawn, accuracies if self.takes_scores else [])
                    accuracy = accuracies[drawn.supernet if self.scored else 0]
                    sums[[0, 1, 2 + drawn.supernet]] += loss, accuracy, 1
                    bar.show(f"loss {loss:.3f}, {'scored' if self.takes_scores else 'accuracy'} {100 * accuracy:.1f} %")
                if role.turns.step > 1 and (last or (step // role.turns.step + 1) % _EXCHANGE_STEPS == 0):
                    self.strategy.exchange(role.owned, lambda rows: accelerator.gather(rows.to(self.device)).cpu())
                if last:
                    bar.count()
                    break  # before the epoch ends, if the budget does

            self.end_epoch(epoch, progress, sums, started)
            epoch += 1
        self.finish(epoch)


def start(given: dict[str, Any], told: bool = False) -> Path:
    """Search as flags ask, given by their names; returns the folder. `told`: the result is printed."""
    dry = take_dry_run(given)
    output, resume, target = given.pop("output", None), given.pop("resume", False), hub.take_target(given)
    recipe = given.get("recipe")
    if recipe is None and "dataset" not in given and not resume:
        recipe = "digits-resnet20"
    settings = over_recipe(load_recipe(recipe, SearchConfig) if recipe else {}, given)
    if settings.get("init_from") and not resume:
        settings["init_from"] = hub.pin(settings["init_from"])
    if settings.get("pretrained_from") and not resume:
        origin = find_start(settings["pretrained_from"])
        settings = {"model": origin.model, **settings, "pretrained_from": origin.name}
    path = Path(output) if output else None
    config = resolve_config(SearchConfig, settings, path, resume)
    if dry:
        return try_search(config)
    folder = search(config, path, resume)
    if PartialState().is_main_process:
        if told:
            report.print_search(folder)
        if target and (address := hub.push(folder, **target)) and told:
            report.print_pushed(address)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("search")
    return run_command(lambda: start(speak(vars(parser.parse_args(argv))), told=True))


if __name__ == "__main__":
    sys.exit(main())
