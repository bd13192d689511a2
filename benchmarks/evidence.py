"""The tables of results/searches.md, from the searches recorded in results/searches: python benchmarks/evidence.py

A record is the search.json of a run without folders of its machine (`card.portable`), named ROW-sSEED.json after a
row of results/PROTOCOL.md. Rows that begin with dev- are of the development: what they are judged by needs no truth,
so the published table is not read for them.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

from bmsn_zoo import Layout, SearchSpace, benchmark, reference
from bmsn_zoo.compare import Quality, agreement, expected_best, markdown, mean_and_deviation, quality
from bmsn_zoo.results import SearchResult

RESULTS = Path(__file__).parents[1] / "results"
TRUTH = reference.table("cifar10-resnet20")
SPACE = SearchSpace("bmsn_resnet20")
MACS = {layout: SPACE.macs(layout, 32, 3) for layout in SPACE}


def load(folder: Path) -> dict[str, dict[int, SearchResult]]:
    """The searches of each row, by their seeds."""
    rows: dict[str, dict[int, SearchResult]] = defaultdict(dict)
    for file in sorted(folder.glob("*-s*.json")):
        row, _, seed = file.stem.rpartition("-s")
        rows[row][int(seed)] = SearchResult.read(file)
    return rows


def scores(result: SearchResult) -> dict[Layout, float]:
    """Accuracy of every layout in a search."""
    return {Layout.parse(layout): value for layout, value in result.values.items()}


def measured(result: SearchResult) -> Quality:
    """What a search is worth against the published table: its ranking, and the layout that it recommends."""
    return quality(scores(result), TRUTH.accuracy, MACS, Layout.parse(result.to_train("best").layout))


def agreements(results: Sequence[SearchResult]) -> str:
    """Kendall's tau-b of the rankings of every two seeds: mean and deviation."""
    found = [agreement(a, b) for a, b in combinations(map(scores, results), 2)]
    return mean_and_deviation(found) if found else "-"


def how(result: SearchResult) -> str:
    """Epochs, or the compute that ended it."""
    spent = f"{result.spent_macs / 1e15:.3f}" if result.spent_macs else "not recorded"
    return f"{result.epochs} epochs, {spent}"


def against_truth(rows: dict[str, dict[int, SearchResult]]) -> str:
    """Every row beside what costs nothing, and beside random trainings."""
    cells = [["row", "n", "recommends", "tau", "near", "regret", "front", "worst", "accuracy", "seeds agree", "10^15"]]
    for name, by in (("multiply-accumulates", dict(MACS)), ("activations", benchmark.activations(SPACE).scores)):
        free = quality(by, TRUTH.accuracy, MACS)
        cells.append([name, "-", str(free.choice), *_numbers([free]), "-", "0"])
    for trained in (1, 8):
        best = expected_best(TRUTH.accuracy, trained)
        regret = 100 * (max(TRUTH.accuracy.values()) - best)
        spent = trained * benchmark.training_macs(mean(MACS.values())) / 1e15
        cells.append([f"random, k = {trained}", "-", "-", "-", "-", f"{regret:.2f}", "-", "-", f"{100 * best:.2f}", "-",
                      f"{spent:.2f}"])  # fmt: skip
    for name, by_seed in rows.items():
        results = [by_seed[seed] for seed in sorted(by_seed)]
        found = [measured(result) for result in results]
        cells.append([name, str(len(results)), ", ".join(str(one.choice) for one in found), *_numbers(found),
                      agreements(results), how(results[0])])  # fmt: skip
    return markdown(cells) + "\n"


def _numbers(found: Sequence[Quality]) -> list[str]:
    points = [[100 * getattr(one, key) for one in found]
              for key in ("regret", "front_regret", "worst_front_regret", "accuracy")]  # fmt: skip
    return [
        mean_and_deviation(values)
        for values in ([one.tau for one in found], [one.near_pairs for one in found], *points)
    ]


def single_runs(rows: dict[str, dict[int, SearchResult]], true: bool) -> str:
    """Every run by itself, with what it was run on."""
    cells = [["run", "recommends", "score accuracy", *(["tau", "front"] if true else []), "minutes", "hardware",
              "precision", "commit"]]  # fmt: skip
    for name, by_seed in rows.items():
        for seed, result in sorted(by_seed.items()):
            found = result.to_train("best")
            one = measured(result) if true else None
            judged = [f"{one.tau:.3f}", f"{100 * one.front_regret:.2f}"] if one else []
            cells.append([f"[{name}-s{seed}](searches/{name}-s{seed}.json)", found.layout,
                          f"{100 * found.accuracy:.2f}", *judged, f"{result.duration_seconds / 60:.0f}",
                          result.hardware, result.precision, (result.commit or "unknown")[:7]])  # fmt: skip
    return markdown(cells) + "\n"


def page(rows: dict[str, dict[int, SearchResult]]) -> str:
    """results/searches.md."""
    final = {name: row for name, row in rows.items() if not name.startswith("dev-")}
    tried = {name: row for name, row in rows.items() if name.startswith("dev-")}
    agree = [["row", "n", "recommends", "seeds agree", "10^15"]]
    for name, by_seed in tried.items():
        results = list(by_seed.values())
        choices = ", ".join(result.pick("best").layout for result in results)
        agree.append([name, str(len(results)), choices, agreements(results), how(results[0])])
    parts = [
        "# Searches on CIFAR-10\n",
        "Written by `python benchmarks/evidence.py` from the records in `searches/`, which hold every run's command,\n"
        "seed, settings, versions and segments. Rows, metrics and rules: [PROTOCOL.md](PROTOCOL.md).\n",
        "Means and deviations over n seeds. tau, near (pairs of near-equal cost), regrets (points) and accuracy\n"
        "(percent) are against the published accuracies of the layouts trained alone; 10^15: multiply-accumulates.\n"
        "The time of a run is that of a machine that also did other work.\n",
        against_truth(final),
        "## Every run\n",
        single_runs(final, true=True),
    ]
    if tried:
        parts += ["## Development\n", "Not read against the published table.\n", markdown(agree) + "\n",
                  single_runs(tried, true=False)]  # fmt: skip
    return "\n".join(parts)


if __name__ == "__main__":
    (RESULTS / "searches.md").write_text(page(load(RESULTS / "searches")), encoding="utf-8")
    sys.stdout.write(f"{RESULTS / 'searches.md'}\n")
