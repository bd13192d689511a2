"""Training of one layout, to a folder that the Hub and timm take as it is."""

import itertools
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator, PartialState
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

from . import cost, hub, progress, report, runtime
from .command import rank, run_command, speak, take_dry_run
from .config import TrainConfig, fit_training, load_recipe, shipped_recipes, with_reachable_data
from .data import (
    AUGMENT,
    MIX,
    ORDER,
    Augmentation,
    DataSource,
    ImageData,
    check_batch_size,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
)
from .errors import InputError
from .evaluate import count_classes, evaluate
from .export import require_onnx
from .layout import Layout
from .model_folder import save_model
from .models import PoolingResNet, RelaidResNet, create_model
from .optimizer import create_optimizer, learning_rate, set_learning_rate
from .progress import Bar
from .results import DatasetRecord, SearchResult, TrainDataset, TrainResult, TrialResult
from .run_folder import (
    RunFolder,
    find_latest_search,
    last_precision,
    load_training_state,
    open_run,
    resolve_config,
    run_name,
    save_tensors,
    save_training_state,
)
from .search_space import backbone_of
from .starts import find_start, start_from, start_from_supernet
from .step import Lag, accuracy_of, check_finite
from .usage import parser_of

_log = logging.getLogger(__name__)
_DATA = ["dataset", "dataset_id", "dataset_config", "dataset_revision", "image_column", "label_column", "train_split"]
_INHERITED = [
    *_DATA,
    "test_split",
    "in_chans",
    "model",
    "pretrained",
    "flip",
    "crop",
    "crop_padding",
    "crop_pct",
    "store_size",
]  # from the search of the layout


def train(
    config: TrainConfig,
    output: Path | None = None,
    resume: bool = False,
    supernet: Mapping[str, Tensor] | None = None,
) -> Path:
    """Train one layout on all training images, then evaluate the test images once; or see `measure`.

    Args:
        config: see `TrainConfig`; `layout` is what is trained, from scratch if no start is named.
        output: folder of the run; a new one under runs/ if None.
        resume: continue the run in `output` after its last whole epoch.
        supernet: state of one to start from, for a choice of a search.

    Returns:
        the folder, which holds `model/`, `metrics.json`, the metrics of every epoch and pictures; or, if it is
            measured on held-out images, `trial.json` and which of them are classified correctly.

    Raises:
        InputError: for a setting that cannot be used (nothing is written then), or if the loss diverges.
    """
    accelerator = runtime.start(config, last_precision(output) if output and resume else None)
    with open_run("train", output, resume, run_name(config)) as folder:
        Training(config, folder, accelerator, supernet).run()
    return folder.path


def try_training(config: TrainConfig) -> Path:
    """Print what a training would do, and how long it would take, as a few of its steps show; it writes nowhere."""
    accelerator = runtime.start(config)
    run = Training(config, RunFolder(Path(os.devnull), dry=True), accelerator)
    seconds = progress.rehearse(run.run)
    if accelerator.is_main_process:
        layouts = f"{run.layout} with {run.macs / 1e6:.1f} M MACs"
        report.print_dry_run(run.config, layouts, seconds, runtime.peak_memory_mib(accelerator.device))
    return run.folder.path


class Training:
    """A training as one of its processes does it; for `supernet` see `train`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        accelerator: Accelerator,
        supernet: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.folder, self.accelerator, self.device = config, folder, accelerator, accelerator.device
        self.shard = accelerator.process_index, accelerator.num_processes  # the part of a batch that is ours
        if "batch_size" in config.model_fields_set:
            check_batch_size(config.batch_size, accelerator.num_processes, config.batch_unit)
        if config.init_from and config.pretrained:
            raise InputError("init-from and pretrained are two starts: give one of them")
        origin = find_start(config.init_from, config.model) if config.init_from and not folder.epoch else None
        backbone = backbone_of(config.model)
        self.layout = backbone.check(backbone.default_layout if config.layout is None else config.layout)
        self.found = hub.load_search(config.from_search) if config.from_search else None
        if self.found and str(self.layout) not in self.found.layouts:
            raise InputError(f"layout {self.layout} is none of those that the search {config.from_search} ranked")
        self.is_trial = config.measure == "holdout"
        if self.is_trial and not config.holdout:
            raise InputError("measure holdout needs images that are held out: give --holdout 0.5")
        if self.is_trial and config.onnx:
            raise InputError("measure holdout makes no model: leave out --onnx")
        if config.onnx:
            require_onnx()

        self.source = DataSource(config, torch.get_num_threads())
        self.macs = cost.macs(backbone, self.layout, self.source.image_size, config.in_chans)
        with PartialState().local_main_process_first():
            # the test images too: what is wrong with them must not be found after the whole training
            self.data = self.source.train()
            self.test = None if self.is_trial else self.source.test(check=accelerator.is_main_process)
            watch = not self.is_trial and not config.holdout
            watched = self.source.validation(config.validation_split) if watch else None
        if accelerator.is_main_process and not self.is_trial:
            _log.info(self.source.summary())
        self.images = self.data.images.near(self.device)
        self.holdout = watched.images.near(self.device) if watched else None
        if config.holdout:
            labels, what = self.data.images.labels.numpy(), "a held-out part and the training images"
            seed = config.seed if config.holdout_seed is None else config.holdout_seed
            parts = stratified_split(labels, config.holdout, seed, what, self.data.label_names)
            self.images, self.holdout = map(self.images.select, parts)
        self.config = config = fit_training(config, len(self.images), accelerator.num_processes)
        check_batch_size(config.batch_size, accelerator.num_processes, config.batch_unit)
        if config.batch_size > len(self.images):
            raise InputError(f"batch-size {config.batch_size} is more than the {len(self.images)} images: use less")
        self.epoch_steps = len(self.images) // config.batch_size
        self.work = 3.0 * config.epochs * self.epoch_steps * config.batch_size * self.macs

        torch.manual_seed(config.seed)
        model = create_network(config, self.layout, self.data, config.pretrained)
        if origin:
            start_from(model, origin, self.data.label_names)
        self.from_supernet = supernet is not None
        if supernet is not None:
            start_from_supernet(model, supernet)
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.final: nn.Module = self.ema.module if self.ema is not None else self.model  # what is measured and saved
        self.optimizer = accelerator.prepare_optimizer(create_optimizer(self.model, config))
        self.network = accelerator.prepare_model(self.model)
        if self.shard[1] > 1:  # or all would go on from the first one's running statistics in every step
            getattr(self.network, "_orig_mod", self.network).broadcast_buffers = False
        hard = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.criterion = SoftTargetCrossEntropy() if config.mixup or config.cutmix else hard

    def run(self) -> None:
        """All epochs, then the one look at the images that the result is measured on."""
        config, accelerator, folder = self.config, self.accelerator, self.folder
        if accelerator.is_main_process and not self.is_trial:
            _log.info(
                f"train: layout {self.layout} of {config.model} at {self.source.image_size} pixels "
                f"({self.source.size_origin}), {self.macs / 1e6:.1f} M MACs; {len(self.images)} images, batches of "
                f"{config.batch_size}; {config.epochs * self.epoch_steps} steps in {config.epochs} epochs"
            )
        runtime.begin_run(folder, config, self.source.identity(self.data), accelerator)
        accelerator.wait_for_everyone()
        self._restore()
        progress.begin(self.work, self.work * folder.epoch / config.epochs, folder.dry)

        stream = self._batches()
        for epoch in range(folder.epoch, config.epochs):
            started = time.monotonic()
            steps = range(epoch * self.epoch_steps, (epoch + 1) * self.epoch_steps)
            batches = itertools.islice(stream, len(steps))
            bar = Bar(batches, len(steps), self._title(epoch), self.work / config.epochs)
            lag, sums = Lag[int](), np.zeros(2)
            torch.manual_seed(config.seed + epoch * self.shard[1] + self.shard[0])  # dropout alone uses this stream
            self.model.train()

            for step, images, targets, labels in bar:
                set_learning_rate(self.optimizer, learning_rate(config, self.epoch_steps, step))
                logits = self.network(images)
                loss = self.criterion(logits, targets)
                accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.ema is not None:
                    self.ema.update(self.model, step)

                with torch.no_grad():
                    values = torch.stack([loss.detach(), accuracy_of(logits, labels)])
                    if self.shard[1] > 1:  # so that all processes notice when one diverges
                        values = accelerator.reduce(values, "mean")
                for done, arrived in lag.push(step, values, last=step == steps[-1]):
                    check_finite(arrived[0], epoch, done % self.epoch_steps)
                    sums += arrived
                    bar.show(f"loss {arrived[0]:.3f}")

            if self.shard[1] > 1:
                # each process has normalised by its own shards; what is measured and saved is one network
                for network in (self.model, self.final):
                    distribute_bn(network, self.shard[1], reduce=True)
            progress.stop_if_dry()
            row = self._describe_epoch(epoch, sums / len(steps), started)
            if accelerator.is_main_process:
                folder.log(row)
                folder.touch()
            self._checkpoint(epoch + 1)

        final = create_network(config, self.layout, self.data).to(self.device)
        final.load_state_dict(self.final.state_dict())
        images = self.test.images if self.test else self.holdout
        assert images is not None
        best = torch.zeros(len(images), 1, dtype=torch.int64, device=self.device)
        measured = evaluate(final, images, self.data.mean, self.data.std, accelerator, best)
        if accelerator.is_main_process:
            folder.touch()
            labels, found = images.labels.cpu(), best[:, 0].cpu()
            if self.is_trial:
                self._write_trial(measured, (labels == found).to(torch.uint8))
            else:
                classes = count_classes(labels, found, len(self.data.label_names))
                self._write_result(final.cpu().eval(), measured, classes)
        accelerator.wait_for_everyone()

    def _title(self, epoch: int) -> str:
        alone = f"{self.layout} alone, " if self.is_trial else ""
        return f"{alone}epoch {epoch + 1}/{self.config.epochs}"

    def _batches(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """All steps from this epoch on: augmented images, their targets (mixed if so asked), and their labels.

        One stream, since workers then read ahead into the next epoch.
        """
        config, data, begin = self.config, self.data, self.folder.epoch
        augment = self.source.augmentation(config.flip and not config.alternate_flip)
        order = itertools.chain.from_iterable(self._order(epoch, augment) for epoch in range(begin, config.epochs))
        mix = None
        if config.mixup or config.cutmix:
            classes = len(data.label_names)
            mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)

        for step, (images, labels) in enumerate(
            self.images.batches(order, self.device, augment), begin * self.epoch_steps
        ):
            inputs, targets = normalise(images, data.mean, data.std), labels
            if mix is not None:
                # timm draws from numpy's global stream
                np.random.seed(random_stream(config.seed, MIX, step, self.shard[0]).integers(2**32))
                inputs, targets = mix(inputs, labels)
            yield step, inputs, targets, labels

    def _order(self, epoch: int, augment: Augmentation) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Positions of the images of an epoch's steps, and what was drawn for them."""
        config, rng = self.config, random_stream(self.config.seed, AUGMENT, epoch)
        order = shuffled_batches(
            len(self.images), config.batch_size, random_stream(config.seed, ORDER, epoch), self.shard
        )
        crops = augment.draw(self.epoch_steps, config.batch_size, rng, self.shard, self.device)
        if config.alternate_flip:
            first = random_stream(config.seed, AUGMENT).integers(0, 2, len(self.images))
            crops[:, -1] = torch.from_numpy((first[np.stack(order)] + epoch) % 2)
        return zip(order, crops, strict=True)

    def _describe_epoch(self, epoch: int, means: np.ndarray, started: float) -> dict[str, object]:
        """A row of metrics.jsonl; `means` are the loss and the accuracy on augmented training images."""
        config, held = self.config, dict[str, float]()
        if self.holdout is not None and not self.is_trial:
            with self.accelerator.autocast():
                held = evaluate(self.final, self.holdout, self.data.mean, self.data.std, self.accelerator)
        seconds = time.monotonic() - started
        if self.accelerator.is_main_process:
            held_text = f", held-out accuracy {100 * held['accuracy']:.2f} %" if held else ""
            progress.tell(f"{self._title(epoch)}: loss {means[0]:.3f}{held_text}, {seconds:.0f} s")
        return {
            "epoch": epoch + 1,
            "loss": float(means[0]),
            "train_accuracy": float(means[1]),
            "holdout_accuracy": held.get("accuracy"),
            "holdout_loss": held.get("loss"),
            "lr": learning_rate(config, self.epoch_steps, (epoch + 1) * self.epoch_steps - 1),
            "seconds": round(seconds, 2),
        }

    def _about(self) -> dict[str, Any]:
        """What every result says of its training."""
        config = self.config
        return {
            **self.folder.summary(),
            "recipe": config.recipe,
            "settings": config.settings(),
            "seed": config.seed,
            "epochs": config.epochs,
            "model": config.model,
            "layout": str(self.layout),
            "macs": self.macs,
            "train_images": len(self.images),
        }

    def _write_trial(self, measured: dict[str, float], right: Tensor) -> None:
        """Write trial.json, and which of the held-out images are classified correctly."""
        about, folder, images = self._about(), self.folder, len(right)
        save_tensors(folder.path / "right.safetensors", {"right": right})
        trained = self.config.epochs * self.epoch_steps * self.config.batch_size
        TrialResult(
            **about,
            holdout_accuracy=measured["accuracy"],
            holdout_loss=measured["loss"],
            holdout_images=images,
            from_supernet=self.from_supernet,
            spent_macs=(3 * trained + images) * about["macs"],
            dataset=DatasetRecord(**self.source.describe(self.data)),
        ).write(folder.path / "trial.json")
        folder.finish()

    def _write_result(
        self, final: PoolingResNet | RelaidResNet, measured: dict[str, float], classes: dict[str, Any]
    ) -> None:
        """Write metrics.json and the model folder; read the model back, and compare."""
        config, source, data, folder, test = self.config, self.source, self.data, self.folder, self.test
        assert test is not None
        dataset = TrainDataset(**source.describe(data), test_split=source.test_split, test_fingerprint=test.fingerprint)
        result = TrainResult(
            **self._about(),
            test_accuracy=measured["accuracy"],
            test_loss=measured["loss"],
            test_images=len(test.images),
            test_precision="fp32",
            parameters=sum(p.numel() for p in final.parameters()),
            runs=1,
            license=config.license,
            **classes,
            dataset=dataset,
        )
        result.write(folder.path / "metrics.json")
        model = folder.path / "model"
        save_model(model, final, data.label_names, result, self.found, config.onnx)
        reloaded = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
        pixels, _ = next(data.images.batches([np.arange(min(8, len(data.images)))]))
        inputs = normalise(pixels, data.mean, data.std)
        with torch.no_grad():
            if not torch.equal(reloaded(inputs), final(inputs)):
                shutil.rmtree(model)
                raise RuntimeError("the saved model gives other logits than the trained one; it was removed")
        report.draw_training(folder.path)
        folder.finish()

    def _checkpoint(self, epoch: int) -> None:
        if self.accelerator.is_main_process:
            path = self.folder.new_checkpoint(epoch)
            save_training_state(path / "model.safetensors", self.model, self.optimizer.optimizer)
            if self.ema is not None:
                save_training_state(path / "ema.safetensors", self.ema.module)
            self.folder.complete_checkpoint(epoch, self.accelerator)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Load the checkpoint to continue from, if there is one."""
        if self.folder.epoch:
            path = self.folder.checkpoint(self.folder.epoch)
            self.folder.restore_scaler(self.accelerator)
            load_training_state(path / "model.safetensors", self.model, self.optimizer.optimizer)
            if self.ema is not None:
                load_training_state(path / "ema.safetensors", self.ema.module)


def create_network(
    config: TrainConfig, layout: Layout, data: ImageData, pretrained: bool = False
) -> PoolingResNet | RelaidResNet:
    """An untrained network for a data set, or one of timm's weights; its timm configuration included."""
    return create_model(
        config.model,
        layout=str(layout),
        pretrained=pretrained,
        num_classes=len(data.label_names),
        in_chans=config.in_chans,
        drop_rate=config.drop_rate,
        pretrained_cfg_overlay={
            "num_classes": len(data.label_names),
            "input_size": (config.in_chans, data.image_size, data.image_size),
            "mean": data.mean,
            "std": data.std,
            "crop_pct": data.crop_pct,
        },
    )


def settings_from_search(result: SearchResult, pick: str) -> dict[str, Any]:
    """Training settings that a finished search implies: its data, and the layout picked from its ranking.

    The default layout, if it was searched, takes the place of a best one that could not be told from the others.

    Args:
        result: of the search, as `hub.load_search` gives it.
        pick: "best", "best_within_default_macs", "default", or a layout that the search ranked.
    """
    entry = result.to_train(pick)
    if result.undecided and pick.startswith("best") and rank() == 0:
        what = "the default layout" if result.default else "layout"
        _log.warning("training %s %s: %s", what, entry.layout, result.undecided)
    inherited = with_reachable_data({key: result.settings.get(key) for key in _INHERITED})
    inherited["pretrained"] = bool(inherited["pretrained"])  # older searches do not say
    inherited["init_from"] = result.settings.get("pretrained_from")
    return {**inherited, "image_size": result.dataset.image_size, "layout": entry.layout}


def _gather_settings(given: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Settings of a run: those of the search, overridden by the recipe, overridden by flags."""
    recipe = given.get("recipe")
    explicit = {**(load_recipe(recipe, TrainConfig) if recipe else {}), **given}
    if resume:
        return explicit
    if explicit.get("init_from"):
        start = find_start(explicit["init_from"])
        own = {} if explicit.get("from_search") else {"model": start.model, "layout": str(start.layout)}
        explicit = {**own, "pretrained": False, **explicit, "init_from": start.name}
    if not explicit.get("from_search") and not explicit.get("layout"):
        explicit["from_search"] = str(find_latest_search())
    if not explicit.get("from_search"):
        return explicit
    if explicit.get("layout"):
        raise InputError("layout and from-search are both given: use --pick to choose a layout of the search")
    explicit["from_search"] = hub.pin(explicit["from_search"])
    result = hub.load_search(explicit["from_search"])
    found, used = settings_from_search(result, explicit.get("pick", "best")), result.recipe
    if explicit.get("model", result.model) != result.model:
        raise InputError(f"model {explicit['model']}: the search is of {result.model}, leave out --model")
    shipped = (used or "").removesuffix("-small") in shipped_recipes()
    base = load_recipe(str(used), TrainConfig) if shipped and not recipe else {}
    return {**base, **found, **explicit}


def start(given: dict[str, Any], told: bool = False) -> Path:
    """Train as flags ask, given by their names; returns the folder. `told`: the result is printed."""
    dry = take_dry_run(given)
    output, resume, target = given.pop("output", None), given.pop("resume", False), hub.take_target(given)
    path = Path(output) if output else None
    config = resolve_config(TrainConfig, _gather_settings(given, resume), path, resume)
    if target and config.measure == "holdout":
        raise InputError("measure holdout makes no model to push: leave out --push-to-hub")
    if dry:
        return try_training(config)
    folder = train(config, path, resume)
    if PartialState().is_main_process:
        if told:
            report.print_training(folder)
        if target and (address := hub.push(folder, **target)) and told:
            report.print_pushed(address)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("train")
    return run_command(lambda: start(speak(vars(parser.parse_args(argv))), told=True))


if __name__ == "__main__":
    sys.exit(main())
