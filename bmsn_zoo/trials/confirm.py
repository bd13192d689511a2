"""Confirmation of a ranking: its choices are trained alone, and each is tested against the default."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from scipy.stats import binomtest
from torch import Tensor, nn

from .. import progress
from ..config import SearchConfig
from ..layout import Layout
from ..results import Choice, Confirmation, Ranking
from ..run_folder import load_tensors
from .protocol import Trial
from .runner import run_trial, trial_config, trial_folder


def confirm(
    found: Ranking,
    config: SearchConfig,
    epochs: int,
    home: Path,
    accelerator: Accelerator,
    supernets: Sequence[nn.Module],
) -> Confirmation | None:
    """Train a search's choices alone on its weight split, measure them on its score split, and test the differences.

    The choices are the default layout, the best, the best within the default's cost, then the next of the ranking. To
    be called by every process: they train together. What was trained before an interruption is read.

    Args:
        found: the ranking, which holds the default layout.
        config: of the search; `confirm` is the number of choices.
        epochs: of each, by a schedule of that length.
        home: the run folder of the search.
        accelerator: of this process.
        supernets: all of the search; each choice starts from the one that ranked it, if `confirm_from` says so.

    Returns:
        what they showed; None in processes after the first.
    """
    named = [found.default, found.best, found.best_within_default_macs, *found.ranking]
    entries = list({entry.layout: entry for entry in named if entry}.values())[: config.confirm]
    warm, right, spent, begun = config.confirm_from == "supernet", dict[str, Tensor](), 0, progress.done()
    for number, entry in enumerate(entries, 1):
        if accelerator.is_main_process:
            start = ", from its supernet" if warm else ""
            progress.tell(f"confirming {number}/{len(entries)}: {entry.layout} alone, {epochs} epochs{start}")
        trial = Trial(Layout.parse(entry.layout), config.seed, epochs)
        folder, precision = trial_folder(home, trial), accelerator.mixed_precision
        own = trial_config(config, trial, precision, torch.get_num_threads())
        result = run_trial(folder, own, supernets[entry.supernet].state_dict() if warm else None)
        if accelerator.is_main_process:
            assert result
            spent += result.spent_macs
            progress.reach(spent, begun)
            right[entry.layout] = load_tensors(folder / "right.safetensors")["right"].bool()
    if not accelerator.is_main_process:
        return None
    macs = {entry.layout: entry.macs for entry in entries}
    about = {"epochs": epochs, "from_supernet": warm, "seed": config.seed, "spent_macs": spent}
    return Confirmation.of(compare(right, macs), entries[0].layout, **about)


def compare(right: Mapping[str, Tensor], macs: Mapping[str, int]) -> list[Choice]:
    """Layouts against the first of them, see `paired_tests`.

    Args:
        right: for every layout, which images it classifies correctly, bool (N,).
        macs: multiply-accumulates of every layout.
    """
    tests = paired_tests({layout: mask.int() for layout, mask in right.items()})
    choices = []
    for layout, mask in right.items():
        better, worse, p = tests.get(layout, (0, 0, None))
        about = dict(right=int(mask.sum()), images=len(mask), macs=macs[layout], better=better, worse=worse)
        choices.append(Choice(layout=layout, p_value=p, **about))
    return choices


def paired_tests(right: Mapping[str, Tensor]) -> dict[str, tuple[int, int, float]]:
    """Layouts against the first of them, by McNemar's exact test on the same images.

    Under the hypothesis that two layouts are equally good, those images that one of them gets right with more seeds
    than the other (with one seed: alone) are either's with probability 1/2. p is two-sided, and Holm's for all
    comparisons. It speaks of these trainings on other images: what other seeds would give, one seed does not tell.

    Args:
        right: for every layout, with how many seeds each image is classified correctly, int (N,).

    Returns:
        for every layout but the first: images that it gets right with more seeds, with fewer, and p.
    """
    default, *others = right
    found = {}
    for layout in others:
        better, worse = ((right[a] > right[b]).sum().item() for a, b in ((layout, default), (default, layout)))
        p = float(binomtest(int(better), int(better + worse)).pvalue) if better + worse else 1.0
        found[layout] = int(better), int(worse), p
    corrected = holm({layout: p for layout, (_, _, p) in found.items()})
    return {layout: (better, worse, corrected[layout]) for layout, (better, worse, _) in found.items()}


def holm(found: Mapping[str, float]) -> dict[str, float]:
    """p of several comparisons, each as if it were the only one, so that any false winner has that chance."""
    corrected, highest = dict[str, float](), 0.0
    for place, name in enumerate(sorted(found, key=found.__getitem__)):
        highest = max(highest, min(1.0, (len(found) - place) * found[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in found}
