"""Fine-tuning from weights of the zoo against training from scratch, on few images of classes that those never saw.

    python benchmarks/fine_tuning.py --dataset uoft-cs/cifar10 --output results/fine_tuning

Five classes of CIFAR-10, 60 training images of each, 20 epochs, batches of 32. The learning rate of each start is the
best of three on held-out training images (seed 100); then seeds 0, 1 and 2 are trained by it, and measured once on all
test images of those classes. Runs below runs/fine_tuning that are finished are read instead of run again.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
from scipy.stats import t

from bmsn_zoo import runtime
from bmsn_zoo.config import TrainConfig
from bmsn_zoo.data.loading import load_splits
from bmsn_zoo.files import read_json, write_json, write_text
from bmsn_zoo.model_folder import model_folder
from bmsn_zoo.results import TrainResult, TrialResult
from bmsn_zoo.training import main as train

HOME = Path("runs/fine_tuning")
SOURCE = "bmsn_resnet20_cifar100"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
LAYOUT = TrainResult.read(model_folder(SOURCE) / "metrics.json").layout
STARTS = {"scratch": f"--layout {LAYOUT}", SOURCE: f"--init-from {SOURCE}"}
RATES = ("0.1", "0.03", "0.01")
SHARED = f"--dataset {HOME / 'images'} --epochs 20 --batch-size 32"
TUNING = "--limit 600 --seed 100 --holdout 0.5 --measure holdout"
SEEDS = (0, 1, 2)


def prepare(dataset: str) -> None:
    """Write the images of the five classes as a data set of its own."""
    splits, chosen = load_splits(TrainConfig(dataset=dataset))[0], {}
    for split in ("train", "test"):
        names = splits[split].features["label"].names
        rows = [row for row, label in enumerate(splits[split]["label"]) if names[label] in CLASSES]
        table = splits[split].select(rows)
        labels = [CLASSES.index(names[label]) for label in table["label"]]
        table = table.remove_columns("label").add_column("label", labels)
        chosen[split] = table.cast_column("label", datasets.ClassLabel(names=CLASSES))
    datasets.DatasetDict(chosen).save_to_disk(str(HOME / "images"))


def run(name: str, *flags: str) -> dict[str, Any]:
    """The command of a run and its accuracy; run unless it is finished."""
    folder, command = HOME / name, " ".join([SHARED, *flags])
    result: type[TrialResult] | type[TrainResult] = TrialResult if TUNING in command else TrainResult
    file = folder / ("trial.json" if result is TrialResult else "metrics.json")
    if not file.exists():
        resume = ["--output", str(folder), *(["--resume"] if folder.exists() else [])]
        if train([*shlex.split(command), *resume]):
            raise SystemExit(2)
    found = result.read(file)
    accuracy = found.test_accuracy if isinstance(found, TrainResult) else found.holdout_accuracy
    return {"command": f"train.py {command}", "accuracy": accuracy, "seconds": found.duration_seconds}


def main() -> None:
    """Prepare, tune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="CIFAR-10 on the Hub, or a local copy")
    parser.add_argument("--output", type=Path, required=True, help="the record, written as .json and .md")
    given = parser.parse_args()
    if not (HOME / "images").exists():
        prepare(given.dataset)
    record: dict[str, Any] = {}
    for start, flags in STARTS.items():
        tuned = {rate: run(f"{start}-lr{rate}", flags, f"--lr {rate}", TUNING) for rate in RATES}
        best = max(RATES, key=lambda rate: tuned[rate]["accuracy"])
        runs = [run(f"{start}-{seed}", flags, f"--lr {best} --limit 300 --seed {seed}") for seed in SEEDS]
        record[start] = {"rate": best, "tuning": tuned, "runs": runs}
    record["commit"] = runtime.commit()
    write_json(given.output.with_suffix(".json"), record)
    write_text(given.output.with_suffix(".md"), table(given.output.with_suffix(".json")))


def cells(values: Sequence[float]) -> str:
    """Cells of a table for the accuracies of several seeds, in percent: each, mean and deviation, Student's 95 %."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"{each} | {mean(values):.1f} ± {stdev(values):.1f} | {mean(values) - half:.1f} to {mean(values) + half:.1f}"


def table(path: Path) -> str:
    """The record as Markdown."""
    record = read_json(path)
    lines = ["# Fine-tuning on few images, against training from scratch", "", *__doc__.strip().splitlines()[4:], ""]
    lines += [
        f"Commit {record['commit'] or 'unknown'}.",
        "",
        "| start | rate | test accuracy, % | mean and deviation | 95 % |",
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    for start in STARTS:
        values = [100 * each["accuracy"] for each in record[start]["runs"]]
        lines.append(f"| {start} | {record[start]['rate']} | {cells(values)} |")
    commands = [
        each["command"] for start in STARTS for each in (*record[start]["tuning"].values(), *record[start]["runs"])
    ]
    return "\n".join([*lines, "", "```bash", *commands, "```"]) + "\n"


if __name__ == "__main__":
    main()
