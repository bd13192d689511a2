"""Training of one layout from scratch, to a folder that the Hub and timm take as it is."""

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator, PartialState
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn

from . import hub, report, runtime
from .command import run_command
from .config import TrainConfig, load_recipe, shipped_recipes, with_reachable_data
from .data import (
    AUGMENT,
    MIX,
    ORDER,
    Augmentation,
    DataSource,
    ImageData,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
    to_device,
)
from .errors import InputError
from .evaluate import evaluate
from .export import require_onnx
from .layout import Layout
from .model_folder import save_model
from .models import PoolingResNet
from .optimizer import create_optimizer, learning_rate, set_learning_rate
from .results import SearchResult, TrainDataset, TrainResult
from .run_folder import (
    RunFolder,
    find_latest_search,
    last_precision,
    load_training_state,
    open_run,
    resolve_config,
    save_training_state,
)
from .search_space import SearchSpace
from .usage import parser_of

_log = logging.getLogger(__name__)
_INHERITED = (
    "dataset",
    "dataset_id",
    "dataset_config",
    "dataset_revision",
    "image_column",
    "label_column",
    "train_split",
    "test_split",
    "in_chans",
    "model",
    "flip",
    "crop_padding",
)


def train(config: TrainConfig, output: Path | None = None, resume: bool = False) -> Path:
    """Train one layout from scratch on all training images, then evaluate the test images once.

    Args:
        config: see `TrainConfig`; `layout` is what is trained.
        output: folder of the run; a new one under runs/ if None.
        resume: continue the run in `output` after its last whole epoch.

    Returns:
        the folder, which holds `model/`, `metrics.json`, the metrics of every epoch and pictures.

    Raises:
        InputError: for a setting that cannot be used; nothing is written then.
    """
    accelerator = runtime.start(config, last_precision(output) if output and resume else None)
    with open_run("train", output, resume) as folder:
        _train(config, folder, accelerator)
    return folder.path


def _train(config: TrainConfig, folder: RunFolder, accelerator: Accelerator) -> None:
    space = SearchSpace(config.model, config.layout)
    layout = space.default_layout
    found = hub.load_search(config.from_search) if config.from_search else None
    if found and str(layout) not in found.layouts:
        raise InputError(f"layout {layout} is none of those that the search {config.from_search} ranked")
    if config.onnx:
        require_onnx()
    device, shard = accelerator.device, (accelerator.process_index, accelerator.num_processes)
    share, rest = divmod(config.batch_size, shard[1])
    if rest or share < 2 or (share % 2 and (config.mixup or config.cutmix)):
        raise InputError(f"batch-size {config.batch_size} cannot be shared by {shard[1]} processes: use a multiple")

    source = DataSource(config, torch.get_num_threads())
    space.backbone.check(layout, source.image_size)
    with PartialState().local_main_process_first():
        data, test = source.train(), source.test(check=accelerator.is_main_process)
    if accelerator.is_main_process:
        _log.info(source.summary())
    training, holdout = data.images.near(device), None
    if config.holdout:
        kept, apart = stratified_split(
            data.images.labels.numpy(),
            config.holdout,
            config.seed,
            "a held-out part and the training images",
            data.label_names,
        )
        training, holdout = training.select(kept), training.select(apart)
    if config.batch_size > len(training):
        raise InputError(f"batch-size {config.batch_size} is more than the {len(training)} images: use less")
    steps = len(training) // config.batch_size

    torch.manual_seed(config.seed)
    model = create_network(config, layout, data).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    optimizer = create_optimizer(model, config)
    network = accelerator.prepare_model(model)
    prepared = accelerator.prepare_optimizer(optimizer)
    augment = Augmentation(config.crop_padding, config.flip and not config.alternate_flip)
    first_mirrored = random_stream(config.seed, AUGMENT).integers(0, 2, len(training))
    mix = None
    if config.mixup or config.cutmix:
        mix = Mixup(
            config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=len(data.label_names)
        )
    criterion = SoftTargetCrossEntropy() if mix else nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    folder.begin(config, {**runtime.describe(accelerator), "command": sys.argv}, source.identity(data))
    accelerator.wait_for_everyone()
    _restore(folder, model, optimizer, ema, accelerator)

    for epoch in range(folder.epoch, config.epochs):
        started = time.monotonic()
        torch.manual_seed(config.seed + epoch * shard[1] + shard[0])  # dropout, the only user of the global stream
        order = shuffled_batches(len(training), config.batch_size, random_stream(config.seed, ORDER, epoch), shard)
        crops = augment.draw(steps, config.batch_size, random_stream(config.seed, AUGMENT, epoch), shard)
        if config.alternate_flip:
            crops[:, 2] = torch.from_numpy((first_mirrored[np.stack(order)] + epoch) % 2)
        batches = zip(to_device(crops, device), training.batches(order, device), strict=True)
        bar = runtime.progress_bar(batches, steps, f"epoch {epoch + 1}/{config.epochs}")
        sums = torch.zeros(2, device=device)
        model.train()
        for index, (drawn, (images, labels)) in enumerate(bar):
            step = epoch * steps + index
            set_learning_rate(prepared, learning_rate(config, steps, step))
            inputs, targets = normalise(augment(images, drawn), data.mean, data.std), labels
            if mix is not None:
                # timm draws from numpy's global stream
                np.random.seed(random_stream(config.seed, MIX, step, shard[0]).integers(2**32))
                inputs, targets = mix(inputs, labels)
            logits = network(inputs)
            loss = criterion(logits, targets)
            accelerator.backward(loss)
            prepared.step()
            prepared.zero_grad()
            if ema is not None:
                ema.update(model, step)
            with torch.no_grad():
                sums += torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
            if index % 20 == 19:
                bar.set_postfix_str(f"loss {float(sums[0]) / (index + 1):.3f}")

        sums = accelerator.reduce(sums / steps, "mean")
        final = ema.module if ema is not None else model
        if shard[1] > 1:
            # each process has normalised by its own shards; what is measured and saved is one network
            for each in (model, final):
                distribute_bn(each, shard[1], reduce=True)
        measured: dict[str, float] = {}
        if holdout is not None:
            with accelerator.autocast():
                measured = evaluate(final, holdout, data.mean, data.std, accelerator)
        if accelerator.is_main_process:
            row = {
                "epoch": epoch + 1,
                "loss": float(sums[0]),
                "train_accuracy": float(sums[1]),
                "holdout_accuracy": measured.get("accuracy"),
                "holdout_loss": measured.get("loss"),
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(time.monotonic() - started, 2),
            }
            folder.log(row)
            folder.touch()
            held_text = f", held-out accuracy {100 * measured['accuracy']:.2f} %" if measured else ""
            _log.info("epoch %d/%d: loss %.3f%s, %.0f s", epoch + 1, config.epochs, row["loss"], held_text,
                      row["seconds"])  # fmt: skip
        _checkpoint(folder, epoch + 1, model, optimizer, ema, accelerator)

    final = create_network(config, layout, data).to(device)
    final.load_state_dict((ema.module if ema is not None else model).state_dict())
    measured = evaluate(final, test.images, data.mean, data.std, accelerator)
    if accelerator.is_main_process:
        folder.touch()
        result = TrainResult(
            **folder.summary(),
            recipe=config.recipe,
            settings=config.settings(),
            seed=config.seed,
            epochs=config.epochs,
            model=config.model,
            layout=str(layout),
            test_accuracy=measured["accuracy"],
            test_loss=measured["loss"],
            test_images=len(test.images),
            test_precision="fp32",
            macs=space.macs(layout, source.image_size, config.in_chans),
            parameters=sum(p.numel() for p in final.parameters()),
            runs=1,
            train_images=len(training),
            dataset=TrainDataset(
                **source.describe(data), test_split=source.test_split, test_fingerprint=test.fingerprint
            ),
        )
        result.write(folder.path / "metrics.json")
        _publishable(folder.path, final, data, result, found, config.onnx)
        report.draw_training(folder.path)
        folder.finish()
    accelerator.wait_for_everyone()


def create_network(config: TrainConfig, layout: Layout, data: ImageData) -> PoolingResNet:
    """An untrained network for a data set, its timm configuration included."""
    return timm.create_model(  # type: ignore[return-value]
        config.model,
        layout=str(layout),
        num_classes=len(data.label_names),
        in_chans=config.in_chans,
        drop_rate=config.drop_rate,
        pretrained_cfg_overlay={
            "num_classes": len(data.label_names),
            "input_size": (config.in_chans, data.image_size, data.image_size),
            "mean": data.mean,
            "std": data.std,
        },
    )


def _publishable(
    output: Path, final: PoolingResNet, data: ImageData, result: TrainResult, found: SearchResult | None, onnx: bool
) -> None:
    """Write the model folder, read it back, and compare."""
    final = final.cpu().eval()
    save_model(output / "model", final, data.label_names, result, found, onnx)
    reloaded = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True).eval()
    pixels, _ = next(data.images.batches([np.arange(min(8, len(data.images)))]))
    inputs = normalise(pixels, data.mean, data.std)
    with torch.no_grad():
        if not torch.equal(reloaded(inputs), final(inputs)):
            shutil.rmtree(output / "model")
            raise RuntimeError("the saved model gives other logits than the trained one; it was removed")


def _checkpoint(
    folder: RunFolder,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    accelerator: Accelerator,
) -> None:
    if accelerator.is_main_process:
        path = folder.new_checkpoint(epoch)
        save_training_state(path / "model.safetensors", model, optimizer)
        if ema is not None:
            save_training_state(path / "ema.safetensors", ema.module)
        folder.complete_checkpoint(epoch, accelerator)
    accelerator.wait_for_everyone()


def _restore(
    folder: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    accelerator: Accelerator,
) -> None:
    """Load the checkpoint to continue from, if there is one."""
    if folder.epoch:
        path = folder.checkpoint(folder.epoch)
        folder.restore_scaler(accelerator)
        load_training_state(path / "model.safetensors", model, optimizer)
        if ema is not None:
            load_training_state(path / "ema.safetensors", ema.module)


def settings_from_search(result: SearchResult, pick: str) -> dict[str, Any]:
    """Training settings that a finished search implies: its data, and the layout picked from its ranking.

    Args:
        result: of the search, as `hub.load_search` gives it.
        pick: "best", "best_within_default_macs", "default", or a layout that the search ranked.
    """
    inherited = with_reachable_data({key: result.settings.get(key) for key in _INHERITED})
    return {**inherited, "image_size": result.dataset.image_size, "layout": result.pick(pick).layout}


def _gather_settings(given: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Settings of a run: those of the search, overridden by the recipe, overridden by flags."""
    recipe = given.get("recipe")
    explicit = {**(load_recipe(recipe, TrainConfig) if recipe else {}), **given}
    if resume:
        return explicit
    if not explicit.get("from_search") and not explicit.get("layout"):
        explicit["from_search"] = str(find_latest_search())
    if not explicit.get("from_search"):
        return explicit
    if explicit.get("layout"):
        raise InputError("layout and from-search are both given: use --pick to choose a layout of the search")
    explicit["from_search"] = hub.pin(explicit["from_search"])
    result = hub.load_search(explicit["from_search"])
    found, used = settings_from_search(result, explicit.get("pick", "best")), result.recipe
    base = load_recipe(used, TrainConfig) if used in shipped_recipes() and not recipe else {}
    return {**base, **found, **explicit}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("train")

    def run() -> None:
        given = vars(parser.parse_args(argv))
        output, resume, target = given.pop("output", None), given.pop("resume", False), hub.take_target(given)
        path = Path(output) if output else None
        config = resolve_config(TrainConfig, _gather_settings(given, resume), path, resume)
        folder = train(config, path, resume)
        if PartialState().is_main_process:
            report.print_training(folder)
            if target:
                report.print_pushed(hub.push(folder, **target))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
