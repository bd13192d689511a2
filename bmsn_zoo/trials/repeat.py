"""Some layouts of a search trained alone with several fresh seeds, each tested against the first of them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t, ttest_1samp

from .. import runtime
from ..card import interval
from ..config import SearchConfig, TrainConfig, build_config, fit_training, with_reachable_data
from ..errors import InputError
from ..layout import Layout
from ..results import LEVEL, LatencyResult, SearchResult, TrialResult
from ..run_folder import load_tensors
from .confirm import holm, paired_tests
from .protocol import Trial
from .runner import Runner, trial_folder

_log = logging.getLogger(__name__)


def layouts_named(result: SearchResult, names: str) -> list[str]:
    """Layouts of a search by what `--layouts` says: default, within, best or layouts, with commas between them.

    Best and within are what the search confirmed; where it kept the default instead, what it had ranked first, so that
    more seeds can tell.
    """
    found = []
    for name in names.split(","):
        name = {"within": "best_within_default_macs"}.get(name.strip(), name.strip())
        entry = result.pick(name)
        found.append(getattr(result, name) if name.startswith("best") and entry == result.default else entry)
    if len(layouts := list(dict.fromkeys(entry.layout for entry in found))) < 2:
        raise InputError(f"layouts {names} are all {layouts[0]} in this search: name another one, such as 5-3-2")
    return layouts


def train_again(
    home: Path, names: str, seeds: int, epochs: int | None = None, **workers: Any
) -> tuple[list[list[str]], list[str]]:
    """Train layouts of a search on its weight split and measure them on its score split; test images stay closed.

    Trainings lie below trials/ in the search's folder: those that are finished are read, those begun go on.

    Args:
        home: run folder of the search.
        names: see `layouts_named`.
        seeds: trainings of each, with the seeds after the search's own, which its confirmation used.
        epochs: of each; as many as train.py chooses for so many images, 30 or more.
        workers: `jobs` and `cluster` of `SearchConfig`.

    Returns:
        the cells of a table, and what it shows, in lines.

    Raises:
        InputError: if `home` is no search's folder, or its layouts have no such names.
    """
    if not (home / "run.json").is_file():
        raise InputError(f"from-search {home} is no run folder: layouts are trained in that of a search on this disk")
    result = SearchResult.read(home / "search.json")
    layouts = layouts_named(result, names)
    length = epochs or fit_training(TrainConfig(), result.dataset.weight_images).epochs
    config = build_config(SearchConfig, {**with_reachable_data(dict(result.settings)), **workers})
    accelerator = runtime.start(config)
    if accelerator.num_processes > 1:
        raise InputError("compare starts its own workers: launch one process, and give --jobs")
    trials = [Trial(Layout.parse(one), result.seed + s, length) for s in range(1, seeds + 1) for one in layouts]
    # the longest first, so that no worker is left with one while the others have nothing to do
    queue = sorted(trials, key=lambda trial: -result.pick(str(trial.layout)).macs)

    def told(trial: Trial, done: TrialResult) -> None:
        _log.info("%s, seed %d: held-out accuracy %.2f %%", trial.layout, trial.seed, 100 * done.holdout_accuracy)

    with Runner(config, home, accelerator) as runner:
        runner.run(queue, told)
    masks = {
        layout: torch.stack([
            load_tensors(trial_folder(home, trial) / "right.safetensors")["right"].int()
            for trial in trials if str(trial.layout) == layout
        ])
        for layout in layouts
    }  # fmt: skip
    return _cells(masks, {layout: result.pick(layout).macs for layout in masks}, result.latency)


def _cells(
    masks: dict[str, torch.Tensor], macs: dict[str, int], latency: LatencyResult | None = None
) -> tuple[list[list[str]], list[str]]:
    """The table and its lines, from which images (seeds, N) each layout gets right, and what they cost.

    p is the larger one of two, for other images (`paired_tests`) and, of several seeds, for other seeds (Student's).
    """
    (first, base), cells, lines = next(iter(masks.items())), [], []
    seeds, images = base.shape
    tests = {layout: p for layout, (_, _, p) in paired_tests({one: mask.sum(0) for one, mask in masks.items()}).items()}
    if seeds > 1:
        by_seed = holm({layout: _students_p((masks[layout] - base).double().mean(1)) for layout in tests})
        tests = {layout: max(p, by_seed[layout]) for layout, p in tests.items()}
    for layout, mask in masks.items():
        each = (100 * mask.double().mean(1)).tolist()
        cost = f"{macs[layout] / macs[first]:.2f}"
        took = f"{latency.single.of(layout):.2f}" if latency else "-"
        row = [layout, f"{mean(each):.2f}", _spread(each, images), f"{macs[layout] / 1e6:.1f}", cost, took]
        if layout == first:
            cells.append([*row, "-", "-", "-"])
            continue
        gaps, p = (100 * (mask - base).double().mean(1)).tolist(), tests[layout]
        cells.append([*row, f"{mean(gaps):+.2f}", _spread(gaps), f"{p:.2g}"])
        shown = "ties with" if p >= LEVEL else "beats" if mean(gaps) > 0 else "is worse than"
        lines.append(f"{layout} {shown} {first}: {mean(gaps):+.2f} points at {cost} times its cost")
    head = ["layout", "accuracy", "95 %", "MACs (M)", "cost", "ms", "gain", "95 %", "p"]
    told = (
        f"{images} held-out training images, which ranked layouts in the search; n = {seeds}; test images stay closed"
    )
    timed = f"one image, {latency.where}, as the search timed it" if latency else "the search timed none (--no-latency)"
    return [head, *cells], [told, f"ms: {timed}", *lines]


def _students_p(gaps: torch.Tensor) -> float:
    """Student's two-sided p of differences over seeds, (S,): that their mean is 0."""
    if gaps.max() == gaps.min():  # has no deviation
        return float(gaps[0] == 0)
    return float(ttest_1samp(gaps.numpy(), 0).pvalue)


def _spread(values: Sequence[float], images: int | None = None) -> str:
    """95 % interval of a mean over seeds (Student); of one training's accuracy on so many images (Wilson)."""
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
        return f"{mean(values) - half:.2f} to {mean(values) + half:.2f}"
    return "{:.2f} to {:.2f}".format(*(100 * end for end in interval(values[0] / 100, images))) if images else "-"
