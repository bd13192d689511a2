"""The tables of results/ and of the README, from records alone: python benchmarks/evidence.py

results/searches.md and the README's table of searches come from the searches in results/searches, results/zoo.md and
the README's table of models from every model's metrics.json, and from results/public.csv, other people's weights.

A record is the search.json of a run without folders of its machine (`card.portable`), named ROW-sSEED.json after a
row of results/PROTOCOL.md. Rows that begin with c100- are of CIFAR-100, the others of CIFAR-10. Those that begin with
dev- are of the development: what they are judged by needs no truth, so the published table is not read for them, but
their seeds are compared, and some layouts that were trained alone and measured on held-out training images: the
trial.json of each is in results/alone, in folders of trainings alike.
"""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

from bmsn_zoo import Layout, SearchSpace, benchmark, reference
from bmsn_zoo.card import gain, over_seeds, percent
from bmsn_zoo.compare import Quality, agreement, expected_best, markdown, mean_and_deviation, quality
from bmsn_zoo.results import SearchResult, TrainResult, TrialResult

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
TRUTH = reference.table("cifar10-resnet20")
SPACE = SearchSpace("bmsn_resnet20")
MACS = {layout: SPACE.macs(layout, 32, 3) for layout in SPACE}
ROWS = {
    "recommended": "by itself, `--recipe cifar10-resnet20`",
    "published": "as in the paper, `--recipe cifar10-resnet20-published`, at this compute",
    "uniform": "uniform, one supernet",
}


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


def spent(results: Sequence[SearchResult]) -> str:
    """The compute of the search and of its confirmation, of the first seed that recorded it."""
    result = next((result for result in results if result.spent_macs), None)
    if not result:
        return "not recorded"
    confirmed = result.confirmed.spent_macs if result.confirmed else 0
    own = f"{(result.spent_macs - confirmed) / 1e15:.3f}"
    return f"{own} + {confirmed / 1e15:.3f}" if confirmed else own


def how(results: Sequence[SearchResult]) -> str:
    """Epochs and compute."""
    return f"{results[0].epochs} epochs, {spent(results)}"


def against_truth(rows: dict[str, dict[int, SearchResult]]) -> str:
    """Every row beside what costs nothing, random trainings, and the searches of the paper's authors."""
    cells = [["row", "n", "recommends", "tau", "near", "regret", "front", "worst", "accuracy", "seeds agree", "10^15"]]
    for name, by in (("multiply-accumulates", dict(MACS)), ("activations", benchmark.activations(SPACE).scores)):
        free = quality(by, TRUTH.accuracy, MACS)
        cells.append([name, "-", str(free.choice), *_numbers([free]), "-", "0"])
    for trained in (1, 8):
        best = expected_best(TRUTH.accuracy, trained)
        regret = 100 * (max(TRUTH.accuracy.values()) - best)
        compute = trained * benchmark.training_macs(mean(MACS.values())) / 1e15
        cells.append([f"random, k = {trained}", "-", "-", "-", "-", f"{regret:.2f}", "-", "-", f"{100 * best:.2f}", "-",
                      f"{compute:.2f}"])  # fmt: skip
    for supernets, by in TRUTH.supernet.items():
        theirs = quality(by, TRUTH.accuracy, MACS)
        cells.append([f"authors' table, M = {supernets}", "-", str(theirs.choice), *_numbers([theirs]), "-", "unknown"])
    for name, by_seed in rows.items():
        results = [by_seed[seed] for seed in sorted(by_seed)]
        found = [measured(result) for result in results]
        cells.append([name, str(len(results)), ", ".join(str(one.choice) for one in found), *_numbers(found),
                      agreements(results), how(results)])  # fmt: skip
    return markdown(cells) + "\n"


def _numbers(found: Sequence[Quality]) -> list[str]:
    points = [[100 * getattr(one, key) for one in found]
              for key in ("regret", "front_regret", "worst_front_regret", "accuracy")]  # fmt: skip
    return [
        mean_and_deviation(values)
        for values in ([one.tau for one in found], [one.near_pairs for one in found], *points)
    ]


def searches(rows: dict[str, dict[int, SearchResult]]) -> str:
    """The README's table: what searches are worth at equal compute, beside a ranking that costs nothing."""
    cells = [["search", "n", "its choice, trained alone", "Kendall's tau", "regret within a budget, points", "10^15"]]
    seeds = {title: [rows[name][seed] for seed in sorted(rows[name])] for name, title in ROWS.items()}
    lines = [(title, str(len(all_)), [measured(one) for one in all_], spent(all_)) for title, all_ in seeds.items()]
    others = [("the authors' own table, mixture of four", TRUTH.supernet[4], "unknown"),
              ("none: by multiply-accumulates", dict(MACS), "0")]  # fmt: skip
    lines += [(title, "-", [quality(by, TRUTH.accuracy, MACS)], compute) for title, by, compute in others]
    for title, n, found, compute in lines:
        tau, _, _, front, _, accuracy = _numbers(found)
        choices = ", ".join(dict.fromkeys(str(one.choice) for one in found))
        cells.append([title, n, f"{accuracy} % ({choices})", tau, front, compute])
    return markdown(cells) + "\n"


def single_runs(rows: dict[str, dict[int, SearchResult]], true: bool) -> str:
    """Every run by itself, with what it was run on."""
    cells = [["run", "recommends", "score accuracy", *(["tau", "front"] if true else []), "confirmation", "minutes",
              "hardware", "precision", "commit"]]  # fmt: skip
    for name, by_seed in rows.items():
        for seed, result in sorted(by_seed.items()):
            found = result.to_train("best")
            one = measured(result) if true else None
            verdict = result.confirmed.verdict if result.confirmed else "none"
            judged = [f"{one.tau:.3f}", f"{100 * one.front_regret:.2f}"] if one else []
            cells.append([f"[{name}-s{seed}](searches/{name}-s{seed}.json)", found.layout,
                          f"{100 * found.accuracy:.2f}", *judged, verdict, f"{result.duration_seconds / 60:.0f}",
                          result.hardware, result.precision, (result.commit or "unknown")[:7]])  # fmt: skip
    return markdown(cells) + "\n"


def trained_alone(folder: Path) -> dict[str, dict[Layout, TrialResult]]:
    """Layouts that were trained alone, by how they were, the longest trainings first."""
    ways: dict[tuple[int, str], dict[Layout, TrialResult]] = defaultdict(dict)
    for file in sorted(folder.glob("*/*.json")):
        result = TrialResult.read(file)
        way = f"{result.epochs} epochs from {'the supernet' if result.from_supernet else 'scratch'}"
        ways[result.epochs, way][Layout.parse(result.layout)] = result
    return {way: found for (_, way), found in sorted(ways.items(), key=lambda one: -one[0][0])}


def alone_table(ways: dict[str, dict[Layout, TrialResult]]) -> str:
    """Held-out accuracy of layouts trained alone, one column for each way."""
    layouts = sorted({layout for found in ways.values() for layout in found}, key=lambda layout: MACS[layout])
    precision = {way: ", ".join(sorted({result.precision for result in found.values()}))
                 for way, found in ways.items()}  # fmt: skip
    cells = [["layout", "10^6", *(f"{way}, {precision[way]}" for way in ways)]]
    for layout in layouts:
        told = [percent(found[layout].holdout_accuracy) if layout in found else "-" for found in ways.values()]
        cells.append([str(layout), f"{MACS[layout] / 1e6:.1f}", *told])
    return markdown(cells) + "\n"


def page(rows: dict[str, dict[int, SearchResult]], alone: dict[str, dict[Layout, TrialResult]]) -> str:
    """results/searches.md."""
    final = {name: row for name, row in rows.items() if not name.startswith(("dev-", "c100-"))}
    untrue = {name: row for name, row in rows.items() if name.startswith("c100-")}
    tried = {name: row for name, row in rows.items() if name.startswith("dev-")}
    accuracy = {way: {layout: result.holdout_accuracy for layout, result in found.items()}
                for way, found in alone.items()}  # fmt: skip
    longest = next(iter(accuracy.values()), {})
    agree = [["row", "n", "recommends", "seeds agree", "alone", "10^15"]]
    for name, by_seed in tried.items():
        results = list(by_seed.values())
        choices = ", ".join(result.pick("best").layout for result in results)
        like = mean_and_deviation([agreement(longest, scores(result)) for result in results])
        agree.append([name, str(len(results)), choices, agreements(results), like, how(results)])
    shorter = {f"{way}, alone": found for way, found in list(accuracy.items())[1:]}
    for name, values in {"multiply-accumulates": MACS, **shorter}.items():
        both = {layout: longest[layout] for layout in longest if layout in values}
        agree.append([name, "-", "-", "-", mean_and_deviation([agreement(both, values)]), "-"])
    parts = [
        "# Searches on CIFAR-10 and CIFAR-100\n",
        "Written by `python benchmarks/evidence.py` from the records in `searches/`, which hold every run's command,\n"
        "seed, settings, versions and segments. Rows, metrics and rules: [PROTOCOL.md](PROTOCOL.md).\n",
        "Means and deviations over n seeds. tau, near (pairs of near-equal cost), regrets (points) and accuracy\n"
        "(percent) are against the published accuracies of the layouts trained alone; 10^15: multiply-accumulates\n"
        "of the search, and of its confirmation. The authors' table holds accuracies inside mixtures of M supernets,\n"
        "means over three searches by the look of them; it does not say how long these were.\n"
        "The time of a run is that of a machine that also did other work.\n",
        against_truth(final),
        "## Every run\n",
        single_runs(final, true=True),
    ]
    if untrue:
        parts += ["## CIFAR-100\n", "No accuracies are published for its layouts.\n", single_runs(untrue, true=False)]
    if tried:
        parts += ["## Development\n", "Not read against the published table. alone: tau-b with the layouts that were\n"
                  "trained alone for longest, below.\n",
                  markdown(agree) + "\n", single_runs(tried, true=False)]  # fmt: skip
    if alone:
        parts += ["## Layouts trained alone\n", "On the weight split, n = 1, measured on the score split.\n",
                  alone_table(alone)]  # fmt: skip
    return "\n".join(parts)


# the zoo


def zoo() -> dict[str, TrainResult]:
    """The models that have weights, by their names: each data set's default first."""
    found = {file.parent.name: TrainResult.read(file) for file in sorted(ROOT.glob("hub_configs/*/metrics.json"))}
    return dict(sorted(found.items(), key=lambda one: (_data(one[1]), "_default" not in one[0], one[0])))


def _data(result: TrainResult) -> str:
    """CIFAR-10, say."""
    return result.dataset.id.split("/")[1].upper().replace("R1", "R-1")


def models(results: dict[str, TrainResult]) -> str:
    """The README's table: our models, and other people's weights of the default layout."""
    cells = [["model", "trained on", "layout", "parameters", "multiply-accumulates", "epochs", "test accuracy",
              "note"]]  # fmt: skip
    for name, result in results.items():
        found = ", found" if result.settings["from_search"] and not name.endswith("_default") else ""
        seeds = f"{over_seeds(result.accuracies)} over {len(result.seeds)} seeds" if result.repeats else "n = 1"
        cells.append([f"[`{name}`](hub_configs/{name}/README.md)", _data(result), f"{result.layout}{found}",
                      f"{result.parameters / 1e6:.2f} M", f"{result.macs / 1e6:.1f} M", str(result.epochs),
                      percent(result.test_accuracy), seeds])  # fmt: skip
    size = {_data(result): f"{result.parameters / 1e6:.2f} M" for result in results.values()}
    usual = SPACE.default_layout
    with (RESULTS / "public.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cells.append([f"ResNet20 of [{row['source']}]({row['address']})", row["data"], str(usual),
                          size[row["data"]], f"{MACS[usual] / 1e6:.1f} M", row["epochs"], f"{row['accuracy']} %",
                          row["note"]])  # fmt: skip
    return markdown(cells) + "\n"


def gains(results: dict[str, TrainResult]) -> str:
    """Every model against the default layout of its data set, over the seeds."""
    cells = [["model", "seeds", "test accuracies", "mean and deviation", "against the default",
              "multiply-accumulates"]]  # fmt: skip
    for name, result in results.items():
        usual = results[re.sub("_(lite|default)$", "", name) + "_default"]
        cells.append([f"`{name}`, {result.layout}", ", ".join(map(str, result.seeds)),
                      ", ".join(map(percent, result.accuracies)),
                      over_seeds(result.accuracies) if result.repeats else "n = 1",
                      "-" if result is usual else gain(result.accuracies, usual.accuracies),
                      f"{result.macs / usual.macs:.2f} of the default's"])  # fmt: skip
    return markdown(cells) + "\n"


def recipe_table(folder: Path) -> str:
    """Trainings of the default layout on which the zoo's recipe is tuned: held-out accuracy, base first."""
    found = {file.stem: TrialResult.read(file) for file in folder.glob("*.json")}
    cells = [["change", "held-out accuracy", "against base", "n", "hardware", "precision", "commit"]]
    for name in sorted(found, key=lambda name: (name != "base", name)):
        one = found[name]
        points = f"{100 * (one.holdout_accuracy - found['base'].holdout_accuracy):+.2f}" if name != "base" else "-"
        cells.append([name.replace("-", " "), percent(one.holdout_accuracy), points, "1", one.hardware, one.precision,
                      (one.commit or "unknown")[:7]])  # fmt: skip
    return markdown(cells) + "\n"


def zoo_page(results: dict[str, TrainResult], tuning: Path) -> str:
    """results/zoo.md; `tuning` holds what `recipe_table` asks for."""
    parts = [
        "# The zoo\n",
        "Written by `python benchmarks/evidence.py` from every model's `metrics.json`, which holds the command,\n"
        "settings, versions, hardware and commit of the training that is shipped and of its repeats with other seeds.\n"
        "Rules: [PROTOCOL.md](PROTOCOL.md). Test images, last epoch, no test-time augmentation; intervals are of the\n"
        "difference of means (Welch).\n",
        gains(results),
        "## The training recipe\n",
        "4-3-3 on CIFAR-10, 15 epochs on four fifths of the training images, measured on the last fifth; records in\n"
        "`recipe/`.\n",
        recipe_table(tuning),
    ]
    return "\n".join(parts)


def with_tables(readme: str, results: dict[str, TrainResult], rows: dict[str, dict[int, SearchResult]]) -> str:
    """A README with the tables of models and of searches as they are now."""
    for name, table in (("models", models(results)), ("searches", searches(rows))):
        readme = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", lambda _, t=table: t, readme, flags=re.S)
    return readme


if __name__ == "__main__":
    trained, searched = zoo(), load(RESULTS / "searches")
    written = {
        RESULTS / "searches.md": page(searched, trained_alone(RESULTS / "alone")),
        RESULTS / "zoo.md": zoo_page(trained, RESULTS / "recipe"),
        ROOT / "README.md": with_tables((ROOT / "README.md").read_text(encoding="utf-8"), trained, searched),
    }
    for file, text in written.items():
        file.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{file}\n")
