"""Measures published accuracies again: a model of the zoo, or any model folder, on the test images of its data set."""

import csv
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import runtime
from .card import interval, percent
from .command import run_command
from .config import TrainConfig, build_config, with_reachable_data
from .data import ORDER, DataSource, ImageSet, even_batches, normalise, random_stream
from .errors import InputError
from .files import read_text, write_csv
from .model_folder import load_model, model_folder
from .report import draw_confusion
from .results import TrainResult
from .usage import parser_of

_log = logging.getLogger(__name__)
_EVAL_BATCH = 250
_COLUMNS = ["model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation"]
_CLASS_COLUMNS = ["class", "images", "accuracy", "low", "high", "most_often_taken_for", "how_often"]
_CONFUSED = 300  # pairs of classes that a result holds


@torch.no_grad()
@runtime.full_float32()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    mean: Sequence[float],
    std: Sequence[float],
    accelerator: Accelerator,
    best: Tensor | None = None,
) -> dict[str, float]:
    """Accuracy (a fraction) and mean cross-entropy (nats) of a network on all images of a split.

    Args:
        model: on the accelerator's device; left in evaluation mode.
        images: the split; every process takes some of its batches.
        mean: of every channel, a fraction of full brightness.
        std: of every channel.
        accelerator: whose device and processes to use.
        best: zeros (N, k) on its device, int64, which become the k most probable classes of an image, best first.
    """
    model.eval()
    order = even_batches(len(images), _EVAL_BATCH, random_stream(0, ORDER))
    order = order[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(2, dtype=torch.float32, device=accelerator.device)
    for positions, (pixels, labels) in zip(order, images.batches(order, accelerator.device), strict=True):
        logits = model(normalise(pixels, mean, std)).float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        first = logits.topk(1 if best is None else best.shape[1]).indices
        sums += torch.stack([(first[:, 0] == labels).sum(), loss])
        if best is not None:
            best[torch.from_numpy(positions).to(best.device)] = first
    if best is not None:
        best.copy_(accelerator.reduce(best, "sum"))
    correct, loss = accelerator.reduce(sums, "sum").tolist()
    return {"accuracy": correct / len(images), "loss": loss / len(images)}


def count_classes(labels: Tensor, found: Tensor, classes: int) -> dict[str, Any]:
    """How the images of every class fared, as `TrainResult` holds it.

    Args:
        labels: of the images, (N,).
        found: their most probable classes, (N,).
        classes: how many there are.
    """
    wrong, right = labels != found, torch.bincount(labels[labels == found], minlength=classes)
    pairs, counts = (labels * classes + found)[wrong].unique(return_counts=True)
    most = sorted(zip((-counts).tolist(), pairs.tolist(), strict=True))[:_CONFUSED]
    return {
        "class_images": torch.bincount(labels, minlength=classes).tolist(),
        "class_right": right.tolist(),
        "confused": [[pair // classes, pair % classes, -count] for count, pair in most],
    }


def measure(name: str, dataset: str | None = None) -> dict[str, Any]:
    """Measure a published accuracy again, in float32, on the test images that its metrics.json names.

    Args:
        name: a model of the zoo, a model folder, or the run folder of a training.
        dataset: where its data set is, if not where it was trained from: a Hub id, or a local folder.

    Returns:
        `accuracy` as measured and `recorded` in metrics.json and `top5`, fractions; `images`, their number; `classes`,
        the names of K classes; `confusion`, how many images of each class (rows) were taken for each (K, K); and
        `row`, what timm's tables of results say of a model.

    Raises:
        InputError: if there is no such model, or its data set cannot be read.
    """
    folder = model_folder(name)
    model = load_model(folder)
    result = TrainResult.read(folder / "metrics.json")
    settings = {**with_reachable_data(result.settings), "limit": None, "mixed_precision": "no"}
    settings |= {"dataset": dataset or settings["dataset"], "image_size": result.dataset.image_size}
    settings["crop_pct"] = result.dataset.crop_pct
    config = build_config(TrainConfig, settings)
    accelerator = runtime.start(config)
    test = DataSource(config, torch.get_num_threads()).test()
    if test.fingerprint != result.dataset.test_fingerprint:
        _log.warning("%s: these are not the test images that it was measured on", name)
    cfg: Any = model.pretrained_cfg
    known, found = result.dataset.label_names, test.label_names
    if len(known) != len(found):
        raise InputError(f"{name} knows {len(known)} classes, {config.dataset} has {len(found)}")
    for index, (ours, theirs) in enumerate(zip(known, found, strict=True)):
        if ours != theirs:
            raise InputError(f"{name} knows class {index} as {ours!r}, {config.dataset} as {theirs!r}: rename it there")
    best = torch.zeros(len(test.images), min(5, len(known)), dtype=torch.int64, device=accelerator.device)
    network = model.to(accelerator.device)
    measured = evaluate(network, test.images, cfg["mean"], cfg["std"], accelerator, best=best)
    labels, best = test.images.labels.cpu(), best.cpu()
    pairs = torch.bincount(labels * len(known) + best[:, 0], minlength=len(known) ** 2)
    shares = measured["accuracy"], float((best == labels[:, None]).any(1).float().mean())
    top1, error1, top5, error5 = (f"{100 * value:.3f}" for share in shares for value in (share, 1 - share))
    about = Path(name).name, cfg["input_size"][-1], top1, error1, top5, error5, f"{result.parameters / 1e6:.2f}"
    return {
        "accuracy": measured["accuracy"],
        "recorded": result.test_accuracy,
        "top5": shares[1],
        "row": dict(zip(_COLUMNS, map(str, (*about, cfg["crop_pct"], cfg["interpolation"])), strict=True)),
        "images": len(test.images),
        "classes": known,
        "confusion": pairs.view(len(known), len(known)),
    }


def write_classes(found: dict[str, Any], folder: Path) -> None:
    """Write the accuracy of every class, with what it is most often taken for, as classes.csv and confusion.png.

    Args:
        found: as `measure` returns it.
        folder: made if needed.
    """
    classes, confusion = found["classes"], found["confusion"]
    rows = []
    for index, (name, row) in enumerate(zip(classes, confusion.tolist(), strict=True)):
        number, right = sum(row), row[index]
        row[index] = -1
        other = max(range(len(row)), key=row.__getitem__)
        known = [right / number, *interval(right / number, number)] if number else [""] * 3
        cells = name, number, *known, *((classes[other], row[other]) if row[other] > 0 else ("", 0))
        rows.append(dict(zip(_CLASS_COLUMNS, cells, strict=True)))
    write_csv(folder / "classes.csv", rows)
    draw_confusion(confusion, classes, folder / "confusion.png")


def add_result(row: dict[str, str], path: Path) -> None:
    """Put a row of `measure` into a CSV file, made if needed, in which a model has one row; the best stand first.

    Raises:
        InputError: if the file has other columns.
    """
    known = csv.DictReader(io.StringIO(read_text(path) if path.exists() else ",".join(_COLUMNS)))
    if known.fieldnames != _COLUMNS:
        raise InputError(f"results-file {path} has other columns than {','.join(_COLUMNS)}: choose another file")
    rows = [row, *(each for each in known if each["model"] != row["model"])]
    write_csv(path, sorted(rows, key=lambda each: (each["top1_err"].zfill(9), each["model"])))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("evaluate")

    def run() -> None:
        given = parser.parse_args(argv)
        found = measure(given.model, given.dataset)
        sys.stdout.write(
            f"{given.model}: {percent(found['accuracy'])} of {found['images']} test images are classified correctly, "
            f"{percent(found['recorded'])} by its record\n"
        )
        low, high = interval(found["accuracy"], found["images"])
        sys.stdout.write(f"95 % interval {percent(low)} to {percent(high)}; ")
        sys.stdout.write(f"{percent(found['top5'])} are among the first {min(5, len(found['classes']))} labels\n")
        if given.results_file:
            add_result(found["row"], given.results_file)
        if given.output:
            write_classes(found, given.output)
            sys.stdout.write(f"every class: {given.output / 'classes.csv'}, {given.output / 'confusion.png'}\n")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
