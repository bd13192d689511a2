"""What every one-shot search does around its steps: images, supernets, checkpoints, the evaluation and the result."""

import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from . import cost, hub, progress, runtime
from .command import out_of_memory
from .config import FEW_STEPS, SearchConfig, sharing_of
from .data import (
    AUGMENT,
    ORDER,
    SCORE_ORDER,
    Augmentation,
    check_batch_size,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
)
from .errors import InputError
from .layout import Layout
from .optimizer import create_optimizer, learning_rate
from .progress import Bar
from .ranking import build_result
from .results import Confirmation, Ranking
from .run_folder import RunFolder, load_tensors, load_training_state, save_tensors, save_training_state
from .search_base import SearchBase
from .spending import Spending
from .starts import find_start, supernet_from
from .step import Trainer
from .supernet import Mixture, count_correct, norms_of
from .trials.confirm import confirm

_log = logging.getLogger(__name__)
_TRIED_ON_CPU = 1e11  # multiply-accumulates of a step
_Batch = tuple[Tensor, Tensor]  # images and labels


class Role(NamedTuple):
    """What one of several processes does in an epoch.

    Attributes:
        owned: the supernets that it trains.
        shard: its part of every batch that it takes, and how many parts there are.
        turns: the batches that it takes; others take the rest.
    """

    owned: range
    shard: tuple[int, int]
    turns: slice

    @classmethod
    def of(cls, config: SearchConfig, accelerator: Accelerator) -> "Role":
        """Data parallel: all supernets, a shard of every batch. Mixture parallel: some supernets, whole batches."""
        rank, world = accelerator.process_index, accelerator.num_processes
        if config.parallel == "mixture":
            if config.mixture_size % world:
                raise InputError(f"mixture-size {config.mixture_size} is not a multiple of the {world} processes")
            each = config.mixture_size // world
            return cls(range(rank * each, (rank + 1) * each), (0, 1), slice(rank, None, world))
        check_batch_size(config.batch_size, world)
        return cls(range(config.mixture_size), (rank, world), slice(None, None, 1))

    def epoch_steps(self, images: int, batch_size: int) -> int:
        """Steps of an epoch over all processes, each of which takes as many as the others."""
        steps, turns = images // batch_size, self.turns.step
        if steps < turns:
            fix = f" for {turns} processes: use {images // turns} or less" if turns > 1 else ": use less"
            raise InputError(f"batch-size {batch_size} is too much for the {images} images of a half{fix}")
        return steps - steps % turns


class OneShotSearch(SearchBase):
    """A one-shot search as one of its processes does it; its kinds, in searching.py and relaxed.py, add the steps.

    Attributes:
        strategy: learns where to downsample; its `report`, `result`, `state_dict` and `load_state_dict` are used here.
        takes_scores: whether its steps take images of the score split, too.
        spending: how far the search is; a kind makes it by `count_costs`.
        late: accuracies of the evaluations that the ranking is the mean of, as far as they are done.
        optimizers: those beside the trainers' own, by the names of their files in a checkpoint.
    """

    strategy: Any
    takes_scores = True
    spending: Spending

    def __init__(self, config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, folder, accelerator)
        self.device, config = accelerator.device, self.config
        self.role = Role.of(config, accelerator)
        if config.parallel == "mixture" and not folder.shared:
            raise InputError(
                f"parallel mixture: every host saves the supernets that it trains, but not all see {folder.path}: "
                "give an --output on a shared disk, or --parallel data"
            )
        if config.confirm:  # in which all processes train together
            check_batch_size(config.batch_size, accelerator.num_processes)
        self.images = self.data.images.near(self.device)
        self.weight_split, self.score_split = map(self.images.select, self.halves)
        self.epoch_steps = self.role.epoch_steps(min(map(len, self.halves)), config.batch_size)

        # M supernets, each with an optimizer of its own
        classes = len(self.data.label_names)
        sharing = sharing_of(config.settings())
        if sharing != "shared" and config.confirm_from == "supernet":
            raise InputError(
                f"confirm-from supernet: by sharing {sharing} resolutions have weights of their own: use scratch"
            )
        if sharing == "shared":
            if config.strategy == "unshared":
                raise InputError("sharing shared is not what strategy unshared does: use --strategy uniform")
        else:  # steps use some of the weights, and the wrapper must not wait for the gradients of others
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        prepare = None
        if config.pretrained_from:
            start = None if folder.epoch else find_start(config.pretrained_from, config.model)
            prepare = functools.partial(supernet_from, start=start, label_names=self.data.label_names)
        self.mixture = Mixture(
            self.space, config.mixture_size, classes, config.in_chans, config.seed, sharing, config.pretrained, prepare
        )
        if config.init_from and not folder.epoch:
            start_mixture_from(config.init_from, self.mixture, config)
        self.trainers = {m: self._trainer(self.mixture.supernets[m]) for m in self.role.owned}
        self.late: list[Tensor] = []
        self.optimizers: dict[str, AcceleratedOptimizer] = {}

    def _trainer(self, supernet: Any) -> Trainer:
        supernet = supernet.to(self.device, memory_format=torch.channels_last)
        whole = self.wrap(supernet)
        if self.config.grad_checkpointing:
            if whole is not supernet or not hasattr(supernet, "set_grad_checkpointing"):
                raise InputError("grad-checkpointing: this model, strategy or sharing cannot do that: leave it out")
            supernet.set_grad_checkpointing()
        # a wrapper of its own for each: one around all would wait for the gradients of those that are not drawn
        network = self.accelerator.prepare_model(whole, evaluation_mode=self.role.shard[1] == 1)
        optimizer = self.accelerator.prepare_optimizer(create_optimizer(supernet, self.config))
        return Trainer(supernet, network, optimizer)

    def run_dearest(self, supernet: Any, layout: Layout, images: Tensor) -> Tensor:
        """Logits as a training step of the dearest layout makes them."""
        supernet.set_layout(layout)
        return supernet(images)

    def try_memory(self) -> None:
        """Try a step of the dearest layout, without its update, and its evaluation: too little memory shows now, not
        at a random step or the end.

        Nothing is changed or drawn by it. On a CPU, where it costs time, only up to 10^11 multiply-accumulates are
        tried, a few seconds; memory that lacks for more ends the run when that comes.

        Raises:
            InputError: if there is too little memory.
        """
        config, size, parts = self.config, self.source.image_size, self.role.shard[1]
        macs, dearest = max((self.macs(layout), layout) for layout in self.space)
        supernet, batch = self.trainers[self.role.owned[0]].supernet, config.batch_size // parts
        evaluated = min(config.eval_batch_size, len(self.score_split))
        if self.device.type == "cpu" and self.spending.dearest // parts + evaluated * macs > _TRIED_ON_CPU:
            return
        try:
            images = torch.zeros(max(batch, evaluated), config.in_chans, size, size, device=self.device)
            images = images.to(memory_format=torch.channels_last)
            with self.accelerator.autocast(), runtime.full_float32():
                labels = torch.zeros(evaluated, dtype=torch.int64, device=self.device)
                count_correct(supernet, self.space.subset([dearest]), images[:evaluated], labels)
            images = images[:batch]
            with self.accelerator.autocast():
                loss = self.run_dearest(supernet, dearest, images).float().logsumexp(1).sum()
            torch.autograd.grad(loss, list(supernet.parameters()), allow_unused=True)  # leaves no gradients behind
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"layout {dearest}, the dearest of {len(self.space)}, does not fit into memory with {batch} images a "
                f"step and {evaluated} in the evaluation: use --max-macs to search cheaper ones, smaller --batch-size "
                "or --eval-batch-size, or --grad-checkpointing"
            ) from error

    def wrap(self, supernet: Any) -> Any:
        """The supernet as its training steps run it."""
        return supernet

    def rank(self, accuracy_matrix: Tensor) -> Ranking:
        """All layouts by their accuracy, (L, M)."""
        return build_result(self.space, accuracy_matrix, self.macs, self.strategy.own)

    def count_costs(self, costs: Sequence[int]) -> None:
        """Say what a step costs with each layout, in multiply-accumulates; what is too dear is refused."""
        tree = cost.tree_macs(self.space, self.source.image_size, self.config.in_chans)
        evaluation = tree * len(self.mixture) * len(self.score_split)
        self.spending = Spending(self.config, self.epoch_steps, costs, evaluation)

    def begin(self) -> None:
        """Write what the run is, when nothing else can be refused, and continue from its checkpoint if it has one."""
        self.try_memory()
        self.begin_run()
        self.accelerator.wait_for_everyone()
        self._restore()
        if self.accelerator.is_main_process:
            self._announce()
        begun = self.spending.progress(self.folder.epoch * self.epoch_steps) * self.spending.total
        progress.begin(self.spending.total + self._confirming(), begun, self.folder.dry)

    def _confirm_epochs(self, epochs: int) -> int:
        """Epochs of each choice that is confirmed, after so many of the search."""
        return self.config.confirm_epochs or -(-epochs // self.config.confirm)

    def _confirming(self) -> float:
        """Multiply-accumulates of the confirmation, as expected."""
        config = self.config
        choices = min(config.confirm, len(self.space)) if self.space.default_layout in self.space else 0
        if not choices:
            return 0.0
        macs = sum(map(self.macs, self.space)) / len(self.space)
        epochs = self._confirm_epochs(config.epochs or math.ceil(self.spending.last / self.epoch_steps))
        return choices * epochs * 3 * len(self.weight_split) * macs

    def _announce(self) -> None:
        """Say what is going to be searched, by how many steps, and whether they are few."""
        config = self.config
        steps = round(self.spending.last) + (config.budget is None)
        each = steps // config.mixture_size
        _log.info(
            f"search: {len(self.space)} layouts of {config.model} at {self.source.image_size} pixels "
            f"({self.source.size_origin}); {len(self.weight_split)} images train, {len(self.score_split)} score; "
            f"{f'mixture of {config.mixture_size}' if config.mixture_size > 1 else 'one supernet'}, "
            f"batches of {config.batch_size}; "
            f"{'about ' if config.budget else ''}{steps} steps"
            f"{f' in {config.epochs} epochs' if config.epochs else ''}, {each} for each supernet"
        )
        if each < FEW_STEPS:
            what = "budget" if config.budget else "number of epochs"
            _log.warning(f"{each} steps for each supernet: below some {FEW_STEPS}, noise ranks: give a larger {what}")

    def end_epoch(self, epoch: int, done: float, sums: np.ndarray, started: float) -> None:
        """Log an epoch and save what continues from it; for `sums` see `_describe_epoch`."""
        progress.stop_if_dry()
        row = self._describe_epoch(epoch, done, sums, started)
        if self.accelerator.is_main_process:
            self.folder.log(row)  # before the checkpoint: resuming drops the rows of epochs that will run again
            self.folder.touch()
        self._checkpoint(epoch + 1)

    def evaluate_late(self, due: int) -> None:
        """Evaluate every layout under every supernet for the ranking, until that has been done so many times."""
        while len(self.late) < due:
            self.late.append(self._evaluate_all())
            self.spending.late = len(self.late)

    def finish(self, epochs: int) -> None:
        """The last evaluation of a search of so many epochs, the confirmation of its choices, and its result."""
        config, confirmed, mixture = self.config, None, self.mixture
        self.evaluate_late(config.evaluate_last)
        for m in set(range(len(mixture))) - set(self.role.owned):  # the other owners' last checkpoints are theirs
            path = self.folder.checkpoint(epochs) / f"supernet-{m}.safetensors"
            load_training_state(path, mixture.supernets[m])
        found = self.rank(torch.stack(self.late).mean(0))
        if config.confirm and found.default:
            length, home = self._confirm_epochs(epochs), self.folder.path
            confirmed = confirm(found, config, length, home, self.accelerator, mixture.supernets)
        elif config.confirm and self.accelerator.is_main_process:
            _log.warning("nothing is confirmed: the default layout %s was not searched", self.space.default_layout)
        self.accelerator.wait_for_everyone()  # all have read the checkpoints that the first one removes
        if self.accelerator.is_main_process:
            self._write_result(found, confirmed, epochs)
        self.accelerator.wait_for_everyone()

    def batches(self, epoch: int) -> Any:
        """The steps of an epoch that are ours, each with a batch to train on and one to score on, as a progress bar."""
        count = len(self.steps(epoch))
        whole = self.spending.total - self.config.evaluate_last * self.spending.evaluation
        work = count * whole / (self.spending.last + 1)
        return Bar(itertools.islice(self._stream, count), count, self._title(epoch), work)

    def steps(self, epoch: int) -> range:
        """Those of an epoch that are ours, counted over all epochs."""
        return range(epoch * self.epoch_steps, (epoch + 1) * self.epoch_steps)[self.role.turns]

    def learning_rate(self, step: int, power: float | None = None) -> float:
        """Rate of a step, for `power` see `optimizer.learning_rate`."""
        position, last = self.spending.position(step), self.spending.last
        if (split := last * getattr(self.strategy, "split_at", 0)) and position < split:
            last = split
        else:  # a schedule of its own after a split
            position, last = position - split, last - split
        return learning_rate(self.config, self.epoch_steps, position, last, power)

    def _title(self, epoch: int) -> str:
        if self.config.epochs:
            return f"epoch {epoch + 1}/{self.config.epochs}"
        return f"epoch {epoch + 1}, {self.spending.progress(epoch * self.epoch_steps):.0%} of the budget"

    @functools.cached_property
    def _stream(self) -> Iterator[tuple[int, _Batch, _Batch | None]]:
        """All steps from this epoch on: augmented images to train on, and plain ones to score on, if it scores.

        One stream, since workers then read ahead into the next epoch, and the same ones read for both.
        """
        data, epochs = self.data, range(self.folder.epoch, self.config.epochs or sys.maxsize)
        augment = self.source.augmentation(self.config.flip)
        order = itertools.chain.from_iterable(self._order(epoch, augment) for epoch in epochs)
        found = self.images.batches(order, self.device, augment)
        batches = ((normalise(images, data.mean, data.std), labels) for images, labels in found)
        steps = itertools.chain.from_iterable(map(self.steps, epochs))
        return zip(steps, batches, batches if self.takes_scores else itertools.repeat(None), strict=False)

    def _order(self, epoch: int, augment: Augmentation) -> Iterator[tuple[np.ndarray, Tensor | None]]:
        """Positions of the images of an epoch, those to train on and any to score on in turn, and what was drawn."""
        size, seed, role, steps = self.config.batch_size, self.config.seed, self.role, self.epoch_steps
        crops = augment.draw(steps, size, random_stream(seed, AUGMENT, epoch), role.shard, self.device)
        weight, score = (
            shuffled_batches(len(half), size, random_stream(seed, purpose, epoch), role.shard)[:steps]
            for half, purpose in zip(self.halves, (ORDER, SCORE_ORDER), strict=True)
        )
        for step in range(steps)[role.turns]:
            yield self.halves[0][weight[step]], crops[step]
            if self.takes_scores:
                yield self.halves[1][score[step]], None

    def _describe_epoch(self, epoch: int, done: float, sums: np.ndarray, started: float) -> dict[str, object]:
        """A row of metrics.jsonl; `sums` holds losses, accuracies, and the draws of every supernet."""
        config, spending, steps = self.config, self.spending, (epoch + 1) * self.epoch_steps
        totals = torch.tensor(sums, dtype=torch.float32, device=self.device)
        if self.role.turns.step > 1:  # else every process has seen the same
            totals = self.accelerator.reduce(totals, "sum")
            spending.own = int(self.accelerator.reduce(torch.tensor(spending.own, device=self.device), "sum"))
        spending.paid, spending.own = spending.paid + spending.own, 0
        loss, accuracy, *draws = totals.tolist()
        measured = "score" if self.takes_scores else "train"
        row: dict[str, object] = {
            "epoch": epoch + 1,
            "loss": loss / sum(draws),
            f"{measured}_accuracy": accuracy / sum(draws),
            # by cost, that of a layout whose rate decays linearly
            "lr": self.learning_rate(steps - 1, 1.0 if config.rate_decay == "cost" else None),
            **self.strategy.report(done),
            "draws": [int(count) for count in draws],
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_mib": runtime.peak_memory_mib(self.device),
        }
        watched = config.evaluate_every and (epoch + 1) % config.evaluate_every == 0 and not spending.over(steps)
        if watched and spending.affords(spending.evaluation):
            best = self._ranked_by(self._evaluate_all())
            spending.paid += spending.evaluation
            row["accuracy"] = {str(layout): value for layout, value in zip(self.space, best, strict=True)}
        row["spent_macs"] = spending.spent
        if self.accelerator.is_main_process:
            shown = f"{measured} accuracy {100 * accuracy / sum(draws):.2f} %"
            progress.tell(f"{self._title(epoch)}: loss {row['loss']:.3f}, {shown}, {row['seconds']:.0f} s")
        return row

    def _ranked_by(self, accuracy: Tensor) -> list[float]:
        """Of each layout its accuracy under the supernet that ranks it: its own, or its best one."""
        own = self.strategy.own
        return (accuracy.amax(1) if own is None else accuracy[torch.arange(len(accuracy)), torch.tensor(own)]).tolist()

    def _evaluate_all(self) -> Tensor:
        """Accuracy of every layout under every supernet on all score images, float64 (L, M) on the CPU.

        Supernets normalise by batch, so batches are fixed and never shared between processes.
        """
        config, data, images, (first, parts) = self.config, self.data, self.score_split, self.role.shard
        correct = torch.zeros(len(self.space), config.mixture_size, dtype=torch.int64, device=self.device)
        rng = random_stream(config.seed, SCORE_ORDER)
        batches = even_batches(len(images), config.eval_batch_size, rng)[first::parts]
        work = self.spending.evaluation
        bar = Bar(images.batches(batches, self.device), len(batches), "evaluating all layouts", work, training=False)
        with self.accelerator.autocast(), runtime.full_float32():
            for pixels, labels in bar:
                inputs = normalise(pixels, data.mean, data.std)
                for m in self.role.owned:
                    correct[:, m] += count_correct(self.mixture.supernets[m], self.space, inputs, labels)
        return self.accelerator.reduce(correct, "sum").cpu().double() / len(images)

    def _write_result(self, found: Ranking, confirmed: Confirmation | None, epochs: int) -> None:
        """Write search.json and what belongs to it."""
        mixture, folder = self.mixture, self.folder
        save_tensors(folder.path / "supernets.safetensors", mixture.state_dict())
        said = self.strategy.result()
        if len(self.late) > 1:
            said["details"] = {**said.get("details", {}), "late_accuracies": [*map(self._ranked_by, self.late)]}
        self.write_result(
            found,
            undecided=self.why_undecided(found) if confirmed is None else confirmed.abstains,
            confirmed=confirmed,
            **said,
            epochs=epochs,
            spent_macs=self.spending.spent + (confirmed.spent_macs if confirmed else 0),
            norms=norms_of(mixture.supernets[0]),
            peak_memory_mib=runtime.peak_memory_mib(self.device),
        )

    def _checkpoint(self, epoch: int) -> None:
        """Save every supernet by a process that owns it, then the strategy, then mark the checkpoint whole."""
        accelerator, folder = self.accelerator, self.folder
        if accelerator.is_main_process:
            folder.new_checkpoint(epoch)
        accelerator.wait_for_everyone()
        path = folder.checkpoint(epoch)
        if self.role.shard[0] == 0:
            for m, trainer in self.trainers.items():
                save_training_state(path / f"supernet-{m}.safetensors", trainer.supernet, trainer.optimizer.optimizer)
            for name, optimizer in self.optimizers.items():
                save_training_state(path / f"{name}.safetensors", nn.Module(), optimizer.optimizer)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            save_tensors(path / "strategy.safetensors", self.strategy.state_dict())
            late = {f"late.{number}": accuracy for number, accuracy in enumerate(self.late)}
            save_tensors(path / "spending.safetensors", {"paid": torch.tensor(self.spending.paid), **late})
            folder.complete_checkpoint(epoch, accelerator)
        accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Load the checkpoint to continue from, if there is one."""
        if self.folder.epoch:
            path = self.folder.checkpoint(self.folder.epoch)
            self.folder.restore_scaler(self.accelerator)
            for m, trainer in self.trainers.items():
                load_training_state(path / f"supernet-{m}.safetensors", trainer.supernet, trainer.optimizer.optimizer)
            for name, optimizer in self.optimizers.items():
                load_training_state(path / f"{name}.safetensors", nn.Module(), optimizer.optimizer)
            self.strategy.load_state_dict(load_tensors(path / "strategy.safetensors"))
            spent = load_tensors(path / "spending.safetensors")
            self.spending.paid, self.spending.late = int(spent.pop("paid")), len(spent)
            self.late = [spent[f"late.{number}"] for number in range(len(spent))]


def start_mixture_from(name: str, mixture: Mixture, config: SearchConfig) -> None:
    """Give supernets the weights of an earlier search; with other classes than there, classifiers stay fresh."""
    result, weights = hub.load_supernets(name)
    for key, there, here in (
        ("model", result.model, config.model),
        ("mixture-size", result.mixture_size, config.mixture_size),
        ("in-chans", result.dataset.in_chans, config.in_chans),
    ):
        if there != here:
            raise InputError(f"init-from {name} was searched with {key} {there}, not {here}: give --{key} {there}")
    there, here = (sharing_of(settings) for settings in (result.settings, config.settings()))
    if (there == "shared") != (here == "shared"):
        raise InputError(f"init-from {name} was searched with sharing {there}, not {here}: give --sharing {there}")
    own = mixture.state_dict()
    if len(result.dataset.label_names) != mixture.supernets[0].num_classes:
        weights = {**weights, **{key: tensor for key, tensor in own.items() if ".fc." in key}}
    try:
        mixture.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"init-from {name}: its supernets do not have the weights of {config.model}") from None
