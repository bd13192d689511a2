"""Tables and pictures of a run, made from its folder alone: python -m bmsn_zoo.report RUN_FOLDER"""

import io
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .card import PICTURE, percent, ranked_rows
from .command import run_command
from .config import DataConfig
from .epochs import Epoch, read_search_epochs, read_train_epochs, search_curves, train_curves
from .errors import InputError
from .layout import Layout
from .progress import duration
from .ranking import standard_error, tied
from .results import Confirmation, Entry, Run, SearchResult, TrainResult, TrialResult, pareto_front
from .search_space import backbone_of
from .usage import parser_of, start_of, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIGHLIGHT, _QUIET = "#c2410c", "#94a3b8"
_BELOW: dict[str, Any] = dict(
    loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8, frameon=False, markerscale=0.7
)
_NAMES = {
    "default": "train the default",
    "best_within_default_macs": "the best within the default's cost",
    "best": "the best",
}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _save(figure: "Figure", path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    figure.savefig(drawn := io.BytesIO())
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes


def _draw_curves(axes: Any, epochs: Sequence[Epoch], title: str, **curves: Sequence[float]) -> None:
    """Lines over epochs, named in a legend if there are several."""
    for name, values in curves.items():
        color = _HIGHLIGHT if len(curves) == 1 else None
        axes.plot([row.epoch for row in epochs], values, color=color, label=name.replace("_", " "))
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    if 1 < len(curves) <= 8:
        axes.legend(fontsize=7)


def draw_search(folder: Path) -> None:
    """Draw the pictures of a finished search into its folder `pictures/`."""
    result, pictures = SearchResult.read(folder / "search.json"), folder / "pictures"
    if "trials" not in result.details:  # else layouts were trained alone: no supernets to show
        curves = draw_search_curves(result, folder)
        if result.assignment_matrix is not None:
            _save(draw_assignment(result), pictures / "assignment.png")
        _save(curves, pictures / "curves.png")
    _save(draw_accuracy_macs(result), pictures / "accuracy_macs.png")


def draw_search_curves(result: SearchResult, folder: Path) -> "Figure":
    """Loss and accuracy over a search's epochs, and the steps of several supernets; metrics.jsonl is in `folder`."""
    if "trials" in result.details:
        raise InputError("this search trained layouts alone: see the curves of its trials")
    rows = read_search_epochs(folder)
    charts = search_curves(rows)
    figure = _figure(9 if len(charts) > 2 else 7, 3.2)
    panels = figure.subplots(1, len(charts))
    for axes, (title, lines) in zip(panels, charts.items(), strict=True):
        _draw_curves(axes, rows, title, **lines)
    if len(charts) > 2:
        panels[2].set_ylim(bottom=0)  # steps
    figure.suptitle(_subject(result), fontsize=10)
    return figure


def _subject(result: Run) -> str:
    """Data set and seed, for a title that fits its picture."""
    name = result.dataset.id.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return f"{name[:30]}, seed {result.seed}".replace("$", r"\$")


def draw_assignment(result: SearchResult) -> "Figure":
    """Which supernet each layout is assigned to at the end of a search, cheapest layout first."""
    if (matrix := result.assignment_matrix) is None:
        raise InputError("this search assigned no layouts to supernets: there is no picture of that")
    macs = {entry.layout: entry.macs for entry in result.ranking}
    rows = sorted(zip(result.layouts, matrix, strict=True), key=lambda row: macs[row[0]])
    figure = _figure(max(6.0, 0.22 * len(rows) + 2), 1.2 + 0.35 * result.mixture_size + 0.8)
    axes = figure.add_subplot()
    columns = list(zip(*(shares for _, shares in rows), strict=True))
    image = axes.imshow(columns, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    if len(rows) <= 80:
        axes.set_xticks(range(len(rows)), [layout for layout, _ in rows], rotation=90, fontsize=7)
    axes.set_yticks(range(result.mixture_size))
    axes.set_xlabel("layout, cheapest first")
    axes.set_ylabel("supernet")
    axes.set_title(f"{_subject(result)}: p(supernet given layout)", fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure


def draw_accuracy_macs(result: SearchResult) -> "Figure":
    """All layouts of a search by cost and accuracy, with the Pareto front, the default and the best within its cost.

    The cost is multiply-accumulates, and, where it was measured, beside it the latency.
    """
    prices = result.prices()
    figure = _figure(7 if len(prices) == 1 else 12, 4.6)
    for axes, (label, price) in zip(figure.subplots(1, len(prices), squeeze=False)[0], prices.items(), strict=True):
        _draw_accuracy_against(axes, result, label, price)
    several = f"best of {result.mixture_size} supernets" if result.mixture_size > 1 else "one supernet"
    how = "trained alone" if "trials" in result.details else several
    verdict = f"\n{result.confirmed.verdict}" if result.confirmed else ""
    figure.suptitle(f"{_subject(result)}: {len(result.layouts)} layouts, {how}{verdict}", fontsize=10)
    return figure


def _draw_accuracy_against(
    axes: Any, result: SearchResult, label: str, price: Callable[[Entry], float], shown: str = ""
) -> None:
    """`shown` is a layout to mark."""
    from matplotlib.ticker import NullLocator

    from .axis import Axis

    def points(entries: Sequence[Entry]) -> tuple[list[float], list[float]]:
        return [price(entry) for entry in entries], [100 * entry.accuracy for entry in entries]

    front, default = pareto_front(result.ranking, price), result.default
    axes.scatter(*points(result.ranking), s=18, color=_QUIET, label="layouts", zorder=2)
    errors = [100 * standard_error(entry.accuracy, result.dataset.score_images) for entry in front]
    line: dict[str, Any] = dict(
        color=_HIGHLIGHT, marker="o", markersize=4, elinewidth=0.7, capsize=2, ecolor="#c2410c99", zorder=3
    )
    axes.errorbar(*points(front), errors, label="Pareto front, ± standard error", **line)
    if default:
        axes.scatter(*points([default]), s=90, marker="*", color="black", label=f"default {default.layout}", zorder=4)
        axes.axvline(price(default), color="black", linewidth=0.8, linestyle="--", label="its cost", zorder=1)
        within = next(entry for entry in result.ranking if price(entry) <= price(default))
        ring: dict[str, Any] = dict(facecolors="none", edgecolors="#1d4ed8", linewidths=1.5)
        axes.scatter(*points([within]), s=130, label="best within it", zorder=5, **ring)
    if shown:
        box: dict[str, Any] = dict(facecolors="none", edgecolors="#047857", linewidths=1.5, marker="s")
        axes.scatter(*points([result.pick(shown)]), s=170, label=f"this model, {shown}", zorder=6, **box)
    scale = Axis.of(map(price, result.ranking), 0, 1, log=True)
    axes.set_xscale("log" if scale.log else "linear")
    axes.set_xticks(scale.ticks)
    axes.set_xlim(scale.low * (1 - 0.12 * (1 - scale.low / scale.high)), scale.high)  # room for labels
    spots: list[Any] = []
    for entry in reversed(front):
        at = (price(entry), 100 * entry.accuracy)
        spot = axes.transAxes.inverted().transform(axes.transData.transform(at))
        if all(abs(spot[0] - x) > 0.11 or abs(spot[1] - y) > 0.035 for x, y in spots):
            spots.append(spot)
            axes.annotate(entry.layout, at, xytext=(-8, 4), textcoords="offset points", fontsize=7, ha="right")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.set_ylabel("score-split accuracy in the search, %")
    axes.margins(y=0.08)
    axes.grid(alpha=0.3)
    axes.legend(**_BELOW)


def draw_training(folder: Path) -> None:
    """Draw the learning curves of a training into its folder `pictures/`."""
    _save(draw_training_curves(folder), folder / "pictures" / "curves.png")


def draw_training_curves(folder: Path) -> "Figure":
    """Loss and accuracies over the epochs of the training in a folder."""
    rows, figure = read_train_epochs(folder), _figure(7, 3.2)
    charts = train_curves(rows)
    for axes, (title, lines) in zip(figure.subplots(1, len(charts)), charts.items(), strict=True):
        _draw_curves(axes, rows, title, **lines)
    return figure


def draw_model(folder: Path) -> None:
    """Draw layout.png of a model folder: where its network downsamples, and, beside it, where its search saw it."""
    result, file = TrainResult.read(folder / "metrics.json"), folder / "search.json"
    search = SearchResult.read(file) if file.exists() else None
    backbone, size = backbone_of(result.model), result.dataset.image_size
    sides = {one: backbone.resolutions(one, size) for one in (Layout.parse(result.layout), backbone.default_layout)}
    figure = _figure(10 if search else 5, 4.2)
    panels = figure.subplots(1, 2 if search else 1, squeeze=False)[0]
    stairs = panels[0]
    for layout, steps in sides.items():
        name = f"{layout}{', the default' * (layout == backbone.default_layout)}"
        if str(layout) == result.layout:
            stairs.bar(range(len(steps)), steps, 0.9, align="edge", color=_HIGHLIGHT, label=name)
        else:
            stairs.stairs(steps, color="black", linestyle="--", linewidth=1.5, label=name, zorder=3)
    ticks = sorted({side for steps in sides.values() for side in steps})
    stairs.set_yscale("log", base=2)
    stairs.set_ylim(ticks[0] / 2, ticks[-1] * 1.2)
    stairs.set_yticks(ticks, [f"{side} px" for side in ticks])
    stairs.set_xlabel("units, from the image to the classifier")
    stairs.set_title("side of the feature maps")
    stairs.legend(**_BELOW)
    if search:
        label, price = next(iter(search.prices().items()))
        _draw_accuracy_against(panels[1], search, label, price, result.layout)
        panels[1].set_title(f"all {len(search.layouts)} layouts in its search")
    figure.suptitle(f"{result.model} {result.layout} on {_subject(result)}", fontsize=10)
    _save(figure, folder / PICTURE)


def draw_confusion(confusion: Any, classes: Sequence[str], path: Path) -> None:
    """Draw which classes are taken for which, as shares of each class's images; `confusion` counts them, (K, K)."""
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    figure = _figure(*[max(4.5, min(14, 0.3 * len(classes) + 2))] * 2)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    if len(classes) <= 60:
        names = [name.replace("$", r"\$")[:24] for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.set_title("Share of each class's test images")
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, path)


def search_table(result: SearchResult, top: int = 5) -> str:
    """The best layouts, the default one and the Pareto front as a text table; every layout once in each part."""

    images, latency = result.dataset.score_images, result.latency

    def row(place: int, entry: Entry, note: str = "") -> str:
        accuracy = f"{percent(entry.accuracy):>8} ± {100 * standard_error(entry.accuracy, images):.2f}"
        took = f"  {latency.single.of(entry.layout):>7.2f}" if latency else ""
        tie, note = tied(result, entry, images), note.replace("best within the default's MACs", "best within its MACs")
        note = ("~ " * tie + note).strip()
        return f"{place:>5}  {entry.layout:<12}  {accuracy:>15}  {entry.macs / 1e6:>8.1f}{took}  {note}".rstrip()

    rows = [
        f"{'rank':>5}  {'layout':<12}  {'accuracy':>15}  {'MACs (M)':>8}" + (f"  {'ms':>7}" if latency else ""),
        *(row(*found) for found in ranked_rows(result, top)),
        "Pareto front, cheapest first:",
        *(row(result.place(entry.layout), entry) for entry in result.pareto_front),
    ]
    rows += ["~ a tie with the first"] * any("  ~" in each for each in rows)
    if latency:
        rows.append(f"ms: one image, {latency.where}; whole networks {latency.single.off} the sums")
    return "\n".join(rows)


def print_search(folder: Path) -> None:
    """Print what a search found, and three commands to go on with, each with its cost and evidence."""
    result = SearchResult.read(folder / "search.json")
    verdict = confirmation_table(result.confirmed) if result.confirmed else ""
    if result.undecided and not result.confirmed:
        kept = f": keep the default {result.default.layout}" if result.default else ""
        verdict = f"no winner: {result.undecided}{kept}\n"
    sys.stdout.write(
        f"{len(result.layouts)} layouts, ranked by {result.ranked_by} (n = 1 search):\n"
        f"{search_table(result)}\n{verdict}"
        f"results and pictures: {folder}\n"
    )
    if result.confirmed and not result.confirmed.abstains:
        again = f"{start_of('compare')} --layouts default,best --seeds 3 --from-search {shlex.quote(str(folder))}"
        sys.stdout.write(f"p is of one seed; to try more:\n{wrapped(again)}\n")
    for pick, name in _NAMES.items():
        if pick == "best" or result.default:
            command = f"{start_of('train')} --from-search {shlex.quote(str(folder))}"
            command += "" if pick == "best" else f" --pick {pick}"
            sys.stdout.write(f"{name}:\n{wrapped(command)}\n    {_evidence(result, pick)}\n")


def confirmation_table(confirmed: Confirmation) -> str:
    """The choices of a search that were trained alone, as a text table, and what they show."""
    choices, epochs = len(confirmed.choices), confirmed.epochs
    lines = [f"{choices} of them trained alone, {confirmed.start}, for {epochs} epochs (the same score images):"]
    for choice in confirmed.choices:
        error = standard_error(choice.accuracy, choice.images)
        tested = "default" if choice.p_value is None else f"p = {choice.p_value:.2g}"
        accuracy = f"{percent(choice.accuracy)} ± {100 * error:.2f}"
        lines.append(f"{'':>5}  {choice.layout:<14}  {accuracy}  {choice.macs / 1e6:>8.1f}  {tested}")
    lines += [line for line in (confirmed.verdict, confirmed.cheaper_tie) if line]
    return "\n".join(lines) + "\n"


def _evidence(result: SearchResult, pick: str) -> str:
    """Which layout a choice is, what it costs, and what is known of it."""
    entry = result.to_train(pick)
    cost = f"{entry.macs / 1e6:.1f} M MACs"
    if result.default:
        cost += f", {entry.macs / result.default.macs:.2f} x the default's"
    if result.latency:
        cost += f", {result.latency.single.of(entry.layout):.2f} ms"
    known = f"{percent(entry.accuracy)} in the search, not confirmed"
    if choice := result.trained_alone(entry.layout):
        known = f"{percent(choice.accuracy)} ± {100 * standard_error(choice.accuracy, choice.images):.2f} alone"
    if pick != "default" and result.default and entry.layout == result.default.layout:
        return f"{entry.layout}, the default: nothing else is shown to be better"
    return f"{entry.layout}, {cost}, {known}"


def print_dry_run(config: DataConfig, layouts: str, seconds: float, memory: int | None) -> None:
    """Print the settings of a run that was tried, its layouts, and what a few steps say of its time and memory."""
    sys.stdout.write(
        f"{yaml.safe_dump(config.as_dict(), sort_keys=False)}\n"
        f"layouts:  {layouts}\ntime:     about {duration(seconds)} for all of it\n"
        f"memory:   {'unknown' if memory is None else f'{memory:,} MiB'} at the most, after a few steps\n"
        "a dry run: nothing is written\n"
    )


def print_pushed(address: str) -> None:
    """Print where a result was pushed to."""
    sys.stdout.write(f"on the Hub:           {address}\n")


def print_training(folder: Path) -> None:
    """Print what a training reached and how to load it."""
    if (folder / "trial.json").exists():
        trial = TrialResult.read(folder / "trial.json")
        images, error = trial.holdout_images, standard_error(trial.holdout_accuracy, trial.holdout_images)
        sys.stdout.write(
            f"layout {trial.layout}: accuracy {percent(trial.holdout_accuracy)} ± {100 * error:.2f} on {images} "
            f"held-out training images (no test accuracy), {trial.epochs} epochs\nresult: {folder}\n"
        )
        return
    metrics = TrainResult.read(folder / "metrics.json")
    sys.stdout.write(
        f"layout {metrics.layout}: test accuracy {percent(metrics.test_accuracy)} on "
        f"{metrics.test_images} images (n = 1, {metrics.epochs} epochs), "
        f"{metrics.macs / 1e6:.1f} M MACs, {metrics.parameters / 1e6:.2f} M parameters\n"
        f"results and pictures: {folder}\n"
        f'load it with timm, after import bmsn_zoo:\n    timm.create_model("local-dir:{folder / "model"}", '
        "pretrained=True)\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("report")

    def run() -> None:
        from .page import write_page  # a search, which prints its table by this module, starts without it

        given, runs = parser.parse_args(argv), list[tuple[Path, Run, list[Any]]]()
        for folder in given.run:
            kinds: dict[str, type[Run]] = {"metrics.json": TrainResult, "trial.json": TrialResult}
            kinds["search.json"] = SearchResult  # beside the others, it is where their layout comes from
            file = next((name for name in kinds if (folder / name).exists()), None)
            if file is None:
                raise InputError(f"{folder} holds no finished run: neither search.json nor metrics.json is there")
            searched = file == "search.json"
            (draw_search if searched else draw_training)(folder)
            (print_search if searched else print_training)(folder)
            result = kinds[file].read(folder / file)
            alone = isinstance(result, SearchResult) and "trials" in result.details  # whose epochs are the trials'
            followed = (folder / "metrics.jsonl").exists() and not alone
            rows = (read_search_epochs if searched else read_train_epochs)(folder) if followed else []
            runs.append((folder, result, rows))
        page = given.output or given.run[0] / "report.html"
        write_page(runs, page)
        sys.stdout.write(f"open in a browser:    {page}\n")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
