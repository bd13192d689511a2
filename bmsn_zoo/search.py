"""The search: a balanced mixture of supernets over pooling layouts, top to bottom (arXiv:2306.11982)."""

import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import hub, report, runtime
from .command import run_command
from .config import SearchConfig, build_parser, load_recipe
from .data import (
    AUGMENT,
    ORDER,
    SCORE_ORDER,
    Augmentation,
    DataSource,
    ImageData,
    ImageSet,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
)
from .errors import InputError
from .models import PoolingResNet
from .optimizer import create_optimizer, learning_rate, set_learning_rate
from .ranking import build_result
from .records import RunFolder, load_training_state, open_run, resolve_config, save_training_state
from .results import SearchDataset, SearchResult
from .search_space import SearchSpace
from .strategies import BalancedMixture, Draw
from .supernet import Mixture, count_correct

_log = logging.getLogger(__name__)
_EXCHANGE_STEPS = 32  # steps between exchanges of scores among processes that own supernets


class _OnTheWay:
    """Loss and accuracy of a step on their way to the host, which must not wait for the step at hand."""

    def __init__(self, draw: Draw, values: Tensor) -> None:
        self.draw = draw
        self.values = values.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if values.is_cuda else None
        if self.event is not None:
            self.event.record()

    def arrive(self) -> tuple[float, float]:
        if self.event is not None:
            self.event.synchronize()
        loss, accuracy = self.values.tolist()
        return loss, accuracy


@dataclass(frozen=True)
class _Share:
    """What one of several processes does.

    Attributes:
        owned: the supernets that it trains.
        shard: its part of every batch, and how many parts there are.
        turn: its batches of an epoch, the first and every how many; others take the rest.
    """

    owned: range
    shard: tuple[int, int]
    turn: tuple[int, int]

    @property
    def alone(self) -> bool:
        """Whether no other process trains the same supernets."""
        return self.shard[1] == 1

    @classmethod
    def of(cls, config: SearchConfig, rank: int, world: int) -> "_Share":
        """Data parallel: all supernets, a shard of every batch. Mixture parallel: some supernets, whole batches."""
        if config.parallel == "mixture":
            if config.mixture_size % world:
                raise InputError(f"mixture-size {config.mixture_size} is not a multiple of the {world} processes")
            each = config.mixture_size // world
            return cls(range(rank * each, (rank + 1) * each), (0, 1), (rank, world))
        if config.batch_size % world or config.batch_size // world < 2:
            raise InputError(f"batch-size {config.batch_size} cannot be shared evenly by {world} processes")
        return cls(range(config.mixture_size), (rank, world), (0, 1))


class _Trainer(NamedTuple):
    """A supernet and what trains it; `network` is the supernet as accelerate prepared it."""

    supernet: PoolingResNet
    network: nn.Module
    optimizer: AcceleratedOptimizer


def search(config: SearchConfig, output: Path | None = None, resume: bool = False) -> Path:
    """Search the pooling layouts of a backbone on a data set.

    Args:
        config: see `SearchConfig`.
        output: folder of the run; a new one under runs/ if None.
        resume: continue the run in `output` after its last whole epoch.

    Returns:
        the folder, which holds `search.json`, the supernets' weights, metrics and pictures.

    Raises:
        InputError: for a setting that cannot be used; nothing is written then.
    """
    space = SearchSpace(config.model, config.default_layout)
    accelerator = runtime.start(config, RunFolder(output).last_precision if output and resume else None)
    device = accelerator.device
    share = _Share.of(config, accelerator.process_index, accelerator.num_processes)

    source = DataSource(config, torch.get_num_threads())
    space.backbone.check(space.default_layout, source.image_size)
    with PartialState().local_main_process_first():
        data = source.train()
    labels = data.images.labels.numpy()
    weight_rows, score_rows = stratified_split(labels, 0.5, config.seed, "a weight split and a score split")
    weight_split, score_split = data.images.select(weight_rows), data.images.select(score_rows)
    steps = _steps_per_epoch(min(len(weight_split), len(score_split)), config, share)
    total_steps = steps * config.epochs

    mixture = Mixture(space, config.mixture_size, len(data.label_names), config.in_chans, config.seed)
    if config.init_from and not (resume and output and RunFolder(output).checkpoints()):
        _start_from(config.init_from, mixture, config)
    strategy = BalancedMixture(
        len(space), config.mixture_size, config.max_sharpness, config.score_momentum, config.seed
    )
    trainers = {m: _prepare(mixture.supernets[m], config, share, accelerator) for m in share.owned}
    augment = Augmentation(config.crop_padding, config.flip)
    evaluate_all = partial(
        _evaluate_all, mixture, share, score_split, data, config.eval_batch_size, config.seed, accelerator
    )

    folder = open_run("search", output)
    output = folder.path
    start_epoch = _restore(folder, trainers, strategy, accelerator) if resume else 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.begin(config, {**runtime.describe(accelerator), "command": sys.argv, "epoch": start_epoch})

    for epoch in range(start_epoch, config.epochs):
        started = time.monotonic()
        turn = slice(share.turn[0], steps, share.turn[1])
        order = shuffled_batches(
            len(weight_split), config.batch_size, random_stream(config.seed, ORDER, epoch), share.shard
        )[turn]
        score_order = shuffled_batches(
            len(score_split), config.batch_size, random_stream(config.seed, SCORE_ORDER, epoch), share.shard
        )[turn]
        batches = zip(range(steps)[turn], weight_split.batches(order), score_split.batches(score_order), strict=True)
        bar = runtime.progress_bar(batches, len(order), f"epoch {epoch + 1}/{config.epochs}")
        losses, accuracies, draws = [], [], [0] * config.mixture_size
        on_the_way: deque[_OnTheWay] = deque()

        for done, (index, (images, labels), (score_images, score_labels)) in enumerate(bar, 1):
            step = epoch * steps + index
            progress = step / max(1, total_steps - 1)
            draw = strategy.draw(step, progress, share.owned)
            supernet, network, optimizer = trainers[draw.supernet]
            supernet.set_layout(space[draw.layout])
            set_learning_rate(optimizer, learning_rate(config, steps, step))

            images = images.to(device, non_blocking=True)
            images = augment(images, random_stream(config.seed, AUGMENT, step), share.shard)
            logits = network(normalise(images, data.mean, data.std))
            loss = nn.functional.cross_entropy(logits, labels.to(device, non_blocking=True))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

            with torch.no_grad():
                score_images = normalise(score_images.to(device, non_blocking=True), data.mean, data.std)
                correct = supernet(score_images).argmax(1) == score_labels.to(device, non_blocking=True)
                values = torch.stack([loss.detach(), correct.float().mean()])
                if not share.alone:
                    values = accelerator.reduce(values, "mean")

            # scores learn of a step one step later: waiting for the one at hand would leave the device idle
            on_the_way.append(_OnTheWay(draw, values))
            while len(on_the_way) > (0 if done == len(order) else 1):
                arrived = on_the_way.popleft()
                loss_value, accuracy = arrived.arrive()
                strategy.update(arrived.draw, accuracy)
                losses.append(loss_value)
                accuracies.append(accuracy)
                draws[arrived.draw.supernet] += 1
            if share.turn[1] > 1 and (done % _EXCHANGE_STEPS == 0 or done == len(order)):
                _exchange_scores(strategy, share.owned, accelerator)
            if done % 10 == 0:
                shares = "/".join(f"{part:.3f}" for part in strategy.usage(progress))
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, score accuracy {accuracies[-1]:.3f}, usage {shares}")

        totals = torch.tensor([sum(losses), sum(accuracies), len(losses), *draws], dtype=torch.float32, device=device)
        if share.turn[1] > 1:
            totals = accelerator.reduce(totals, "sum")
        loss_sum, accuracy_sum, count, *drawn = totals.tolist()
        row = {
            "epoch": epoch + 1,
            "loss": loss_sum / count,
            "score_accuracy": accuracy_sum / count,
            "lr": optimizer.param_groups[0]["lr"],
            "sharpness": strategy.sharpness(progress),
            "usage": strategy.usage(progress),
            "draws": [int(n) for n in drawn],
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_mib": _peak_memory_mib(device),
        }
        if config.evaluate_every and (epoch + 1) % config.evaluate_every == 0 and epoch + 1 < config.epochs:
            so_far = evaluate_all().amax(1).tolist()
            row["accuracy"] = {str(layout): value for layout, value in zip(space, so_far, strict=True)}
        if accelerator.is_main_process:
            folder.log(row)  # before the checkpoint: resuming drops the rows of epochs that will run again
            folder.touch()
            _log.info("epoch %d/%d: loss %.3f, score accuracy %.3f, %.0f s", epoch + 1, config.epochs, row["loss"],
                      row["score_accuracy"], row["seconds"])  # fmt: skip
        _checkpoint(folder, epoch + 1, trainers, strategy, accelerator, share)

    accuracy_matrix = evaluate_all()
    if accelerator.is_main_process:
        for m in set(range(len(mixture))) - set(share.owned):  # the other owners' last checkpoints are theirs
            load_training_state(folder.checkpoints()[-1] / f"supernet-{m}.safetensors", mixture.supernets[m])
        meta = {"model": config.model, "mixture_size": str(config.mixture_size)}
        save_file(mixture.state_dict(), output / "supernets.safetensors", metadata=meta)
        rows = {"weight_rows": torch.from_numpy(weight_rows), "score_rows": torch.from_numpy(score_rows)}
        save_file(rows, output / "split.safetensors")
        folder.touch()
        found = build_result(space, accuracy_matrix, strategy.assignment(1.0), source.image_size, config.in_chans)
        described = SearchDataset(
            **source.describe(data), weight_images=len(weight_split), score_images=len(score_split)
        )
        SearchResult(
            **dict(found),
            **folder.summary(),
            recipe=config.recipe,
            settings=config.settings(),
            seed=config.seed,
            epochs=config.epochs,
            dataset=described,
            peak_memory_mib=_peak_memory_mib(device),
            scores=strategy.scores.tolist(),
        ).write(output / "search.json")
        report.draw_search(output)
        folder.drop_checkpoints()
    accelerator.wait_for_everyone()
    return output


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


def _steps_per_epoch(images: int, config: SearchConfig, share: _Share) -> int:
    """Steps of an epoch over all processes; each takes as many turns as the others."""
    if config.batch_size > images:
        raise InputError(f"batch-size {config.batch_size} is more than the {images} images of a half: use less")
    steps, turns = images // config.batch_size, share.turn[1]
    if steps < turns:
        raise InputError(f"an epoch has {steps} steps for {turns} processes: use a smaller batch-size")
    return steps - steps % turns


def _prepare(supernet: PoolingResNet, config: SearchConfig, share: _Share, accelerator: Accelerator) -> _Trainer:
    supernet = supernet.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer(supernet, config)
    # wrapped for gradient averaging only where all processes train the same supernet
    network = accelerator.prepare_model(supernet, evaluation_mode=share.alone)
    return _Trainer(supernet, network, accelerator.prepare_optimizer(optimizer))


def _exchange_scores(strategy: BalancedMixture, owned: range, accelerator: Accelerator) -> None:
    """Give every process the score columns of all supernets, each from its owner."""
    columns = strategy.scores[:, owned.start : owned.stop].T.contiguous().to(accelerator.device)
    strategy.scores.copy_(accelerator.gather(columns).T)


def _evaluate_all(
    mixture: Mixture,
    share: _Share,
    images: ImageSet,
    data: ImageData,
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
) -> Tensor:
    """Accuracy of every layout under every supernet on all score images, float64 (L, M) on the CPU.

    Supernets normalise by batch, so batches are fixed and never shared between processes.
    """
    space, device = mixture.space, accelerator.device
    correct = torch.zeros(len(space), len(mixture), dtype=torch.int64, device=device)
    order = even_batches(len(images), batch_size, random_stream(seed, SCORE_ORDER))[share.shard[0] :: share.shard[1]]
    with accelerator.autocast():
        for pixels, labels in runtime.progress_bar(images.batches(order), len(order), "evaluating all layouts"):
            inputs = normalise(pixels.to(device, non_blocking=True), data.mean, data.std)
            for m in share.owned:
                correct[:, m] += count_correct(mixture.supernets[m], space, inputs, labels.to(device))
    return accelerator.reduce(correct, "sum").cpu().double() / len(images)


def _checkpoint(
    folder: RunFolder,
    epoch: int,
    trainers: dict[int, _Trainer],
    strategy: BalancedMixture,
    accelerator: Accelerator,
    share: _Share,
) -> None:
    """Save every supernet by a process that owns it, then the scores, then mark the checkpoint whole."""
    if accelerator.is_main_process:
        folder.new_checkpoint(epoch)
    accelerator.wait_for_everyone()
    path = folder.checkpoint(epoch)
    if share.shard[0] == 0:
        for m, trainer in trainers.items():
            save_training_state(path / f"supernet-{m}.safetensors", trainer.supernet, trainer.optimizer.optimizer)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_file(strategy.state_dict(), path / "strategy.safetensors")
        folder.complete_checkpoint(epoch, accelerator)
    accelerator.wait_for_everyone()


def _restore(
    folder: RunFolder, trainers: dict[int, _Trainer], strategy: BalancedMixture, accelerator: Accelerator
) -> int:
    """Load the last checkpoint, if there is one; returns the epochs it has seen."""
    epoch = folder.resume_epoch("search.json", accelerator)
    if epoch:
        path = folder.checkpoint(epoch)
        for m, trainer in trainers.items():
            load_training_state(path / f"supernet-{m}.safetensors", trainer.supernet, trainer.optimizer.optimizer)
        strategy.load_state_dict(load_file(path / "strategy.safetensors"))
    return epoch


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
    parser = build_parser(SearchConfig, "Search where a convolutional network should downsample.")

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
