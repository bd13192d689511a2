"""The search: a balanced mixture of supernets over pooling layouts, top to bottom (arXiv:2306.11982)."""

import json
import logging
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, tqdm
from safetensors.torch import load_file, save_file
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from . import report, runtime
from .config import SearchConfig, build_parser, load_recipe
from .data import (
    AUGMENT,
    ORDER,
    SCORE_ORDER,
    Augmentation,
    DataSource,
    ImageSet,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
)
from .errors import InputError
from .mixture import Mixture, count_correct
from .ranking import build_result
from .records import (
    SCHEMA_VERSION,
    RunFolder,
    load_training_state,
    new_output,
    resolve_config,
    save_training_state,
    write_json,
)
from .search_space import SearchSpace
from .strategies import BalancedMixture, Draw

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
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    owned, shard = _share_of_work(config, rank, world)

    source = DataSource(config, torch.get_num_threads())
    space.default_layout.check(space.backbone.num_units, source.image_size)
    with PartialState().local_main_process_first():
        data = source.train()
    weight_rows, score_rows = stratified_split(
        data.images.labels.numpy(), 0.5, config.seed, "a weight split and a score split"
    )
    weight_split, score_split = data.images.select(weight_rows), data.images.select(score_rows)
    smallest = min(len(weight_split), len(score_split))
    if config.batch_size > smallest:
        raise InputError(f"batch-size {config.batch_size} is more than the {smallest} images of a half: use less")
    # in mixture parallel the processes take the batches of an epoch in turn
    steps = len(weight_split) // config.batch_size
    turns = world if shard == (0, 1) else 1
    if steps < turns:
        raise InputError(f"an epoch has {steps} steps for {turns} processes: use a smaller batch-size")
    steps -= steps % turns
    total_steps = steps * config.epochs

    mixture = Mixture(space, config.mixture_size, len(data.label_names), config.in_chans, config.seed)
    strategy = BalancedMixture(
        len(space), config.mixture_size, config.max_sharpness, config.score_momentum, config.seed
    )
    augment = Augmentation(config.crop_padding, config.flip)
    optimizers, schedulers, networks = {}, {}, {}
    for m in owned:
        supernet = mixture.supernets[m].to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = runtime.create_optimizer(supernet, config)
        schedulers[m], _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=config.epochs,
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        # wrapped for gradient averaging only where all processes train the same supernet
        networks[m] = accelerator.prepare_model(supernet, evaluation_mode=shard == (0, 1))
        optimizers[m] = accelerator.prepare_optimizer(optimizer)

    output = Path(broadcast_object_list([str(output or new_output("search"))])[0])
    folder = RunFolder(output)
    start_epoch = _restore(folder, mixture, optimizers, strategy, accelerator) if resume else 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for note in folder.begin(config, {**runtime.describe(accelerator), "command": sys.argv, "epoch": start_epoch}):
            _log.warning(note)
        folder.keep_epochs(start_epoch)

    for epoch in range(start_epoch, config.epochs):
        started = time.monotonic()
        order = shuffled_batches(len(weight_split), config.batch_size, random_stream(config.seed, ORDER, epoch), shard)
        score_order = shuffled_batches(
            len(score_split), config.batch_size, random_stream(config.seed, SCORE_ORDER, epoch), shard
        )
        turn = slice(rank if turns > 1 else 0, steps, turns)
        batches = zip(
            range(steps)[turn],
            weight_split.batches(order[turn]),
            score_split.batches(_cycled(score_order, steps)[turn]),
            strict=True,
        )
        losses, accuracies, draws = [], [], np.zeros(config.mixture_size, dtype=int)
        pending: _OnTheWay | None = None
        bar = tqdm(batches, total=len(order[turn]), desc=f"epoch {epoch + 1}/{config.epochs}", leave=False)
        for local_step, (index, (images, labels), (score_images, score_labels)) in enumerate(bar, 1):
            step = epoch * steps + index
            progress = step / max(1, total_steps - 1)
            draw = strategy.draw(step, progress, owned)
            supernet, network, optimizer = mixture.supernets[draw.supernet], *_of(draw, networks, optimizers)
            supernet.set_layout(space[draw.layout])
            schedulers[draw.supernet].step_update(step)

            images = augment(images.to(device, non_blocking=True), random_stream(config.seed, AUGMENT, step), shard)
            logits = network(normalise(images, data.mean, data.std))
            loss = torch.nn.functional.cross_entropy(logits, labels.to(device, non_blocking=True))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

            with torch.no_grad():
                score_images = normalise(score_images.to(device, non_blocking=True), data.mean, data.std)
                correct = supernet(score_images).argmax(1) == score_labels.to(device, non_blocking=True)
                values = torch.stack([loss.detach(), correct.float().mean()])
                if turns == 1:
                    values = accelerator.reduce(values, "mean")

            # the score of the step before: waiting for this one would leave the device idle
            arriving, pending = pending, _OnTheWay(draw, values)
            for item in filter(None, (arriving, pending if local_step == len(order[turn]) else None)):
                loss_value, accuracy = item.arrive()
                strategy.update(item.draw, accuracy)
                losses.append(loss_value)
                accuracies.append(accuracy)
                draws[item.draw.supernet] += 1
            if turns > 1 and (local_step % _EXCHANGE_STEPS == 0 or local_step == len(order[turn])):
                _exchange_scores(strategy, owned, accelerator)
            if local_step % 10 == 0:
                shares = "/".join(f"{share:.3f}" for share in strategy.usage(progress))
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, score accuracy {accuracies[-1]:.3f}, usage {shares}")

        totals = torch.tensor([sum(losses), sum(accuracies), len(losses), *draws], dtype=torch.float32, device=device)
        if turns > 1:
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
        _checkpoint(folder, epoch + 1, mixture, optimizers, strategy, accelerator, shard)
        if accelerator.is_main_process:
            folder.log(row)
            folder.touch()
            _log.info("epoch %d/%d: loss %.3f, score accuracy %.3f, %.0f s", epoch + 1, config.epochs, row["loss"],
                      row["score_accuracy"], row["seconds"])  # fmt: skip

    evaluated = _evaluate_all(mixture, owned, score_split, data.mean, data.std, config, accelerator, shard)
    _gather_weights(mixture, folder, owned, accelerator)
    if accelerator.is_main_process:
        folder.touch()
        save_file(
            mixture.state_dict(),
            output / "supernets.safetensors",
            metadata={"model": config.model, "mixture_size": str(config.mixture_size)},
        )
        save_file(
            {"weight_rows": torch.from_numpy(weight_rows), "score_rows": torch.from_numpy(score_rows)},
            output / "split.safetensors",
        )
        result = build_result(space, evaluated, strategy.assignment(1.0), source.image_size, config.in_chans)
        result["scores"] = strategy.scores.tolist()
        described = {
            "id": config.dataset_id or config.dataset,
            "revision": config.dataset_revision,
            "fingerprint": data.fingerprint,
            "image_column": source.image_column,
            "label_column": source.label_column,
            "image_size": source.image_size,
            "in_chans": config.in_chans,
            "label_names": data.label_names,
            "mean": data.mean,
            "std": data.std,
            "weight_images": len(weight_split),
            "score_images": len(score_split),
        }
        head = {
            "schema_version": SCHEMA_VERSION,
            "recipe": config.recipe,
            "settings": config.settings(),
            "seed": config.seed,
        }
        run = {
            "duration_seconds": folder.seconds,
            **{key: folder.segments[-1][key] for key in ("versions", "commit", "precision", "hardware")},
            "segments": folder.segments,
        }
        write_json(output / "search.json", {**head, "dataset": described, **run, **result})
        report.draw_search(output)
        folder.drop_checkpoints()
    accelerator.wait_for_everyone()
    return output


def _share_of_work(config: SearchConfig, rank: int, world: int) -> tuple[range, tuple[int, int]]:
    """The supernets that a process owns, and its shard of every batch."""
    if config.parallel == "mixture" and world > 1:
        if config.mixture_size % world:
            raise InputError(f"mixture-size {config.mixture_size} is not a multiple of the {world} processes")
        each = config.mixture_size // world
        return range(rank * each, (rank + 1) * each), (0, 1)
    if config.batch_size % world or config.batch_size // world < 2:
        raise InputError(f"batch-size {config.batch_size} cannot be shared evenly by {world} processes")
    return range(config.mixture_size), (rank, world)


def _of(draw: Draw, *of_supernet: dict[int, Any]) -> tuple[Any, ...]:
    return tuple(mapping[draw.supernet] for mapping in of_supernet)


def _cycled(batches: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    return [batches[index % len(batches)] for index in range(count)]


def _exchange_scores(strategy: BalancedMixture, owned: range, accelerator: Accelerator) -> None:
    """Give every process the score columns of all supernets, each from its owner."""
    columns = strategy.scores[:, owned.start : owned.stop].T.contiguous().to(accelerator.device)
    strategy.scores.copy_(accelerator.gather(columns).T)


def _evaluate_all(
    mixture: Mixture,
    owned: range,
    images: ImageSet,
    mean: Sequence[float],
    std: Sequence[float],
    config: SearchConfig,
    accelerator: Accelerator,
    shard: tuple[int, int],
) -> Tensor:
    """Accuracy of every layout under every supernet on all score images, float64 (L, M) on the CPU.

    Supernets normalise by batch, so batches are fixed and never shared between processes.
    """
    space, device = mixture.space, accelerator.device
    correct = torch.zeros(len(space), len(mixture), dtype=torch.int64, device=device)
    order = even_batches(len(images), config.eval_batch_size, random_stream(config.seed, SCORE_ORDER))
    order = order[shard[0] :: shard[1]]
    with accelerator.autocast():
        for pixels, labels in tqdm(images.batches(order), total=len(order), desc="evaluating all layouts", leave=False):
            inputs = normalise(pixels.to(device, non_blocking=True), mean, std)
            for m in owned:
                correct[:, m] += count_correct(mixture.supernets[m], space, inputs, labels.to(device))
    return accelerator.reduce(correct, "sum").cpu().double() / len(images)


def _checkpoint(
    folder: RunFolder,
    epoch: int,
    mixture: Mixture,
    optimizers: dict[int, Any],
    strategy: BalancedMixture,
    accelerator: Accelerator,
    shard: tuple[int, int],
) -> None:
    """Save every supernet by a process that owns it, then the scores, then mark the checkpoint whole."""
    path = folder.path / f"checkpoint-{epoch}"
    if accelerator.is_main_process:
        folder.new_checkpoint(epoch)
    accelerator.wait_for_everyone()
    if shard[0] == 0:
        for m, optimizer in optimizers.items():
            save_training_state(path / f"supernet-{m}.safetensors", mixture.supernets[m], optimizer.optimizer)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_file(strategy.state_dict(), path / "strategy.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        folder.complete_checkpoint(path, {"epoch": epoch, "scaler": scaler})
    accelerator.wait_for_everyone()


def _restore(
    folder: RunFolder,
    mixture: Mixture,
    optimizers: dict[int, Any],
    strategy: BalancedMixture,
    accelerator: Accelerator,
) -> int:
    """Load the last checkpoint, if there is one; returns the epochs it has seen."""
    if (folder.path / "search.json").exists():
        raise InputError(f"output {folder.path} holds a finished search: nothing is left to resume")
    checkpoints = folder.checkpoints()
    if not checkpoints:
        return 0
    state = json.loads((checkpoints[-1] / "complete.json").read_text())
    for m, optimizer in optimizers.items():
        load_training_state(checkpoints[-1] / f"supernet-{m}.safetensors", mixture.supernets[m], optimizer.optimizer)
    strategy.load_state_dict(load_file(checkpoints[-1] / "strategy.safetensors"))
    if state["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["epoch"]


def _gather_weights(mixture: Mixture, folder: RunFolder, owned: range, accelerator: Accelerator) -> None:
    """Bring the weights of all supernets to the main process, from the last checkpoint of their owners."""
    if accelerator.is_main_process:
        for m, supernet in enumerate(mixture.supernets):
            if m not in owned:
                load_training_state(folder.checkpoints()[-1] / f"supernet-{m}.safetensors", supernet)


def _peak_memory_mib(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def main(argv: Sequence[str] | None = None, command: str = "accelerate launch -m bmsn_zoo.") -> int:
    """The command line; `command` is how this and the training command are started."""
    parser = build_parser(SearchConfig, "Search where a convolutional network should downsample.")

    def run() -> None:
        given = vars(parser.parse_args(argv))
        output, resume = given.pop("output", None), given.pop("resume", False)
        recipe = given.get("recipe")
        if recipe is None and "dataset" not in given and not resume:
            recipe = "digits-resnet20"
        settings = {**(load_recipe(recipe, SearchConfig) if recipe else {}), **given}
        path = Path(output) if output else None
        folder = search(resolve_config(SearchConfig, settings, path, resume), path, resume)
        if PartialState().is_main_process:
            report.print_search(folder, command)

    return runtime.run_command(run)


if __name__ == "__main__":
    sys.exit(main())
