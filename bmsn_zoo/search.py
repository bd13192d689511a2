"""The search: a mixture of supernets over pooling layouts, top to bottom (arXiv:2306.11982)."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, PartialState

from . import hub, report, runtime
from .command import run_command
from .config import SearchConfig, load_recipe
from .errors import InputError
from .one_shot import OneShotSearch
from .optimizer import learning_rate, set_learning_rate
from .relaxed import RELAXED, RelaxedSearch
from .run_folder import RunFolder, last_precision, open_run, resolve_config
from .step import Lag, check_finite, train_and_score
from .strategies import STRATEGIES, Draw, Strategy, create_strategy
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
    kinds: dict[str, Any] = {**dict.fromkeys(STRATEGIES, _Search), **dict.fromkeys(RELAXED, RelaxedSearch)}
    if config.strategy not in kinds:
        raise InputError(f"strategy {config.strategy!r} is unknown: use {', '.join(kinds)}")
    accelerator = runtime.start(config, last_precision(output) if output and resume else None)
    with open_run("search", output, resume) as folder:
        kinds[config.strategy](config, folder, accelerator).run()
    return folder.path


class _Search(OneShotSearch):
    """A search that trains one supernet with one layout in each step, both drawn (paper, Algorithm 1)."""

    strategy: Strategy

    def __init__(self, config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, folder, accelerator)
        self.strategy = create_strategy(self.space, config)
        self.scored = list(self.mixture.supernets) if self.strategy.scores_all else None
        if self.scored and config.parallel == "mixture":
            raise InputError("parallel mixture: this search scores all supernets in every step: use --parallel data")

    def run(self) -> None:
        """All epochs, then the evaluation of every layout under every supernet."""
        config, accelerator, role = self.config, self.accelerator, self.role
        self.begin()
        for epoch in range(self.folder.epoch, config.epochs):
            started = time.monotonic()
            steps, bar = self.steps(epoch), self.batches(epoch)
            lag, sums = Lag[tuple[int, Draw]](), np.zeros(2 + config.mixture_size)

            for step, batch, score_batch in bar:
                progress = self.progress(step)
                draw = self.strategy.draw(step, progress, role.owned)
                trainer = self.trainers[draw.supernet]
                set_learning_rate(trainer.optimizer, learning_rate(config, self.epoch_steps, step))
                values = train_and_score(trainer, self.space[draw.layout], batch, score_batch, accelerator, self.scored)
                if role.shard[1] > 1:  # all processes learn the same, or their draws would part
                    values = accelerator.reduce(values, "mean")

                last = step == steps[-1]
                for (done, drawn), (loss, *accuracies) in lag.push((step, draw), values, last):
                    check_finite(loss, epoch, done % self.epoch_steps)
                    self.strategy.update(drawn, accuracies)
                    accuracy = accuracies[drawn.supernet if self.scored else 0]
                    sums[[0, 1, 2 + drawn.supernet]] += loss, accuracy, 1
                    bar.set_postfix_str(f"loss {loss:.3f}, score accuracy {100 * accuracy:.1f} %", refresh=False)
                if role.turns.step > 1 and (last or (step // role.turns.step + 1) % _EXCHANGE_STEPS == 0):
                    self.strategy.exchange(role.owned, lambda rows: accelerator.gather(rows.to(self.device)).cpu())

            self.end_epoch(epoch, progress, sums, started)
        self.finish()


def main(argv: Sequence[str] | None = None, command: str = "accelerate launch -m bmsn_zoo.") -> int:
    """The command line; `command` is how this and the training command are started."""
    parser = parser_of("search")

    def run() -> None:
        given = vars(parser.parse_args(argv))
        output, resume, target = given.pop("output", None), given.pop("resume", False), hub.take_target(given)
        recipe = given.get("recipe")
        if recipe is None and "dataset" not in given and not resume:
            recipe = "digits-resnet20"
        settings = {**(load_recipe(recipe, SearchConfig) if recipe else {}), **given}
        if settings.get("init_from") and not resume:
            settings["init_from"] = hub.pin(settings["init_from"])
        path = Path(output) if output else None
        folder = search(resolve_config(SearchConfig, settings, path, resume), path, resume)
        if PartialState().is_main_process:
            report.print_search(folder, command)
            if target:
                report.print_pushed(hub.push(folder, **target))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
