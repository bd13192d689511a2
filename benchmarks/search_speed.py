"""How fast the search is: the plain way of published research code against ours, in turn, on the same images.

    python benchmarks/search_speed.py --dataset PATH [--label-column fine_label] [--output benchmarks/results/NAME.json]

The plain way is the same algorithm with the same draws, hyper-parameters and threads: torchvision transforms on
decoded PIL images in the main process, float32, contiguous tensors, scoring with gradients recorded, layouts evaluated
one by one. Every difference is also switched on alone. Ratios are plain / ours, the median of paired repeats with
their smallest and largest; absolute seconds are of this machine in this hour.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from bmsn_zoo import runtime
from bmsn_zoo.config import SearchConfig
from bmsn_zoo.data import (
    AUGMENT,
    ORDER,
    SCORE_ORDER,
    Augmentation,
    DataSource,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
)
from bmsn_zoo.mixture import Mixture, count_correct
from bmsn_zoo.records import write_json
from bmsn_zoo.search_space import SearchSpace
from bmsn_zoo.strategies import BalancedMixture

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Way:
    """How to do the same computation; the defaults are the plain way."""

    device_augmentation: bool = False
    channels_last: bool = False
    native_precision: bool = False
    scoring_without_gradients: bool = False
    prefix_tree: bool = False


PLAIN, OURS = Way(), Way(True, True, True, True, True)


class Bench:
    """A mixture and its data, run in either way for a few steps or over the whole score split."""

    def __init__(self, config: SearchConfig, accelerator: Accelerator) -> None:
        source = DataSource(config, torch.get_num_threads())
        self.config, self.accelerator, self.data = config, accelerator, source.train()
        labels = self.data.images.labels.numpy()
        weight, score = stratified_split(labels, 0.5, config.seed, "two halves")
        self.weight, self.score = self.data.images.select(weight), self.data.images.select(score)
        self.space = SearchSpace(config.model)
        everything = self.data.images.pixels
        assert everything is not None, "this benchmark keeps its images in memory"
        self.pil = [Image.fromarray(pixels.numpy()) for pixels in everything]
        to_tensor = [transforms.ToTensor(), transforms.Normalize(self.data.mean, self.data.std)]
        crop = transforms.RandomCrop(source.image_size, padding=config.crop_padding)
        self.train_transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_tensor])
        self.score_transform = transforms.Compose(to_tensor)

    def _mixture(self, way: Way) -> tuple[Mixture, list[torch.optim.Optimizer]]:
        mixture = Mixture(self.space, self.config.mixture_size, len(self.data.label_names), 3, self.config.seed)
        memory = torch.channels_last if way.channels_last else torch.contiguous_format
        for supernet in mixture.supernets:
            supernet.to(memory_format=memory)  # type: ignore[call-overload]
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in mixture.supernets]
        return mixture, optimizers

    def _precision(self, way: Way) -> torch.autocast:
        native = way.native_precision and self.accelerator.mixed_precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=native)

    def _batches(self, way: Way, split: str, order: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.weight if split == "weight" else self.score
        if way.device_augmentation:
            augment = Augmentation(self.config.crop_padding, self.config.flip)
            for step, (pixels, labels) in enumerate(images.batches(order)):
                if split == "weight":
                    pixels = augment(pixels, random_stream(0, AUGMENT, step))
                yield normalise(pixels, self.data.mean, self.data.std), labels
        else:
            transform = self.train_transform if split == "weight" else self.score_transform
            for positions in order:
                rows = images.rows[positions]
                yield torch.stack([transform(self.pil[row]) for row in rows]), images.labels[positions]

    def steps(self, way: Way, count: int) -> float:
        """Seconds of a search step, the mean over some."""
        mixture, optimizers = self._mixture(way)
        strategy = BalancedMixture(len(self.space), self.config.mixture_size, 100.0, 0.9, self.config.seed)
        size = self.config.batch_size
        orders = [
            (shuffled_batches(len(images), size, random_stream(0, purpose)) * count)[:count]
            for images, purpose in ((self.weight, ORDER), (self.score, SCORE_ORDER))
        ]
        started = time.perf_counter()
        pairs = zip(self._batches(way, "weight", orders[0]), self._batches(way, "score", orders[1]), strict=True)
        for step, ((images, labels), (score_images, score_labels)) in enumerate(pairs):
            draw = strategy.draw(step, step / count, range(len(mixture)))
            supernet, optimizer = mixture.supernets[draw.supernet], optimizers[draw.supernet]
            supernet.set_layout(self.space[draw.layout])
            with self._precision(way):
                logits = supernet(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            with self._precision(way), torch.set_grad_enabled(not way.scoring_without_gradients):
                correct = supernet(score_images).argmax(1) == score_labels
            strategy.update(draw, float(correct.float().mean()))
        return (time.perf_counter() - started) / count

    def evaluation(self, way: Way, batches: int | None = None) -> float:
        """Seconds of evaluating all layouts of all supernets on the score split, or on some batches of it."""
        mixture, _ = self._mixture(way)
        order = even_batches(len(self.score), self.config.eval_batch_size, random_stream(0, SCORE_ORDER))[:batches]
        started = time.perf_counter()
        with self._precision(way), torch.set_grad_enabled(not way.scoring_without_gradients):
            for images, labels in self._batches(way, "score", order):
                for supernet in mixture.supernets:
                    if way.prefix_tree:
                        count_correct(supernet, self.space, images, labels)
                        continue
                    for layout in self.space:
                        supernet.set_layout(layout)
                        (supernet(images).argmax(1) == labels).sum()
        return time.perf_counter() - started

    def convolutions(self) -> tuple[float, float]:
        """Seconds of forward and backward of the default layout, and of its bare convolutions."""
        mixture, _ = self._mixture(OURS)
        net, batch = mixture.supernets[0], self.config.batch_size
        net.set_layout(self.space.default_layout)
        shapes: list[tuple[nn.Conv2d, torch.Size]] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs: shapes.append((module, inputs[0].shape)))
            for module in net.modules()
            if isinstance(module, nn.Conv2d)
        ]
        size = self.data.image_size
        images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        labels = torch.randint(0, len(self.data.label_names), (batch,))
        net(images)
        for hook in hooks:
            hook.remove()
        kind = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        work = []
        for module, shape in shapes:
            inputs = (
                torch.randn(shape).to(kind, memory_format=torch.channels_last).requires_grad_(module is not net.conv1)
            )
            weight = module.weight.detach().to(kind, memory_format=torch.channels_last).requires_grad_()
            output = nn.functional.conv2d(inputs, weight, None, module.stride, module.padding)
            work.append((inputs, weight, module, torch.randn_like(output)))

        def whole() -> None:
            with self._precision(OURS):
                logits = net(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            net.zero_grad()

        def bare() -> None:
            for inputs, weight, module, gradient in work:
                nn.functional.conv2d(inputs, weight, None, module.stride, module.padding).backward(gradient)
                inputs.grad = weight.grad = None

        return _seconds(whole), _seconds(bare)


def _seconds(call: Callable[[], None], count: int = 10) -> float:
    call()
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def paired(repeats: int, plain: Callable[[], float], ours: Callable[[], float]) -> dict[str, object]:
    """Both in turn, several times: ratios with their spread, and the median seconds."""
    pairs = [(plain(), ours()) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio": round(statistics.median(ratios), 2),
        "smallest": round(ratios[0], 2),
        "largest": round(ratios[-1], 2),
        "plain_seconds": round(statistics.median(a for a, _ in pairs), 4),
        "our_seconds": round(statistics.median(b for _, b in pairs), 4),
    }


_images: list[Any] = []  # of a process that decodes


def _open_images(folder: str, column: str) -> None:
    _images.append(datasets.load_dataset(folder, split="train").select_columns([column]))


def _decode(rows: list[int]) -> int:
    (images,) = _images
    return sum(np.asarray(image.convert("RGB")).shape[0] for image in images[rows][images.column_names[0]])


def loading(config: SearchConfig, repeats: int) -> dict[str, object]:
    """Loading all training images: decoding once on all cores, our first time, and our cached time."""
    cores = runtime.usable_cores()
    whole = replace(config, limit=None)
    column = DataSource(whole, cores).image_column
    firsts, decodes, cacheds = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, Path(folder)
            try:
                source = DataSource(whole, cores)  # prepares the Arrow files, which both need
                started = time.perf_counter()
                source.train()
                firsts.append(time.perf_counter() - started)
                started = time.perf_counter()
                DataSource(whole, cores).train()
                cacheds.append(time.perf_counter() - started)
            finally:
                datasets.config.HF_DATASETS_CACHE = cache
        parts = [part.tolist() for part in np.array_split(np.arange(len(source.train_source)), cores * 8)]
        with multiprocessing.get_context("fork").Pool(cores, _open_images, (config.dataset, column)) as pool:
            pool.map(_decode, [[0]] * cores * 4)  # all have started
            started = time.perf_counter()
            pool.map(_decode, parts, 1)
            decodes.append(time.perf_counter() - started)
    return {
        "images": len(source.train_source),
        "decoding_once_seconds": round(statistics.median(decodes), 2),
        "first_time_seconds": round(statistics.median(firsts), 2),
        "cached_seconds": round(statistics.median(cacheds), 3),
        "first_over_decoding": round(statistics.median(a / b for a, b in zip(firsts, decodes, strict=True)), 2),
        "first_over_cached": round(statistics.median(a / b for a, b in zip(firsts, cacheds, strict=True)), 1),
    }


def search_process(config: SearchConfig, launcher: list[str], *extra: str) -> dict[str, float]:
    """One real search of one epoch as processes of their own: seconds of a step, and peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        arguments = ["--dataset", config.dataset, "--epochs", "1", "--limit", str(config.limit)]
        arguments += ["--label-column", config.label_column] if config.label_column else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        subprocess.run(
            [*launcher, str(ROOT / "search.py"), *arguments, *extra, "--output", str(output)],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        row = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
        return {"step_seconds": row["seconds"] / sum(row["draws"]), "peak_memory_mib": row["peak_memory_mib"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--label-column")
    parser.add_argument("--images", type=int, default=2560, help="training images of the timed epochs")
    parser.add_argument("--steps", type=int, default=20, help="search steps of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], help="parts to leave out, by their name in the results")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = SearchConfig(
        dataset=options.dataset, label_column=options.label_column, limit=options.images, batch_size=128
    ).check()
    accelerator = runtime.start(config)
    bench = Bench(config, accelerator)
    results: dict[str, object] = {"command": sys.argv, "environment": runtime.describe(accelerator)}

    def part(name: str, measure: Callable[[], object]) -> None:
        if name not in options.skip:
            results[name] = measure()
            sys.stdout.write(f"{name}: {json.dumps(results[name])}\n")
            sys.stdout.flush()
            if options.output is not None:
                write_json(options.output, results)

    repeats, steps = options.repeats, options.steps
    bench.steps(OURS, 3)
    part("search_step", lambda: paired(repeats, lambda: bench.steps(PLAIN, steps), lambda: bench.steps(OURS, steps)))
    for switch in ("device_augmentation", "channels_last", "native_precision", "scoring_without_gradients"):
        way = replace(PLAIN, **{switch: True})
        part(
            f"search_step_{switch}_alone",
            lambda way=way: paired(repeats, lambda: bench.steps(PLAIN, steps), lambda: bench.steps(way, steps)),
        )
    part(
        "evaluation",
        lambda: paired(repeats, lambda: bench.evaluation(PLAIN, 1), lambda: bench.evaluation(OURS, 1)),
    )
    for switch in ("channels_last", "native_precision", "scoring_without_gradients", "prefix_tree"):
        way = replace(PLAIN, **{switch: True})
        part(
            f"evaluation_{switch}_alone",
            lambda way=way: paired(repeats, lambda: bench.evaluation(PLAIN, 1), lambda: bench.evaluation(way, 1)),
        )
    epoch_steps = len(bench.weight) // config.batch_size
    part(
        "epoch_and_evaluation",
        lambda: paired(
            repeats,
            lambda: bench.steps(PLAIN, epoch_steps) * epoch_steps + bench.evaluation(PLAIN),
            lambda: bench.steps(OURS, epoch_steps) * epoch_steps + bench.evaluation(OURS),
        ),
    )

    def share() -> dict[str, float]:
        pairs = [bench.convolutions() for _ in range(repeats)]
        shares = sorted(bare / whole for whole, bare in pairs)
        return {"share": round(statistics.median(shares), 3), "smallest": round(shares[0], 3),
                "largest": round(shares[-1], 3)}  # fmt: skip

    part("share_of_bare_convolutions", share)
    if options.dataset != "digits":
        part("loading", lambda: loading(config, repeats))

    def mixture_parallel() -> dict[str, float]:
        two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        ratios = []
        for _ in range(repeats):
            one = search_process(config, [sys.executable], "--threads", "1")["step_seconds"]
            both = search_process(config, two, "--threads", "1", "--parallel", "mixture")["step_seconds"]
            ratios.append(one / both)
        ratios.sort()
        return {"speedup": round(statistics.median(ratios), 2), "smallest": round(ratios[0], 2),
                "largest": round(ratios[-1], 2)}  # fmt: skip

    part("mixture_parallel_two_processes", mixture_parallel)
    part(
        "peak_memory_mixture_of_8",
        lambda: search_process(replace(config, limit=50_000), [sys.executable], "--mixture-size", "8"),
    )


if __name__ == "__main__":
    main()
