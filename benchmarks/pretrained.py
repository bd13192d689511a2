"""A search that starts from a trained network, on few images: is what it finds better there than the default layout?

    python benchmarks/pretrained.py --dataset uoft-cs/cifar10 --output results/pretrained

From the weights of bmsn_resnet20_cifar100_default (layout 4-3-3, trained on CIFAR-100), a search starts on 5,000
images of CIFAR-10, among the layouts of up to twice the default's multiply-accumulates. Then the default layout and
what was found, the most accurate other layout of those that the search trained alone, are trained on these 5,000
images for 12 epochs: from the same weights at a learning rate of 0.01, and from scratch at 0.1, neither of them tuned.
Seeds 0, 1 and 2 draw other images and batches and, from scratch, other weights. Accuracies are of the 10,000 test
images, measured once. Runs below runs/pretrained that are finished are read instead of run again.
"""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fine_tuning import cells

from bmsn_zoo.files import read_json, write_json, write_text
from bmsn_zoo.results import SearchResult, TrainResult
from bmsn_zoo.searching import main as search
from bmsn_zoo.training import main as train

HOME = Path("runs/pretrained")
SEEDS = (0, 1, 2)
SOURCE = "bmsn_resnet20_cifar100_default"
STARTS = {"pretrained": f"--init-from {SOURCE} --lr 0.01", "scratch": "--lr 0.1"}


def run(program: str, name: str, data: str, flags: str) -> dict[str, Any]:
    """The command of a run and what it took; run unless it is finished."""
    folder, main = HOME / name, {"train.py": train, "search.py": search}[program]
    file = folder / ("metrics.json" if program == "train.py" else "search.json")
    if not file.exists():
        resume = ["--output", str(folder), *(["--resume"] if folder.exists() else [])]
        if main(["--dataset", data, *shlex.split(flags), *resume]):
            raise SystemExit(2)
    read: Callable[[Path], Any] = TrainResult.read if program == "train.py" else SearchResult.read
    found = read(file)
    about = {"command": f"{program} {flags}", "seconds": round(found.duration_seconds), "commit": found.commit}
    about |= {"hardware": found.hardware, "precision": found.precision, "versions": found.versions}
    if program == "train.py":
        return {**about, "layout": found.layout, "macs": found.macs, "accuracy": found.test_accuracy}
    assert found.confirmed
    first = next(choice.layout for choice in found.confirmed.choices if choice.layout != found.confirmed.default)
    return {**about, "verdict": found.confirmed.verdict, "found": first, "norms": found.norms}


def main() -> None:
    """Train, search, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="CIFAR-10 on the Hub, or a local copy")
    parser.add_argument("--output", type=Path, required=True, help="the record, written as .json and .md")
    given = parser.parse_args()
    record: dict[str, Any] = {}
    asked = f"--pretrained-from {SOURCE} --limit 5000 --mixture-size 2 --epochs 20 --lr 0.01 --max-macs 2x"
    record["search"] = run("search.py", "search", given.dataset, asked)
    layouts = {"default": "4-3-3", "found": record["search"]["found"]}
    for start, flags in STARTS.items():
        for what, layout in layouts.items():
            runs = []
            for seed in SEEDS:
                asked = f"{flags} --layout {layout} --limit 5000 --epochs 12 --seed {seed}"
                runs.append(run("train.py", f"{what}-{start}-{seed}", given.dataset, asked))
            record[f"{what}, {start}"] = runs
    write_json(given.output.with_suffix(".json"), record)
    write_text(given.output.with_suffix(".md"), table(given.output.with_suffix(".json")))


def table(path: Path) -> str:
    """The record as Markdown."""
    record = read_json(path)
    found = record["search"]
    lines = ["# A search from trained weights, on few images", "", *__doc__.strip().splitlines()[4:], ""]
    lines += [
        f"The search took {found['seconds']} s and says: {found['verdict']}. Its supernets' norms: {found['norms']}.",
        f"Hardware: {found['hardware']}, {found['precision']}; commit {found['commit'] or 'unknown'}. Seconds are of a",
        "machine that did other work, too.",
        "",
        "| layout | multiply-accumulates | start | test accuracy, % | mean and deviation | 95 % | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for what in ("default", "found"):
        for start in STARTS:
            runs = record[f"{what}, {start}"]
            values = [100 * each["accuracy"] for each in runs]
            seconds = ", ".join(str(each["seconds"]) for each in runs)
            about = f"{what}, {runs[0]['layout']} | {runs[0]['macs'] / 1e6:.1f} M | {start}"
            lines.append(f"| {about} | {cells(values)} | {seconds} |")
    runs = [run for what in ("default", "found") for start in STARTS for run in record[f"{what}, {start}"]]
    return "\n".join([*lines, "", "```bash", *(run["command"] for run in (found, *runs)), "```"]) + "\n"


if __name__ == "__main__":
    main()
