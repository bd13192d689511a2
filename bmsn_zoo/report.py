"""Tables and pictures of a run, made from its folder alone: python -m bmsn_zoo.report RUN_FOLDER"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Entry, SearchResult, TrainResult

_HIGHLIGHT, _QUIET = "#c2410c", "#94a3b8"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def draw_search(folder: Path) -> None:
    """Draw the pictures of a finished search into its folder `pictures/`."""
    result = SearchResult.read(folder / "search.json")
    _draw_assignment(result, folder / "pictures" / "assignment.png")
    _draw_accuracy_against_macs(result, folder / "pictures" / "accuracy_macs.png")
    _draw_search_curves(_metrics(folder), folder / "pictures" / "curves.png")


def _draw_assignment(result: SearchResult, path: Path) -> None:
    layouts, matrix = result.layouts, result.assignment_matrix
    by_macs = sorted(range(len(layouts)), key=lambda i: next(
        entry.macs for entry in result.ranking if entry.layout == layouts[i]))  # fmt: skip
    figure = _figure(max(6.0, 0.22 * len(layouts) + 2), 1.2 + 0.35 * result.mixture_size + 0.8)
    axes = figure.add_subplot()
    image = axes.imshow([[matrix[i][m] for i in by_macs] for m in range(result.mixture_size)],
                        aspect="auto", cmap="viridis", vmin=0, vmax=1)  # fmt: skip
    if len(layouts) <= 80:
        axes.set_xticks(range(len(layouts)), [layouts[i] for i in by_macs], rotation=90, fontsize=7)
    axes.set_yticks(range(result.mixture_size))
    axes.set_xlabel("layout, cheapest first")
    axes.set_ylabel("supernet")
    axes.set_title("Assignment: p(supernet given layout)")
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def _draw_accuracy_against_macs(result: SearchResult, path: Path) -> None:
    figure = _figure(7, 4.6)
    axes = figure.add_subplot()

    def points(entries: Sequence[Entry]) -> tuple[list[float], list[float]]:
        return [entry.macs / 1e6 for entry in entries], [100 * entry.accuracy for entry in entries]

    front, default = result.pareto_front, result.default
    axes.scatter(*points(result.ranking), s=18, color=_QUIET, label="layouts", zorder=2)
    axes.plot(*points(front), color=_HIGHLIGHT, marker="o", markersize=4, label="Pareto front", zorder=3)
    axes.scatter(*points([default]), s=90, marker="*", color="black", label=f"default {default.layout}", zorder=4)
    for entry in front:
        at = (entry.macs / 1e6, 100 * entry.accuracy)
        axes.annotate(entry.layout, at, xytext=(4, 5), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("multiply-accumulates for one image, millions")
    axes.set_ylabel("score-split accuracy in the search, %")
    axes.set_title(f"{len(result.layouts)} layouts, best of {result.mixture_size} supernets")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _draw_search_curves(rows: list[dict[str, Any]], path: Path) -> None:
    figure = _figure(9, 3.2)
    epochs = [row["epoch"] for row in rows]
    loss, accuracy, draws = figure.subplots(1, 3)
    loss.plot(epochs, [row["loss"] for row in rows], color=_HIGHLIGHT)
    loss.set_title("training loss")
    accuracy.plot(epochs, [100 * row["score_accuracy"] for row in rows], color=_HIGHLIGHT)
    accuracy.set_title("score accuracy of the drawn layouts, %")
    for m in range(len(rows[0]["draws"])):
        draws.plot(epochs, [row["draws"][m] for row in rows], label=f"supernet {m}")
    draws.set_title("steps of each supernet")
    draws.set_ylim(bottom=0)
    if len(rows[0]["draws"]) <= 8:
        draws.legend(fontsize=6)
    for axes in (loss, accuracy, draws):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_training(folder: Path) -> None:
    """Draw the learning curves of a training into its folder `pictures/`."""
    rows = _metrics(folder)
    figure = _figure(7, 3.2)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    loss.plot(epochs, [row["loss"] for row in rows], color=_HIGHLIGHT)
    loss.set_title("training loss")
    accuracy.plot(
        epochs, [100 * row["train_accuracy"] for row in rows], color=_QUIET, label="augmented training images"
    )
    if rows[0]["holdout_accuracy"] is not None:
        held = [100 * row["holdout_accuracy"] for row in rows]
        accuracy.plot(epochs, held, color=_HIGHLIGHT, label="held-out training images")
    accuracy.set_title("accuracy, %")
    accuracy.legend(fontsize=7)
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    _save(figure, folder / "pictures" / "curves.png")


def search_table(result: SearchResult, top: int = 5) -> str:
    """The best layouts, the default one and the Pareto front as a text table."""
    rank = {entry.layout: place for place, entry in enumerate(result.ranking, 1)}

    def row(entry: Entry, note: str = "") -> str:
        return (
            f"{rank[entry.layout]:>5}  {entry.layout:<14}  {100 * entry.accuracy:>8.2f}  "
            f"{entry.macs / 1e6:>8.1f}  {note}"
        ).rstrip()

    within = result.best_within_default_macs.layout
    lines = [f"{'rank':>5}  {'layout':<14}  {'accuracy':>8}  {'MACs (M)':>8}"]
    lines += [
        row(entry, "best within the default's MACs" if entry.layout == within else "") for entry in result.ranking[:top]
    ]
    lines += [row(result.default, "default")]
    lines += ["Pareto front, cheapest first:", *(row(entry) for entry in result.pareto_front)]
    return "\n".join(lines)


def print_search(folder: Path, command: str) -> None:
    """Print what a search found and how to retrain it; `command` starts our commands."""
    result = SearchResult.read(folder / "search.json")
    script = ".py" if not command.rstrip().endswith(".") else ""
    sys.stdout.write(
        f"{len(result.layouts)} layouts, ranked by score-split accuracy (n = 1 search):\n"
        f"{search_table(result)}\n"
        f"results and pictures: {folder}\n"
        f"retrain the winner:   {command}train{script} --from-search {shlex.quote(str(folder))}\n"
    )


def print_pushed(address: str) -> None:
    """Print where a result was pushed to."""
    sys.stdout.write(f"on the Hub:           {address}\n")


def print_training(folder: Path) -> None:
    """Print what a training reached and how to load it."""
    metrics = TrainResult.read(folder / "metrics.json")
    sys.stdout.write(
        f"layout {metrics.layout}: test accuracy {100 * metrics.test_accuracy:.2f} % on "
        f"{metrics.test_images} images (n = 1, {metrics.epochs} epochs), "
        f"{metrics.macs / 1e6:.1f} M MACs, {metrics.parameters / 1e6:.2f} M parameters\n"
        f"results and pictures: {folder}\n"
        f'load it with timm:    timm.create_model("local-dir:{folder / "model"}", pretrained=True)  '
        "# after import bmsn_zoo\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures of finished runs again, and print the tables of searches."""
    for name in sys.argv[1:] if argv is None else argv:
        folder = Path(name)
        if (folder / "search.json").exists():
            draw_search(folder)
            print_search(folder, "accelerate launch -m bmsn_zoo.")
        else:
            draw_training(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
