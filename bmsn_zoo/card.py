"""Cards of models and searches for the Hub, written from a run's own records by the templates in templates/."""

import functools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import jinja2
import yaml
from scipy.stats import binomtest, ttest_ind

from .config import SearchConfig, TrainConfig, load_recipe, shipped_recipes
from .export import preparation
from .files import write_text
from .layout import Layout
from .ranking import standard_error, tied
from .results import Entry, SearchResult, Segment, TrainResult, TrialResult
from .search_space import backbone_of

PICTURE = "layout.png"  # of a model folder
SOME_NAME = "YOUR_NAME/THIS_REPOSITORY"  # stands for the Hub id of a folder that was not pushed yet
_UNLICENSED = ("uoft-cs/cifar10", "uoft-cs/cifar100")  # the Hub lists them as unknown
# flags that say where a run lies, not what it computes; those with a value, and those without
_LOCAL_VALUES = (
    "--output",
    "--dataset",
    "--dataset-id",
    "--from-search",
    "--init-from",
    "--pretrained-from",
    "--push-to-hub",
    "--revision",
)
_LOCAL_SWITCHES = ("--resume", "--private", "--create-pr")
_SCRIPTS = {
    "train.py": "accelerate launch train.py",
    "search.py": "accelerate launch search.py",
    "bmsn_zoo/training.py": "accelerate launch -m bmsn_zoo.training",
    "bmsn_zoo/searching.py": "accelerate launch -m bmsn_zoo.searching",
    "bmsn-train": "bmsn-train",
    "bmsn-search": "bmsn-search",
}
_PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")  # a commit on the Hub
ResultT = TypeVar("ResultT", SearchResult, TrainResult, TrialResult)


def write_card(
    folder: Path, name: str = SOME_NAME, default: TrainResult | None = None, model_name: str | None = None
) -> None:
    """Write README.md of a model folder from its metrics.json and search.json.

    Args:
        folder: the model folder.
        name: Hub id that the usage shows.
        default: result of the default layout, trained in the same way, to compare with.
        model_name: the timm name that the model is registered under, if it is.
    """
    result = portable(TrainResult.read(folder / "metrics.json"))
    search = SearchResult.read(folder / "search.json") if (folder / "search.json").exists() else None
    data, backbone = result.dataset, backbone_of(result.model)
    layouts = (Layout.parse(result.layout), backbone.default_layout)
    sizes = [backbone.resolutions(layout, data.image_size) for layout in layouts]
    text = _render(
        "model.md.j2",
        title=model_name or f"{result.model} {result.layout}",
        name=name,
        model_name=model_name,
        result=result,
        onnx=(folder / "model.onnx").exists(),
        picture=(folder / PICTURE).exists(),
        preparation=preparation(data.in_chans, data.image_size, data.crop_pct),
        mode="RGB" if data.in_chans == 3 else "L",
        rows=[result] if default is None else [default, result],
        default=default,
        usual=backbone.default_layout,
        units=list(zip(backbone.channels, *sizes, strict=True)),
        search=search,
        place=search and search.pick(result.layout),
        chosen=_chosen(result, search),
    )
    write_text(folder / "README.md", text)


def search_card(search: SearchResult, name: str) -> str:
    """The card of a finished search.

    Args:
        search: portable.
        name: Hub id that the usage shows.
    """
    return _render("search.md.j2", result=search, name=name, rows=list(ranked_rows(search, 10)))


def percent(fraction: float) -> str:
    """An accuracy as people read it."""
    return f"{100 * fraction:.2f} %"


def ranked_rows(search: SearchResult, top: int) -> Iterator[tuple[int, Entry, str]]:
    """Place, layout and what is notable of it: the best `top`, the default, and the best that costs no more."""
    for place, entry in enumerate(search.ranking, 1):
        notes = ["default"] if entry == search.default else []
        notes += ["best within the default's MACs"] if entry == search.best_within_default_macs else []
        if place <= top or notes:
            yield place, entry, ", ".join(notes)


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy (a fraction) that was measured on so many images."""
    found = binomtest(round(accuracy * images), images).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def over_seeds(accuracies: Sequence[float]) -> str:
    """Mean and deviation of accuracies (fractions) of the same training with other seeds."""
    return f"{100 * mean(accuracies):.2f} ± {100 * stdev(accuracies):.2f} %"


def gain(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How much more accurate trainings are than others: points, with Welch's 95 % interval where both are several."""
    gap = f"{100 * (mean(ours) - mean(theirs)):+.2f} points"
    if min(len(ours), len(theirs)) < 2:
        return gap
    if not stdev(ours) + stdev(theirs):
        return f"{gap} (no deviation between seeds)"
    found = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return f"{gap} (95 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f})"


def template_environment(autoescape: bool = False) -> jinja2.Environment:
    """Where our templates are, and what they may use beside their values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        over_seeds=over_seeds,
        millions=lambda number, places=1: f"{number / 1e6:.{places}f} M",
        duration=lambda seconds: f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes",
        count=lambda number, what: f"{number} {what}{'' if number == 1 else 's'}",
        quoted=functools.partial(json.dumps, ensure_ascii=False),
        yaml=lambda settings: yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        hardware=_hardware,
        command=_command,
    )
    environment.globals.update(standard_error=standard_error, interval=interval, tied=tied, gain=gain)
    return environment


def _render(template: str, result: SearchResult | TrainResult, **values: Any) -> str:
    unlicensed = result.dataset.on_hub and result.dataset.id in _UNLICENSED
    license = getattr(result, "license", None) or ("apache-2.0" if unlicensed else None)
    values.update(result=result, unlicensed=unlicensed, license=license, licensed=_licensed(license))
    return template_environment().get_template(template).render(values).rstrip() + "\n"


def _licensed(license: str | None) -> str:
    if license == "apache-2.0":
        return "Code and weights: Apache 2.0."
    weights = f"Weights: {license}" if license else "No licence was named for the weights (`--license` does)"
    return f"{weights}; the code that made them: Apache 2.0."


def relicense(card: str, license: str) -> str:
    """A card of ours that names another licence."""
    card = re.sub(r"^license: .*\n", "", card, count=1, flags=re.M).replace("---\n", f"---\nlicense: {license}\n", 1)
    return re.sub(r"(?<=^## Licence\n\n).*?(?= The training images)", _licensed(license), card, flags=re.M)


def _chosen(result: TrainResult, search: SearchResult | None) -> str:
    """How a layout came to be trained: by a choice of its search, as the usual one, or by hand."""
    pick = str(result.settings.get("pick"))
    named = search is not None and not search.undecided and pick in ("best", "best_within_default_macs")
    if search and named and search.pick(pick).layout == result.layout:
        return "best" if search.pick("best").layout == result.layout else pick
    return "usual" if result.layout == str(backbone_of(result.model).default_layout) else "hand"


def _hardware(segments: Sequence[Segment]) -> str:
    used = (f"{s.hardware}, {s.processes} x {s.threads} threads, {s.precision}" for s in segments)
    return "; ".join(dict.fromkeys(used))


def portable(result: ResultT) -> ResultT:
    """A result without folders of the machine: a copy, which stays as it is when treated again.

    A local data set goes by its folder's last name, a search that lies beside the result by "search.json"; commands
    lose the flags that say where a run lies.
    """
    data = result.dataset
    shown = data.id if data.on_hub else Path(data.id).name.strip(".") or "images"
    settings = {**result.settings, "dataset": shown, "dataset_id": shown if data.on_hub else None}
    for key in ("from_search", "init_from", "pretrained_from"):
        where = settings.get(key)
        if where and not _PINNED.fullmatch(str(where)):
            settings[key] = "search.json" if key == "from_search" else Path(str(where)).name
    update: dict[str, Any] = {
        "dataset": data.model_copy(update={"id": shown}),
        "settings": settings,
        "segments": _portable_segments(result.segments),
        "recipe": result.recipe and Path(result.recipe).name,
    }
    if repeats := getattr(result, "repeats", []):
        update["repeats"] = [r.model_copy(update={"segments": _portable_segments(r.segments)}) for r in repeats]
    return result.model_copy(update=update)


def _portable_segments(segments: Sequence[Segment]) -> list[Segment]:
    return [s.model_copy(update={"command": _portable_command(s.command)}) for s in segments]


def _portable_command(words: Sequence[str]) -> list[str]:
    program = Path(words[0] if words else "")
    kept = [f"bmsn_zoo/{program.name}" if program.parent.name == "bmsn_zoo" else program.name]
    rest = iter(words[1:] if kept[0] in _SCRIPTS else ())
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in (*_LOCAL_VALUES, "--recipe"):
            value = value if equals else next(rest, "")
        if flag == "--recipe":
            kept += [flag, Path(value).name]
        elif flag not in (*_LOCAL_VALUES, *_LOCAL_SWITCHES):
            kept.append(word)
    return kept


def _command(result: SearchResult | TrainResult, name: str) -> str:
    """The command of a run as others can give it, from a portable result; empty if it was started from Python."""
    program, *words = result.segments[0].command
    if program not in _SCRIPTS:
        return ""
    sources = {key: result.settings.get(key) for key in ("dataset", "from_search", "init_from", "pretrained_from")}
    if sources["from_search"]:
        sources["dataset"] = None
        sources["from_search"] = name if sources["from_search"] == "search.json" else sources["from_search"]
    for key, value in sources.items():
        words += [f"--{key.replace('_', '-')}", str(value)] if value else []
    if (result.recipe or "").removesuffix("-small") in shipped_recipes():  # which may have changed since
        kind = TrainConfig if isinstance(result, TrainResult) else SearchConfig
        given = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in words}
        for key, value in load_recipe(str(result.recipe), kind).items():
            own = result.settings.get(key, value)
            if own not in (None, value) and key not in {"dataset", "recipe", *given}:
                flag = key.replace("_", "-")
                words += [f"--{'' if own else 'no-'}{flag}"] if isinstance(own, bool) else [f"--{flag}", str(own)]
    return f"{_SCRIPTS[program]} {shlex.join(words)}"
