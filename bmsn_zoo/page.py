"""Runs as one HTML page that needs no network: what was found, what it costs, and what to do next."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from operator import ne
from pathlib import Path
from statistics import mean
from typing import Any

from .axis import Axis
from .card import percent, template_environment
from .compare import compare_runs
from .epochs import SearchEpoch, TrainEpoch, search_curves, train_curves
from .files import write_text
from .layout import Layout
from .ranking import spread, tied
from .results import Entry, Run, SearchResult, TrainResult, pareto_front
from .search_space import backbone_of
from .usage import start_of

_ROWS = 1000  # layouts that the tables and charts of a page show, the best ones
_COLUMNS = 80  # layouts of an assignment that can be told apart
_POINTS = 300  # of a curve
_CURVES = 16


def _curves(title: str, epochs: Sequence[int], lines: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A chart of lines over epochs; of many epochs or lines only some."""
    every, shown = -(-len(epochs) // _POINTS), dict(list(lines.items())[:_CURVES])
    x = Axis.of(epochs, 50, 312)
    y = Axis.of((value for values in shown.values() for value in values), 166, 10)
    paths = {
        name: " ".join(f"{x.at(e)},{y.at(v)}" for e, v in list(zip(epochs, values, strict=True))[::every])
        for name, values in shown.items()
    }
    return {"title": title, "x": x, "y": y, "lines": paths, "last": {name: shown[name][-1] for name in shown}}


def stairs(layout: str, model: str, image_size: int) -> dict[str, Any]:
    """A layout as a staircase: the side of the feature maps in pixels, unit by unit, each halving a step down."""
    parsed = Layout.parse(layout)
    sides = backbone_of(model).resolutions(parsed, image_size)
    width, steps, unit = 140 / len(sides), [], 0
    for scale, units in enumerate(parsed.units_per_scale):
        height = 60 * (1 - scale / parsed.num_scales)
        steps.append((round(unit * width, 1), round(74 - height, 1), round(units * width - 1, 1), height, sides[unit]))
        unit += units
    return {"layout": layout, "steps": steps, "units": len(sides)}


def _costs(
    result: SearchResult, kept: Sequence[Entry], label: str, price: Callable[[Entry], float], most: int
) -> dict[str, Any]:
    """A chart of accuracy against a price; `kept` are the layouts that it shows, `most` how many of its front."""
    front, default = pareto_front(result.ranking, price)[:most], result.default
    x = Axis.of((price(entry) for entry in (*kept, *front)), 44, 408, log=True)
    y = Axis.of((100 * entry.accuracy for entry in (*kept, *front)), 258, 12)

    def spot(entry: Entry) -> tuple[float, float, str]:
        return (
            x.at(price(entry)),
            y.at(100 * entry.accuracy),
            f"{entry.layout}: {price(entry):.4g}, {percent(entry.accuracy)}",
        )

    labels: list[tuple[float, float, str]] = []  # above the front, where no point is
    for entry in reversed(front):
        right, bottom, width = x.at(price(entry)) - 6, y.at(100 * entry.accuracy) - 5, 6.2 * len(entry.layout)
        clear = all(right < r - 6.2 * len(text) or r < right - width or abs(bottom - b) > 12 for r, b, text in labels)
        if clear and right - width > 46 and bottom > 20:
            labels.append((right, bottom, entry.layout))
    within = next((e for e in result.ranking if default and price(e) <= price(default)), None)
    marks = [(mark, spot(entry)) for mark, entry in (("within", within), ("default", default)) if entry]
    return {"label": label, "x": x, "y": y, "labels": labels, "marks": marks, "within": within, "entries": front,
            "front": [spot(entry) for entry in front], "points": [spot(e) for e in kept if e not in front]}  # fmt: skip


def _search(folder: Path, result: SearchResult, rows: Sequence[SearchEpoch], most: int) -> dict[str, Any]:
    """What the page shows of a search; `rows` are its epochs, `most` how many layouts."""
    ranking, images = result.ranking[:most], result.dataset.score_images
    kept = list({entry.layout: entry for entry in (*ranking, *result.pareto_front[:most])}.values())
    kept += [entry for entry in (result.default, result.best_within_default_macs) if entry and entry not in kept]
    costs = [_costs(result, kept, label, price, most) for label, price in result.prices().items()]
    best, default = result.best, result.default
    shares = dict(zip(result.layouts, result.assignment_matrix or [], strict=False))
    columns = sorted(ranking[:_COLUMNS], key=lambda entry: entry.macs) if shares else []
    epochs = [row.epoch for row in rows]
    charts = [_curves(title, epochs, lines) for title, lines in search_curves(rows).items() if rows]
    if len(rows) > 1 and result.mixture_size > 1 and all(row.assigned for row in rows):
        homes = {f"supernet {m}": [row.assigned.count(m) for row in rows] for m in range(result.mixture_size)}
        charts.append(_curves("layouts assigned to each supernet", epochs, homes))
        moved = [sum(map(ne, a.assigned, b.assigned)) for a, b in pairwise(rows)]
        charts.append(_curves("layouts that changed supernet", epochs[1:], {"since the epoch before": moved}))
    train, quoted = start_of("train"), shlex.quote(str(folder))
    picks = ["best"] if result.confirmed or not result.undecided else []
    picks += ["best_within_default_macs", "default"] if default else []
    return {
        "kind": "search", "folder": folder, "result": result, "ranking": ranking, "costs": costs, "images": images,
        "charts": charts,
        "matrix": [(entry.layout, shares[entry.layout]) for entry in columns],
        "front": {entry.layout for entry in result.pareto_front},
        "ties": {entry.layout for entry in kept if tied(result, entry, images)},
        "gain": default and (best.accuracy - default.accuracy, spread(default.accuracy, best.accuracy, images)),
        "stairs": {e.layout: stairs(e.layout, result.model, result.dataset.image_size)
                   for e in (*result.pareto_front[:60], *([default] if default else []))},
        "commands": [f"{train} --from-search {quoted} --pick {pick}" for pick in picks]
        + [f"{start_of('hub')} push {quoted} USER/REPO"],
    }  # fmt: skip


def _training(folder: Path, result: Any, rows: Sequence[TrainEpoch]) -> dict[str, Any]:
    """What the page shows of a training or a trial."""
    test = hasattr(result, "test_accuracy")
    accuracy = result.test_accuracy if test else result.holdout_accuracy
    epochs, usual = [row.epoch for row in rows], str(backbone_of(result.model).default_layout)
    layouts = dict.fromkeys((result.layout, usual))
    quoted, again = shlex.quote(str(folder)), [f"{start_of('train')} --output {shlex.quote(str(folder))} --resume"]
    return {
        "kind": "training", "folder": folder, "result": result, "accuracy": accuracy, "usual": usual,
        "images": result.test_images if test else result.holdout_images,
        "measured_on": "test images" if test else "held-out training images",
        "charts": [_curves(title, epochs, lines) for title, lines in train_curves(rows).items()],
        "stairs": {layout: stairs(layout, result.model, result.dataset.image_size) for layout in layouts},
        "commands": [f"{start_of('predict')} {quoted} photo.jpg", f"{start_of('evaluate')} {quoted}",
                     f"{start_of('hub')} push {quoted} USER/REPO"] if test else again,
    }  # fmt: skip


def _classes(results: Iterable[Run]) -> dict[str, Any] | None:
    """Every class under the first layout trained that is not the default, against the default; seeds of each together.

    Only trainings that were measured on the same test images; None unless both layouts are among them.
    """
    known = [result for result in results if isinstance(result, TrainResult) and result.class_right]
    usual = {result.model: str(backbone_of(result.model).default_layout) for result in known}
    other = next((result for result in known if result.layout != usual[result.model]), None)
    if other is None:
        return None

    def of(layout: str) -> list[TrainResult]:
        data = (other.model, other.dataset.test_fingerprint, other.dataset.label_names)
        same = [r for r in known if (r.model, r.dataset.test_fingerprint, r.dataset.label_names) == data]
        return [result for result in same if result.layout == layout]

    names, groups = other.dataset.label_names, [of(other.layout), of(usual[other.model])]
    if not groups[1]:
        return None
    rows, confused = [], list[dict[tuple[int, int], float]]()
    for index, name in enumerate(names):
        shares = []
        for group in groups:
            images = sum((result.class_images or [])[index] for result in group)
            shares.append((sum((result.class_right or [])[index] for result in group) / max(1, images), images))
        (found, n), (default, m) = shares
        if n and m:
            rows.append((name, found, default, found - default, spread(found, default, n, m)))
    for group in groups:
        pairs: dict[tuple[int, int], float] = {}
        for result in group:
            for here, there, images in result.confused:
                pairs[here, there] = pairs.get((here, there), 0.0) + images / len(group)
        confused.append(pairs)
    most = sorted({*confused[0], *confused[1]}, key=lambda pair: -sum(each.get(pair, 0) for each in confused))[:10]
    return {
        "layouts": [group[0].layout for group in groups],
        "runs": [len(group) for group in groups],
        "rows": sorted(rows, key=lambda row: -row[3])[:_ROWS],
        "confused": [(names[a], names[b], *(each.get((a, b)) for each in confused)) for a, b in most],
    }


def write_page(runs: Sequence[tuple[Path, Run, Sequence[Any]]], path: Path) -> None:
    """Write the page of some runs.

    Args:
        runs: folder, result, and its epochs (see `epochs`), of each.
        path: the file to write.
    """
    parts, most = [], max(50, _ROWS // len(runs))
    for folder, result, rows in runs:
        parts.append(
            _search(folder, result, rows, most) if isinstance(result, SearchResult) else _training(folder, result, rows)
        )
    searches = [part for part in parts if part["kind"] == "search"]
    compared, ranks = [], []
    if len(searches) > 1:
        compared = compare_runs([str(part["folder"]) for part in searches])
        results = [part["result"] for part in searches]
        if len({(result.model, *result.layouts) for result in results}) == 1:
            places = [{e.layout: place for place, e in enumerate(result.ranking, 1)} for result in results]
            ranks = [(layout, [place[layout] for place in places]) for layout in results[0].layouts]
            ranks = sorted(ranks, key=lambda row: mean(row[1]))[:30]
    page = template_environment(autoescape=True).get_template("report.html.j2")
    classes = _classes(result for _, result, _ in runs)
    write_text(path, page.render(parts=parts, compared=compared, ranks=ranks, classes=classes))
