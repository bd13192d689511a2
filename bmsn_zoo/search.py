"""The search: a mixture of supernets over pooling layouts, top to bottom (arXiv:2306.11982)."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from . import hub, report, runtime
from .command import run_command
from .config import SearchConfig, load_recipe
from .data import (
    AUGMENT,
    ORDER,
    SCORE_ORDER,
    Augmentation,
    DataSource,
    ImageData,
    ImageSet,
    check_batch_size,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
    to_device,
)
from .errors import InputError
from .evaluate import full_float32
from .models import PoolingResNet
from .optimizer import create_optimizer, learning_rate, set_learning_rate
from .ranking import build_result
from .results import SearchDataset, SearchResult
from .run_folder import (
    RunFolder,
    last_precision,
    load_tensors,
    load_training_state,
    open_run,
    resolve_config,
    save_tensors,
    save_training_state,
)
from .search_space import SearchSpace
from .step import Lag, Trainer, check_finite, train_and_score
from .strategies import Draw, Strategy, create_strategy
from .supernet import Mixture, count_correct
from .usage import parser_of

_log = logging.getLogger(__name__)
_EXCHANGE_STEPS = 32  # steps between exchanges among processes that own supernets
_Batch = tuple[Tensor, Tensor]  # images and labels


class _Role(NamedTuple):
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
    def of(cls, config: SearchConfig, accelerator: Accelerator) -> "_Role":
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


@dataclass(frozen=True)
class _Search:
    """All that a search is made of; every process has its own."""

    config: SearchConfig
    accelerator: Accelerator
    role: _Role
    space: SearchSpace
    source: DataSource
    data: ImageData
    halves: tuple[
        np.ndarray, np.ndarray
    ]  # positions of the training images that train weights, and of those that score
    weight_split: ImageSet
    score_split: ImageSet
    epoch_steps: int
    mixture: Mixture
    trainers: dict[int, Trainer]  # of the supernets that this process owns
    strategy: Strategy


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
    accelerator = runtime.start(config, last_precision(output) if output and resume else None)
    with open_run("search", output, resume) as folder:
        _run(_prepare(config, folder, accelerator), folder)
    return folder.path


def _run(parts: _Search, folder: RunFolder) -> None:
    config, accelerator, role, strategy = parts.config, parts.accelerator, parts.role, parts.strategy
    folder.begin(config, {**runtime.describe(accelerator), "command": sys.argv}, parts.source.identity(parts.data))
    accelerator.wait_for_everyone()
    _restore(parts, folder)

    for epoch in range(folder.epoch, config.epochs):
        started = time.monotonic()
        steps = range(epoch * parts.epoch_steps, (epoch + 1) * parts.epoch_steps)[role.turns]
        bar = runtime.progress_bar(_batches(parts, epoch, steps), len(steps), f"epoch {epoch + 1}/{config.epochs}")
        lag, sums = Lag[tuple[int, Draw]](), np.zeros(2 + config.mixture_size)

        for step, batch, score_batch in bar:
            progress = step / max(1, config.epochs * parts.epoch_steps - 1)
            draw = strategy.draw(step, progress, role.owned)
            trainer = parts.trainers[draw.supernet]
            set_learning_rate(trainer.optimizer, learning_rate(config, parts.epoch_steps, step))
            values = train_and_score(trainer, parts.space[draw.layout], batch, score_batch, accelerator)
            if role.shard[1] > 1:  # all processes learn the same, or their draws would part
                values = accelerator.reduce(values, "mean")

            last = step == steps[-1]
            for (done, drawn), (loss, accuracy) in lag.push((step, draw), values, last):
                check_finite(loss, epoch, done % parts.epoch_steps)
                strategy.update(drawn, accuracy)
                sums[[0, 1, 2 + drawn.supernet]] += loss, accuracy, 1
                bar.set_postfix_str(f"loss {loss:.3f}, score accuracy {100 * accuracy:.1f} %", refresh=False)
            if role.turns.step > 1 and (last or (step // role.turns.step + 1) % _EXCHANGE_STEPS == 0):
                strategy.exchange(role.owned, lambda rows: accelerator.gather(rows.to(accelerator.device)).cpu())

        row = _describe_epoch(parts, epoch, progress, sums, time.monotonic() - started)
        if accelerator.is_main_process:
            folder.log(row)  # before the checkpoint: resuming drops the rows of epochs that will run again
            folder.touch()
        _checkpoint(parts, folder, epoch + 1)

    accuracy_matrix = _evaluate_all(parts)
    if accelerator.is_main_process:
        _write_result(parts, folder, accuracy_matrix)
    accelerator.wait_for_everyone()


def _prepare(config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> _Search:
    """Everything that a search needs before its first step."""
    space = SearchSpace(config.model, config.default_layout)
    role = _Role.of(config, accelerator)

    source = DataSource(config, torch.get_num_threads())
    space.backbone.check(space.default_layout, source.image_size)
    with PartialState().local_main_process_first():
        data = source.train()
    if accelerator.is_main_process:
        _log.info(source.summary())
    # one half of the training images trains weights, the other scores layouts; the test images stay closed
    labels = data.images.labels.numpy()
    halves = stratified_split(labels, 0.5, config.seed, "a weight split and a score split", data.label_names)
    weight_split, score_split = map(data.images.near(accelerator.device).select, halves)
    epoch_steps = role.epoch_steps(min(map(len, halves)), config.batch_size)

    mixture = Mixture(space, config.mixture_size, len(data.label_names), config.in_chans, config.seed)
    if config.init_from and not folder.epoch:
        _start_from(config.init_from, mixture, config)
    trainers = {m: _trainer(mixture.supernets[m], config, role, accelerator) for m in role.owned}
    strategy = create_strategy(len(space), config)
    return _Search(
        config, accelerator, role, space, source, data, halves, weight_split, score_split, epoch_steps, mixture,
        trainers, strategy,
    )  # fmt: skip


def _start_from(name: str, mixture: Mixture, config: SearchConfig) -> None:
    """Give supernets the weights of an earlier search; with other classes than there, classifiers stay fresh."""
    result, weights = hub.load_supernets(name)
    for key, there, here in (
        ("model", result.model, config.model),
        ("mixture-size", result.mixture_size, config.mixture_size),
        ("in-chans", result.dataset.in_chans, config.in_chans),
    ):
        if there != here:
            raise InputError(f"init-from {name} was searched with {key} {there}, not {here}: give --{key} {there}")
    own = mixture.state_dict()
    if len(result.dataset.label_names) != mixture.supernets[0].num_classes:
        weights = {**weights, **{key: tensor for key, tensor in own.items() if ".fc." in key}}
    try:
        mixture.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"init-from {name}: its supernets do not have the weights of {config.model}") from None


def _trainer(supernet: PoolingResNet, config: SearchConfig, role: _Role, accelerator: Accelerator) -> Trainer:
    supernet = supernet.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # a wrapper of its own for each: one around all would wait for the gradients of those that are not drawn
    network = accelerator.prepare_model(supernet, evaluation_mode=role.shard[1] == 1)
    return Trainer(supernet, network, accelerator.prepare_optimizer(create_optimizer(supernet, config)))


def _batches(parts: _Search, epoch: int, steps: range) -> Iterator[tuple[int, _Batch, _Batch]]:
    """The steps of an epoch that this process takes, with augmented images to train on and plain ones to score on."""
    config, role, data, device = parts.config, parts.role, parts.data, parts.accelerator.device
    augment = Augmentation(config.crop_padding, config.flip)
    rng = random_stream(config.seed, AUGMENT, epoch)
    crops = augment.draw(parts.epoch_steps, config.batch_size, rng, role.shard)[role.turns]

    def in_turn(images: ImageSet, purpose: int) -> Iterator[_Batch]:
        rng = random_stream(config.seed, purpose, epoch)
        order = shuffled_batches(len(images), config.batch_size, rng, role.shard)[: parts.epoch_steps]
        return images.batches(order[role.turns], device)

    weight, score = in_turn(parts.weight_split, ORDER), in_turn(parts.score_split, SCORE_ORDER)
    for step, drawn, (images, labels), (score_images, score_labels) in zip(
        steps, to_device(crops, device), weight, score, strict=True
    ):
        images, score_images = (normalise(i, data.mean, data.std) for i in (augment(images, drawn), score_images))
        yield step, (images, labels), (score_images, score_labels)


def _describe_epoch(parts: _Search, epoch: int, progress: float, sums: np.ndarray, seconds: float) -> dict[str, object]:
    """A row of metrics.jsonl; `sums` holds losses, accuracies, and the draws of every supernet."""
    config, device = parts.config, parts.accelerator.device
    totals = torch.tensor(sums, dtype=torch.float32, device=device)
    if parts.role.turns.step > 1:  # else every process has seen the same
        totals = parts.accelerator.reduce(totals, "sum")
    loss_sum, accuracy_sum, *draws = totals.tolist()
    row: dict[str, object] = {
        "epoch": epoch + 1,
        "loss": loss_sum / sum(draws),
        "score_accuracy": accuracy_sum / sum(draws),
        "lr": learning_rate(config, parts.epoch_steps, (epoch + 1) * parts.epoch_steps - 1),
        **parts.strategy.report(progress),
        "draws": [int(count) for count in draws],
        "seconds": round(seconds, 2),
        "peak_memory_mib": _peak_memory_mib(device),
    }
    if config.evaluate_every and (epoch + 1) % config.evaluate_every == 0 and epoch + 1 < config.epochs:
        accuracy = _evaluate_all(parts).amax(1).tolist()
        row["accuracy"] = {str(layout): value for layout, value in zip(parts.space, accuracy, strict=True)}
    if parts.accelerator.is_main_process:
        _log.info("epoch %d/%d: loss %.3f, score accuracy %.2f %%, %.0f s", epoch + 1, config.epochs, row["loss"],
                  100 * accuracy_sum / sum(draws), seconds)  # fmt: skip
    return row


def _evaluate_all(parts: _Search) -> Tensor:
    """Accuracy of every layout under every supernet on all score images, float64 (L, M) on the CPU.

    Supernets normalise by batch, so batches are fixed and never shared between processes.
    """
    config, role, data, device = parts.config, parts.role, parts.data, parts.accelerator.device
    images = parts.score_split
    correct = torch.zeros(len(parts.space), config.mixture_size, dtype=torch.int64, device=device)
    order = even_batches(len(images), config.eval_batch_size, random_stream(config.seed, SCORE_ORDER))
    order = order[role.shard[0] :: role.shard[1]]
    with parts.accelerator.autocast(), full_float32():
        for pixels, labels in runtime.progress_bar(images.batches(order, device), len(order), "evaluating all layouts"):
            inputs = normalise(pixels, data.mean, data.std)
            for m in role.owned:
                correct[:, m] += count_correct(parts.mixture.supernets[m], parts.space, inputs, labels)
    return parts.accelerator.reduce(correct, "sum").cpu().double() / len(images)


def _write_result(parts: _Search, folder: RunFolder, accuracy_matrix: Tensor) -> None:
    """Write search.json and what belongs to it, by the main process."""
    config, mixture, output = parts.config, parts.mixture, folder.path
    for m in set(range(len(mixture))) - set(parts.role.owned):  # the other owners' last checkpoints are theirs
        load_training_state(folder.checkpoint(config.epochs) / f"supernet-{m}.safetensors", mixture.supernets[m])
    meta = {"model": config.model, "mixture_size": str(config.mixture_size)}
    save_tensors(output / "supernets.safetensors", mixture.state_dict(), meta)
    weight_rows, score_rows = map(torch.from_numpy, parts.halves)
    save_tensors(output / "split.safetensors", {"weight_rows": weight_rows, "score_rows": score_rows})
    folder.touch()
    described = parts.source.describe(parts.data)
    dataset = SearchDataset(**described, weight_images=len(weight_rows), score_images=len(score_rows))
    found = build_result(parts.space, accuracy_matrix, dataset.image_size, config.in_chans)
    SearchResult(
        **dict(found),
        **parts.strategy.result(),
        **folder.summary(),
        recipe=config.recipe,
        settings=config.settings(),
        seed=config.seed,
        epochs=config.epochs,
        dataset=dataset,
        peak_memory_mib=_peak_memory_mib(parts.accelerator.device),
    ).write(output / "search.json")
    report.draw_search(output)
    folder.finish()


def _checkpoint(parts: _Search, folder: RunFolder, epoch: int) -> None:
    """Save every supernet by a process that owns it, then the strategy, then mark the checkpoint whole."""
    accelerator = parts.accelerator
    if accelerator.is_main_process:
        folder.new_checkpoint(epoch)
    accelerator.wait_for_everyone()
    path = folder.checkpoint(epoch)
    if parts.role.shard[0] == 0:
        for m, trainer in parts.trainers.items():
            save_training_state(path / f"supernet-{m}.safetensors", trainer.supernet, trainer.optimizer.optimizer)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_tensors(path / "strategy.safetensors", parts.strategy.state_dict())
        folder.complete_checkpoint(epoch, accelerator)
    accelerator.wait_for_everyone()


def _restore(parts: _Search, folder: RunFolder) -> None:
    """Load the checkpoint to continue from, if there is one."""
    if folder.epoch:
        path = folder.checkpoint(folder.epoch)
        folder.restore_scaler(parts.accelerator)
        for m, trainer in parts.trainers.items():
            load_training_state(path / f"supernet-{m}.safetensors", trainer.supernet, trainer.optimizer.optimizer)
        parts.strategy.load_state_dict(load_tensors(path / "strategy.safetensors"))


def _peak_memory_mib(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    status = Path("/proc/self/status")
    if status.exists():  # resource would count what the launcher held when it started this process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) >> 10
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


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
