"""How fast the search is: the plain way of published research code against ours, in turn, on the same images.

    python benchmarks/search_speed.py --dataset PATH [--label-column fine_label] [--output benchmarks/results/NAME.json]

The plain way is the same algorithm with the same draws, hyper-parameters and threads: torchvision transforms on
decoded PIL images in the main process, float32, contiguous tensors, scoring with gradients recorded, layouts evaluated
one by one. It runs in a process of its own, and every difference is also switched on alone. Ratios are plain / ours,
the median of paired repeats with their smallest and largest; absolute seconds are of this machine in this hour. The
default data set, digits, is too small to say more than that everything runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from network import DefaultNetwork
from ways import OURS, PLAIN, Way, Ways

from bmsn_zoo import runtime
from bmsn_zoo.config import SearchConfig, load_recipe
from bmsn_zoo.data import DataSource
from bmsn_zoo.files import write_json

ROOT = Path(__file__).parents[1]
ONLY = ("--confirm", "0", "--no-latency")  # nothing but the search


def spread(name: str, values: list[float]) -> dict[str, float]:
    """The median of repeats, their smallest and their largest."""
    numbers = {name: statistics.median(values), "smallest": min(values), "largest": max(values)}
    return {key: round(value, 3) for key, value in numbers.items()}


def paired(repeats: int, plain: Callable[[], float], ours: Callable[[], float]) -> dict[str, float]:
    """Both in turn, several times: ratios with their spread, and the median seconds."""
    pairs = [(plain(), ours()) for _ in range(repeats)]
    return {
        **spread("ratio", [a / b for a, b in pairs]),
        "plain_seconds": round(statistics.median(a for a, _ in pairs), 4),
        "our_seconds": round(statistics.median(b for _, b in pairs), 4),
    }


_images: list[Any] = []  # what forked processes decode


def _decode(rows: list[int]) -> int:
    images = _images[-1]
    return sum(np.asarray(image.convert("RGB")).shape[0] for image in images[rows][images.column_names[0]])


_plain: list[Ways] = []  # of the process that runs the plain way


def _start_plain(config: SearchConfig, threads: int, precision: str) -> None:
    torch.set_num_threads(threads)
    _plain.append(Ways(config, Accelerator(mixed_precision=precision)))  # without what our runtime sets


def _run_plain(measure: str, arguments: tuple[Any, ...]) -> float:
    return getattr(_plain[0], measure)(*arguments)


def loading(config: SearchConfig, repeats: int) -> dict[str, object]:
    """Loading all training images: decoding once on all cores, our first time, and our cached time."""
    cores = runtime.usable_cores()
    whole = config.model_copy(update={"limit": None})
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
        parts = [part.tolist() for part in np.array_split(source.training.rows, cores * 8)]
        _images.append(source.training.table.select_columns([source.image_column]))
        with get_context("fork").Pool(cores) as pool:
            pool.map(_decode, [[0]] * cores * 4)  # all have started
            started = time.perf_counter()
            pool.map(_decode, parts, 1)
            decodes.append(time.perf_counter() - started)
    return {
        "images": len(source.training.rows),
        "decoding_once_seconds": round(statistics.median(decodes), 2),
        "first_time_seconds": round(statistics.median(firsts), 2),
        "cached_seconds": round(statistics.median(cacheds), 3),
        "first_over_decoding": round(statistics.median(a / b for a, b in zip(firsts, decodes, strict=True)), 2),
        "first_over_cached": round(statistics.median(a / b for a, b in zip(firsts, cacheds, strict=True)), 1),
    }


def search_process(
    config: SearchConfig, launcher: list[str], *extra: str, root: Path = ROOT
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One real search as processes of their own, by some checkout: the metrics of its epochs, and its search.json."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        arguments = ["--dataset", config.dataset, "--mixed-precision", config.mixed_precision, "--output", str(output)]
        arguments += ["--label-column", config.label_column] if config.label_column else []
        arguments += ["--batch-size", str(config.batch_size)]
        subprocess.run(
            [*launcher, str(root / "search.py"), *arguments, *extra],
            check=True,
            env={**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return rows, json.loads((output / "search.json").read_text())


def mixture_parallel(config: SearchConfig, repeats: int) -> dict[str, float]:
    """Steps per second of two processes of one thread, each with a supernet of its own, over those of one process."""
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [*ONLY, "--threads", "1", "--mixture-size", "2", "--limit", "5120", "--epochs", "4"]

    def step_seconds(*command: Any) -> float:
        rows, _ = search_process(config, *command)
        return statistics.median(row["seconds"] / sum(row["draws"]) for row in rows[1:])

    return spread(
        "speedup",
        [
            step_seconds([sys.executable], *settings) / step_seconds(two, *settings, "--parallel", "mixture")
            for _ in range(repeats)
        ],
    )


def steadiness(config: SearchConfig) -> dict[str, list[float]]:
    """Seconds and peak memory of every epoch of a real search."""
    rows, _ = search_process(config, [sys.executable], *ONLY, "--limit", "5120", "--epochs", "10")
    return {key: [row[key] for row in rows] for key in ("seconds", "peak_memory_mib")}


def memory(config: SearchConfig) -> dict[str, int]:
    """Peak memory of a search with eight supernets on all images, evaluation included."""
    _, result = search_process(config, [sys.executable], *ONLY, "--epochs", "1", "--mixture-size", "8")
    return {"peak_memory_mib": result["peak_memory_mib"]}


def against(config: SearchConfig, repeats: int, other: Path) -> dict[str, dict[str, float]]:
    """Another checkout's real searches and ours, in turn: seconds of a step, and of evaluating and saving."""

    def measure(root: Path) -> dict[str, float]:
        settings = ["--limit", str(config.limit), "--epochs", "3", "--mixture-size", "2"]
        known = (root / "bmsn_zoo" / "config.py").read_text(encoding="utf-8")
        for name, flags in {"confirm": ["--confirm", "0"], "latency": ["--no-latency"]}.items():
            settings += flags if f"\n    {name}: " in known else []  # neither is evaluating
        rows, result = search_process(config, [sys.executable], *settings, root=root)
        steps = [row["seconds"] / sum(row["draws"]) for row in rows[1:]]
        rest = result["duration_seconds"] - sum(row["seconds"] for row in rows)
        return {"search_step": statistics.median(steps), "evaluation": rest}

    pairs = [(measure(other), measure(ROOT)) for _ in range(repeats)]
    return {
        part: {
            **spread("ratio", [theirs[part] / ours[part] for theirs, ours in pairs]),
            "their_seconds": round(statistics.median(theirs[part] for theirs, _ in pairs), 4),
            "our_seconds": round(statistics.median(ours[part] for _, ours in pairs), 4),
        }
        for part in ("search_step", "evaluation")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--label-column")
    parser.add_argument("--images", type=int, default=1280, help="training images of the timed epochs")
    parser.add_argument("--steps", type=int, default=20, help="search steps of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixed-precision", default="auto", help="that of our way; see search.py")
    parser.add_argument("--only", nargs="*", help="parts to measure, by their name in the results; all if not given")
    parser.add_argument("--against", type=Path, help="another checkout, whose searches are timed in turn with ours")
    parser.add_argument("--output", type=Path, help="results as JSON; parts that it holds already are kept")
    options = parser.parse_args()
    published = load_recipe("cifar10-resnet20-published", SearchConfig)
    about = {"dataset": options.dataset, "label_column": options.label_column, "limit": options.images}
    config = SearchConfig(**{**published, **about, "mixed_precision": options.mixed_precision})
    accelerator = runtime.start(config)
    ways = Ways(config, accelerator)
    process = ProcessPoolExecutor(
        1, get_context("spawn"), _start_plain, (config, torch.get_num_threads(), accelerator.mixed_precision)
    )
    repeats, steps, epoch_steps = options.repeats, options.steps, len(ways.weight) // config.batch_size

    def run(measure: str, way: Way, *arguments: Any) -> float:
        if way == OURS:
            return getattr(ways, measure)(way, *arguments)
        return process.submit(_run_plain, measure, (way, *arguments)).result()

    def ratio(measure: str, way: Way, *arguments: Any) -> dict[str, float]:
        return paired(repeats, lambda: run(measure, PLAIN, *arguments), lambda: run(measure, way, *arguments))

    def epoch(way: Way) -> float:
        return run("steps", way, epoch_steps) * epoch_steps + run("evaluation", way)

    def several(measure: Callable[[], float]) -> dict[str, float]:
        return spread("median", [measure() for _ in range(repeats)])

    def alone(switch: str) -> Way:
        return replace(PLAIN, **{switch: True})

    network = DefaultNetwork(ways)

    def limit() -> float:
        return run("steps", PLAIN, steps, ways.space.default_layout) / network.bare_step_seconds()

    switches = ("device_augmentation", "channels_last", "native_precision", "scoring_without_gradients")
    parts: dict[str, Callable[[], object]] = {
        "search_step": lambda: ratio("steps", OURS, steps),
        **{f"search_step_{name}_alone": lambda name=name: ratio("steps", alone(name), steps) for name in switches},
        "evaluation": lambda: ratio("evaluation", OURS, 1),
        **{
            f"evaluation_{name}_alone": lambda name=name: ratio("evaluation", alone(name), 1, 1)
            for name in (*switches[1:], "prefix_tree")
        },
        "epoch_and_evaluation": lambda: paired(repeats, lambda: epoch(PLAIN), lambda: epoch(OURS)),
        "share_of_bare_convolutions": lambda: several(network.share_of_bare_convolutions),
        "search_step_if_only_convolutions_took_time": lambda: several(limit),
        "time_of_a_step": network.profile,
        "compiled_units_speedup": lambda: several(network.compiled),
        "loading": lambda: loading(config, repeats),
        "mixture_parallel_two_processes": lambda: mixture_parallel(config, repeats),
        "steadiness": lambda: steadiness(config),
        "memory_of_eight_supernets": lambda: memory(config),
    }
    if options.against:
        parts["against"] = lambda: against(config, repeats, options.against)
    kept = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    variables = {name: value for name, value in os.environ.items() if name.startswith(("ONEDNN_", "ATEN_", "OMP_"))}
    environment = {"command": sys.argv, "variables": variables, **runtime.describe(accelerator)}
    for way in (PLAIN, OURS):
        run("steps", way, 3)
    for name in options.only if options.only is not None else parts:
        kept[name] = {"result": parts[name](), "environment": environment}
        sys.stdout.write(f"{name}: {json.dumps(kept[name]['result'])}\n")
        sys.stdout.flush()
        if options.output is not None:
            write_json(options.output, kept)


if __name__ == "__main__":
    main()
