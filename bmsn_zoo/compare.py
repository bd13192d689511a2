"""How good a ranking of layouts is, measured against the accuracies that they reach when trained alone.

python -m bmsn_zoo.compare RUN_FOLDER... compares searches; --benchmark plays them on a table of published accuracies;
--layouts trains layouts of a search with several seeds.
"""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import kendalltau

from . import benchmark, hub, reference, runtime
from .benchmark import Played
from .command import run_command
from .config import SearchConfig
from .errors import InputError
from .files import write_csv, write_text
from .layout import Layout
from .progress import Bar
from .search_space import SearchSpace
from .trials import PLANS
from .trials.repeat import train_again
from .usage import parser_of

_log = logging.getLogger(__name__)
Values = Mapping[Layout, float]
# what the benchmark plays: its name, and the settings
_PLAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("uniform", {"strategy": "uniform", "mixture_size": 1}),
    ("uniform, in rounds", {"strategy": "uniform", "mixture_size": 1, "draws": "permutation"}),
    ("boltzmann", {"strategy": "boltzmann", "mixture_size": 1, "uniform_share": 0}),
    ("boltzmann warm", {"strategy": "boltzmann", "mixture_size": 1}),
    ("mcts", {"strategy": "mcts", "mixture_size": 1, "uniform_share": 0}),
    ("mcts warm", {"strategy": "mcts", "mixture_size": 1}),
    ("fixed", {"strategy": "fixed", "mixture_size": 4}),
    ("few-shot", {"strategy": "few-shot", "mixture_size": 4}),
    ("balanced", {"strategy": "balanced", "mixture_size": 2}),
    ("balanced", {"strategy": "balanced", "mixture_size": 4}),
    ("random", {"strategy": "random", "trials": 8, "epochs": 200}),
    ("halving", {"strategy": "halving", "epochs": 200}),
    ("evolution", {"strategy": "evolution", "trials": 18, "epochs": 200}),
    ("brute-force", {"strategy": "brute-force", "epochs": 200}),
)
_LEGEND = """\
Mean and deviation over the seeds. Accuracy, of the layout found when it is trained alone, in percent; regret is what
the best layout has more, front the same within every budget of multiply-accumulates (mean, and worst). 10^15:
multiply-accumulates of the search. -random: accuracy above that of the best of as many random trainings as the search
and the training of its choice cost together. warm: the first 40 % draw uniformly. own: by the scores that the strategy
drew by, without the evaluation of all layouts. random trains 8 layouts alone, evolution 18. Draws are random, as
published, but where a row says that they are in rounds."""


@dataclass(frozen=True)
class Quality:
    """What a ranking is worth; accuracies and regrets are fractions.

    Attributes:
        choice: the layout ranked first.
        tau: Kendall's tau-b with the truth, over the layouts that are ranked.
        near_pairs: share of their pairs that are ordered as in truth, of those whose costs differ by less than 10 %.
        accuracy: true accuracy of the choice.
        regret: what the best layout of all has more.
        front_regret: the same within a budget, the mean over every layout's multiply-accumulates as the budget.
        worst_front_regret: the largest of these.
    """

    choice: Layout
    tau: float
    near_pairs: float
    accuracy: float
    regret: float
    front_regret: float
    worst_front_regret: float


def quality(scores: Values, truth: Values, macs: Mapping[Layout, int], choice: Layout | None = None) -> Quality:
    """Measure a ranking against the truth.

    Args:
        scores: of all layouts or of some; higher is better. Among equal scores the cheaper layout is taken. Within a
            budget that none of them meets, the cheapest layout of all is.
        truth: accuracy of every layout trained alone, a fraction.
        macs: multiply-accumulates of every layout.
        choice: what the method recommends, if not the layout of the highest score.

    Raises:
        ValueError: if there are no scores, or some of layouts without a truth.
    """
    if not scores or not set(scores) <= set(truth):
        raise ValueError(f"{len(scores)} scores are not of the {len(truth)} layouts whose accuracy is known")
    layouts, cheapest = sorted(scores), min(truth, key=lambda layout: macs[layout])
    first = choice or _first(scores, macs, layouts)
    losses = []
    for budget in sorted(macs[layout] for layout in truth):
        within = [layout for layout in layouts if macs[layout] <= budget]
        best_within = max(accuracy for layout, accuracy in truth.items() if macs[layout] <= budget)
        losses.append(best_within - truth[_first(scores, macs, within) if within else cheapest])
    near = [pair for pair in combinations(layouts, 2) if max(macs[a] for a in pair) < 1.1 * min(macs[a] for a in pair)]
    right = [(scores[a] - scores[b]) * (truth[a] - truth[b]) > 0 for a, b in near]
    regret = max(truth.values()) - truth[first]
    near_pairs = mean(right) if right else math.nan
    return Quality(first, agreement(scores, truth), near_pairs, truth[first], regret, mean(losses), max(losses))


def agreement(one: Values, other: Values) -> float:
    """Kendall's tau-b over the layouts of the first; not a number of fewer than two."""
    return float(kendalltau([one[a] for a in one], [other[a] for a in one]).statistic) if len(one) > 1 else math.nan


def _first(scores: Values, macs: Mapping[Layout, int], layouts: list[Layout]) -> Layout:
    return min(layouts, key=lambda layout: (-scores[layout], macs[layout]))


def expected_best(truth: Values, trained: int) -> float:
    """Expected true accuracy of the best of `trained` layouts drawn at random without replacement, a fraction."""
    ordered, count = sorted(truth.values()), len(truth)
    chances = [comb(place, trained - 1) / comb(count, trained) for place in range(count)]
    return sum(chance * accuracy for chance, accuracy in zip(chances, ordered, strict=True))


def play_all(name: str, seeds: int) -> list[dict[str, Any]]:
    """Play every strategy on a table with seeds 0, 1, ..., beside what costs nothing and random trainings.

    Returns:
        a row for every play: method, supernets (0 where there are none), seed, spent_macs, what `Quality` holds, and
        random, the expected accuracy of the best of as many random trainings as the search and the training of its
        choice cost together.

    Raises:
        InputError: if there is no such table.
    """
    table = reference.table(name)
    space = SearchSpace(f"bmsn_{name.split('-')[1]}")
    truth, costs = table.accuracy, benchmark.macs_of(space)
    training = benchmark.training_macs(mean(costs.values()))

    def row(played: Played, seed: int = 0) -> dict[str, Any]:
        found = quality(played.scores, truth, costs, played.choice)
        still = 0 if played.trained else benchmark.training_macs(costs[found.choice])
        trainings = int((played.spent_macs + still) / training)
        about = {"method": played.method, "supernets": played.supernets, "seed": seed, "spent_macs": played.spent_macs}
        return {**about, **vars(found), "random": expected_best(truth, min(max(1, trainings), len(truth)))}

    rows = [row(Played("multiply-accumulates", 0, dict(costs), 0)), row(benchmark.activations(space))]
    for trained in (1, 8):
        best = expected_best(truth, trained)
        expected = {"choice": "-", "accuracy": best, "regret": max(truth.values()) - best, "random": best}
        rows.append({**rows[0], **dict.fromkeys(["tau", "near_pairs", "front_regret", "worst_front_regret"], math.nan),
                     "method": f"random, k = {trained}", "spent_macs": trained * training, **expected})  # fmt: skip
    jobs = [(*play, seed) for play in _PLAYS for seed in range(seeds)]
    for method, settings, seed in Bar(jobs, len(jobs), "playing searches"):
        way = benchmark.play_plan if settings["strategy"] in PLANS else benchmark.play
        rows += [row(one, seed) for one in way(method, table, space, SearchConfig(seed=seed, **settings))]
    return rows


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and deviation as people read them."""
    if any(map(math.isnan, values)):
        return "-"
    return f"{mean(values):.2f}" + (f"±{stdev(values):.2f}" if len(values) > 1 else "")


def _summary(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of a table with a line for every method, over its seeds."""
    cells = [["method", "M", "found", "tau", "regret", "front", "worst", "accuracy", "10^15", "-random"]]
    kind = itemgetter("method", "supernets")
    for method, supernets in dict.fromkeys(map(kind, rows)):
        same = [row for row in rows if kind(row) == (method, supernets)]
        choices = [str(row["choice"]) for row in same]
        points = [
            mean_and_deviation([100 * row[key] for row in same])
            for key in ("regret", "front_regret", "worst_front_regret")
        ]
        accuracy, spent, random = (mean(row[key] for row in same) for key in ("accuracy", "spent_macs", "random"))
        common, tau = max(sorted(set(choices)), key=choices.count), mean_and_deviation([row["tau"] for row in same])
        compared = [f"{100 * accuracy:.2f}", f"{spent / 1e15:.2f}", f"{100 * (accuracy - random):+.2f}"]
        cells.append([method, str(supernets or "-"), common, tau, *points, *compared])
    return cells


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first row is its head."""
    header, *lines = cells
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *lines))


def _text(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


def compare_runs(names: Sequence[str]) -> list[list[str]]:
    """The cells of a table of finished searches, measured against published accuracies where a table fits.

    Args:
        names: run folders, or searches on the Hub, see `hub.load_search`; beside those, folders of anything else are
            left out.
    """
    unfit = [name for name in names if Path(name).is_dir() and not (Path(name) / "search.json").is_file()]
    if 0 < len(unfit) < len(names):
        _log.info("left out, as no finished searches: %s", ", ".join(unfit))
        names = [name for name in names if name not in unfit]
    results = [hub.load_search(name) for name in names]
    scores = [{Layout.parse(layout): value for layout, value in result.values.items()} for result in results]
    cells = [["run", "strategy", "M", "found", "score", "agree", "tau", "regret", "front", "accuracy", "10^15"]]
    for name, result, own in zip(names, results, scores, strict=True):
        found = result.to_train("best")
        others = [there for there in zip(results, scores, strict=True) if there[0] is not result]
        agree = [
            agreement(own, other)
            for there, other in others
            if (there.model, there.dataset.id, set(other)) == (result.model, result.dataset.id, set(own))
        ]
        known, measured = f"{Path(result.dataset.id).name}-{result.model.removeprefix('bmsn_')}", ["-"] * 4
        if known in reference.names() and set(own) <= set(reference.table(known).accuracy):
            costs = benchmark.macs_of(SearchSpace(result.model))
            true = quality(own, reference.table(known).accuracy, costs, Layout.parse(found.layout))
            points = (true.tau, *(100 * value for value in (true.regret, true.front_regret, true.accuracy)))
            measured = [mean_and_deviation([value]) for value in points]
        searched = [str(result.settings.get("strategy", "balanced")), str(result.mixture_size), found.layout]
        searched += [f"{100 * found.accuracy:.2f}", mean_and_deviation([mean(agree)]) if agree else "-"]
        spent = "-" if result.spent_macs is None else f"{result.spent_macs / 1e15:.3g}"
        cells.append([Path(name).name[-22:], *searched, *measured, spent])
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("compare")

    def run() -> None:
        given = parser.parse_args(argv)
        if sum(map(bool, (given.run, given.benchmark, given.layouts))) != 1:
            raise InputError(
                f"compare what? Give run folders, --benchmark {reference.names()[0]}, or --layouts default,within,best"
            )
        for name in ("seeds", "epochs"):
            if (number := getattr(given, name)) is not None and number < 1:
                raise InputError(f"{name} {number} is too small: it must be at least 1")
        own = {name: getattr(given, name) for name in ("epochs", "jobs", "cluster") if getattr(given, name) is not None}
        if not given.from_search if given.layouts else given.from_search or own:
            raise InputError(
                "layouts and from-search go together: give --layouts default,best --from-search RUN_FOLDER"
            )
        if given.output and not given.benchmark:
            raise InputError("output is for the table of --benchmark: leave it out")
        if given.layouts:
            cells, lines = train_again(given.from_search, given.layouts, given.seeds, **own)
            sys.stdout.write(_text(cells) + "".join(f"{line}\n" for line in lines))
            return
        if given.run:
            sys.stdout.write(_text(compare_runs(given.run)))
            return
        rows = play_all(given.benchmark, given.seeds)
        sys.stdout.write(_text(_summary(rows)))
        if given.output:
            command = f"python -m bmsn_zoo.compare --benchmark {given.benchmark} --seeds {given.seeds}"
            title = f"# Searches played on {given.benchmark}\n\nSource: {reference.table(given.benchmark).source}."
            _write(rows, title, command, given.output)

    return run_command(run)


def _write(rows: Sequence[dict[str, Any]], title: str, command: str, path: Path) -> None:
    """The table as Markdown, and every play in a CSV file beside it."""
    table = markdown(_summary(rows))
    about, (_, told) = f"Commit {runtime.commit() or 'unknown'}.", str(benchmark.__doc__).split("\n\n", 1)
    text = [title, told.strip(), _LEGEND, f"```bash\n{command} --output {path.as_posix()}\n```", about, table]
    write_text(path.with_suffix(".md"), "\n\n".join(text) + "\n")
    write_csv(path.with_suffix(".csv"), rows)


if __name__ == "__main__":
    sys.exit(main())
