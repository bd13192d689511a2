"""What searches and trainings find, as their files hold it: typed, checked when read, written whole."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import NormalDist, quantiles
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    ValidationError,
    model_serializer,
    model_validator,
)
from typing_extensions import TypeAliasType

from . import cost
from .config import LICENSE, DataConfig, SearchConfig, TrainConfig, build_config
from .errors import InputError
from .files import read_bytes, write_json
from .layout import Layout
from .search_space import SearchSpace

SCHEMA_VERSION: Literal[2] = 2
LEVEL = 0.05  # of significance
CHOICES = ("best", "best_within_default_macs", "default")  # entries of a search that have a name


def _canonical(layout: str) -> str:
    if layout != str(Layout.parse(layout)):
        raise ValueError("is not written as 5-3-2")
    return layout


LayoutText = Annotated[str, AfterValidator(_canonical)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=0)]
Setting = bool | Annotated[int, Field(gt=-(2**63), lt=2**63)] | float | str | None
Settings = dict[str, Setting]  # what was computed, see the configs
Names = Annotated[list[str], FailFast()]
Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6)]  # a fraction that was computed
License = Annotated[str, Field(pattern=f"^{LICENSE}$")] | None
_Row = Annotated[list[Share], FailFast()]
Matrix = TypeAliasType("Matrix", Annotated[list[_Row], FailFast()])  # (L, M): a row for each layout


def _checked(kind: type[DataConfig]) -> AfterValidator:
    def check(settings: Settings) -> Settings:
        build_config(kind, settings)
        return settings

    return AfterValidator(check)


def _finite(details: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(details, allow_nan=False)
    return details


class Record(BaseModel):
    """Base of everything that a result file holds: no other keys, no other types, nothing that is not finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @classmethod
    def read(cls, path: Path, shown: str = "") -> Self:
        """Read and check a file, which messages call `shown` or by its path.

        Raises:
            InputError: if it cannot be read, or is malformed in whatever way.
        """
        shown = shown or str(path)
        try:
            return cls.model_validate_json(read_bytes(path, shown))
        except ValidationError as error:
            raise InputError(f"{shown} is not the {cls.__doc__.split('.')[0].lower()}: {fault(error)}") from None  # type: ignore[union-attr]

    def content(self) -> dict[str, Any]:
        """What its file holds: all that it was made with, and so nothing that an older file did not have."""
        return self.model_dump(include=self.model_fields_set | {"schema_version"})

    def write(self, path: Path) -> None:
        """Write it whole."""
        write_json(path, self.content())


def fault(error: ValidationError) -> str:
    """The first thing that is wrong, in one short line, whatever a stranger's file holds."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(ascii(part).strip("'")[:40] for part in first["loc"])[:120]
    if where == "schema_version":
        return f"it is of another version than {SCHEMA_VERSION}: run it again"
    return f"{where} {first['msg'].removeprefix('Value error, ')}"[:300].strip().replace("\n", " ")


class Entry(Record):
    """A layout that a search ranked.

    Attributes:
        layout: such as "5-3-2".
        accuracy: on the score split under `supernet`, a fraction.
        macs: multiply-accumulates for one image.
        supernet: index of the one that ranks it: the best of all or, as the strategy says, its own.
    """

    layout: LayoutText
    accuracy: Fraction
    macs: Count
    supernet: Count


Quartiles = tuple[Positive, Positive, Positive]  # milliseconds below which these parts of rounds stay


class UnitLatency(Record):
    """Latency of a unit of a network.

    Attributes:
        unit: from 0 on; the head comes as one more.
        scale: downsamplings before it.
        downsamples: whether it is one.
    """

    unit: Count
    scale: Count
    downsamples: bool
    milliseconds: Quartiles


class CheckedLatency(Record):
    """Latency of a whole network, from end to end."""

    layout: LayoutText
    milliseconds: Quartiles


class Latencies(Record):
    """Latencies of units with one batch size, whose sums are the layouts'.

    Attributes:
        rounds: in each of which all were timed.
        checked: some networks timed from end to end.
        deviation: how much longer these took than their sums, a fraction: the least and the most.
    """

    batch_size: Annotated[int, Field(ge=1, lt=2**31)]
    rounds: Count
    units: Annotated[list[UnitLatency], FailFast()]
    checked: Annotated[list[CheckedLatency], FailFast()]
    deviation: tuple[float, float]

    @classmethod
    def of_times(cls, batch_size: int, rows: Mapping[cost.Row, Any], whole: Mapping[Layout, Any]) -> "Latencies":
        """What `cost.time_units` measured."""

        def milliseconds(seconds: Sequence[float]) -> Quartiles:
            low, median, high = quantiles([1000 * one for one in seconds], n=4, method="inclusive")
            return low, median, high

        units = [
            UnitLatency(unit=unit, scale=scale, downsamples=downsamples, milliseconds=milliseconds(times))
            for (unit, scale, downsamples), times in rows.items()
        ]
        about: dict[str, Any] = dict(batch_size=batch_size, rounds=len(next(iter(rows.values()))), units=units)
        sums = cls(**about, checked=[], deviation=(0.0, 0.0))
        checked = [CheckedLatency(layout=str(layout), milliseconds=milliseconds(whole[layout])) for layout in whole]
        off = [each.milliseconds[1] / sums.of(each.layout) - 1 for each in checked]
        return cls(**about, checked=checked, deviation=(min(off), max(off)))

    @property
    def off(self) -> str:
        """The deviation in words."""
        return "{:+.0f} to {:+.0f} % off".format(*(100 * share for share in self.deviation))

    @cached_property
    def table(self) -> dict[cost.Row, float]:
        """The median of every row, milliseconds."""
        return {(each.unit, each.scale, each.downsamples): each.milliseconds[1] for each in self.units}

    def of(self, layout: str | Layout) -> float:
        """Milliseconds of a layout for one batch: the sum of the medians of its units and its head.

        Raises:
            InputError: if one was not measured.
        """
        try:
            return sum(self.table[row] for row in cost.rows_of(Layout.parse(layout)))
        except KeyError as error:
            raise InputError(f"the latencies lack one of layout {layout}: {error}") from None


class LatencyResult(Record):
    """Latency of a search's layouts, on the device that it ran on.

    Attributes:
        precision: of weights and maps; memory format is channels last.
        batches: of one image, and perhaps of more.
    """

    device: str
    hardware: str
    precision: str
    threads: Count
    torch: str
    batches: Annotated[list[Latencies], Field(min_length=1), FailFast()]

    @property
    def single(self) -> Latencies:
        """That of one image."""
        return self.batches[0]

    @property
    def where(self) -> str:
        """What it was measured on, in short."""
        return f"{self.device}, {self.precision}" + f", {self.threads} threads" * (self.device == "cpu")


class Segment(Record):
    """An uninterrupted part of a run: what it computed on, and from which epoch on, for how many seconds.

    Attributes:
        tf32: whether "fp32" products were rounded to 10 bits, as newer NVIDIA GPUs can.
        compiled: backend that compiled the network, if one did.
    """

    processes: Count
    threads: Count
    precision: str
    device: str
    hardware: str
    tf32: bool | None = None
    compiled: str | None = None
    versions: dict[str, str]
    commit: str | None
    command: Names
    epoch: Count
    started: str
    seconds: Positive


class DatasetRecord(Record):
    """The data set of a run.

    Attributes:
        id: Hub id, or the local folder as the run was given it.
        on_hub: whether `id` is a Hub id, as decided when the run loaded it.
        revision: branch, tag or commit on the Hub.
        fingerprint: of the training images and their labels.
        crop_pct: side of what evaluation sees of an image, as a part of its shorter side.
        store_size: shorter side of the copies of the training images, if they were shrunk.
        mean: of every channel, a fraction of full brightness.
        std: standard deviation of every channel.
    """

    id: str
    on_hub: bool
    revision: str | None
    fingerprint: str
    image_column: str
    label_column: str
    image_size: Annotated[int, Field(ge=1, le=2**16)]
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    store_size: int | None = None
    in_chans: Literal[1, 3]
    label_names: Names
    mean: list[float]
    std: list[Positive]

    @model_serializer(mode="wrap")
    def _as_made(self, dump: Callable[["DatasetRecord"], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}

    @model_validator(mode="after")
    def _channels(self) -> Self:
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError("mean and std need a number for every channel")
        return self


class SearchDataset(DatasetRecord):
    """The data set of a search; the score split ranks layouts and trains no weights."""

    weight_images: Count
    score_images: Annotated[int, Field(ge=1, lt=2**63)]


class TrainDataset(DatasetRecord):
    """The data set of a training, its test images included."""

    test_split: str
    test_fingerprint: str


class Run(Record):
    """What every result says of its run."""

    schema_version: Literal[2] = SCHEMA_VERSION
    recipe: str | None = None
    settings: Settings
    seed: Count
    epochs: Annotated[int, Field(ge=1, lt=2**63)]
    dataset: DatasetRecord
    duration_seconds: Positive
    versions: dict[str, str]
    commit: str | None
    precision: str
    hardware: str
    segments: Annotated[list[Segment], Field(min_length=1), FailFast()]


def pareto_front(entries: Iterable[Entry], price: Callable[[Entry], float] = lambda e: e.macs) -> list[Entry]:
    """Those of the ranked layouts that none beats in both accuracy and price, cheapest first."""
    front: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (price(e), -e.accuracy)):
        if not front or entry.accuracy > front[-1].accuracy:
            front.append(entry)
    return front


def rank(
    entries: Iterable[Entry],
    default: str | None,
    values: Mapping[str, float] | None = None,
    trained: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The entries of a search as `Ranking` holds them, those that have a name among it.

    Args:
        values: of every layout, to rank by instead of accuracies; higher is better.
        trained: epochs of every layout, if some were trained for longer, which then come first.
    """

    def place(entry: Entry) -> tuple[int, float, int, str]:
        name = entry.layout
        return -(trained or {}).get(name, 0), -(values[name] if values else entry.accuracy), entry.macs, name

    ranking = sorted(entries, key=place)
    usual = next((entry for entry in ranking if entry.layout == default), None)
    within = next((entry for entry in ranking if usual and entry.macs <= usual.macs), None)
    named = {"default": usual, "best": ranking[0], "best_within_default_macs": within}
    return {**named, "pareto_front": pareto_front(ranking), "ranking": ranking}


class Ranking(Record):
    """All layouts of a search space, ranked.

    Attributes:
        ranking: best first; of two equals the cheaper one.
        pareto_front: those that none beats in both accuracy and multiply-accumulates, cheapest first.
        layouts: the search space in its order, that of the matrices' rows; the default need not be among them.
        accuracy_matrix: on the score split, fractions, (L, M).
        probability: of each layout among all, (L,), where that ranks them instead of accuracies (relaxed searches).
        trained_epochs: of each layout, (L,), where some were trained alone for longer than others (halving): those
            that were are ranked before the others.
    """

    model: str
    mixture_size: Annotated[int, Field(ge=1, le=1024)]
    default: Entry | None
    best: Entry
    best_within_default_macs: Entry | None
    pareto_front: Annotated[list[Entry], FailFast()]
    ranking: Annotated[list[Entry], FailFast()]
    layouts: Annotated[list[LayoutText], FailFast()]
    accuracy_matrix: Matrix
    probability: Annotated[list[Share] | None, FailFast()] = None
    trained_epochs: Annotated[list[Count] | None, FailFast()] = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        space = [str(layout) for layout in SearchSpace(self.model, next(iter(self.layouts), None)).subset(self.layouts)]
        if self.layouts != space or sorted(entry.layout for entry in self.ranking) != sorted(space):
            raise ValueError(f"it does not rank the {len(space)} layouts of its search space")
        for name in {"accuracy_matrix", "assignment_matrix", "scores"} & set(type(self).model_fields):
            matrix = getattr(self, name)
            if matrix is not None and [len(row) for row in matrix] != [self.mixture_size] * len(space):
                raise ValueError(f"its matrices are not of {len(space)} layouts x {self.mixture_size} supernets")
        rows = dict(zip(space, self.accuracy_matrix, strict=True))
        for entry in self.ranking:
            row = rows[entry.layout]
            if not (entry.supernet < len(row) and entry.accuracy == row[entry.supernet]):
                raise ValueError(f"it ranks {entry.layout} by another accuracy than it holds")
        for each in (self.probability, self.trained_epochs):
            if each is not None and len(each) != len(space):
                raise ValueError(f"its probabilities or epochs are not of {len(space)} layouts")
        values, trained = self.values if self.probability else None, self.trained
        for name, value in rank(self.ranking, self.default.layout if self.default else None, values, trained).items():
            if getattr(self, name) != value:
                raise ValueError(f"its {name} is not what its {self.ranked_by} says")
        return self

    @property
    def ranked_by(self) -> str:
        """What `values` are."""
        return "score-split accuracy" if self.probability is None else "learned probability"

    @property
    def trained(self) -> dict[str, int] | None:
        """Epochs of each layout, where some were trained for longer than others."""
        known = self.trained_epochs
        return None if known is None else dict(zip(self.layouts, known, strict=True))

    @property
    def values(self) -> dict[str, float]:
        """What the layouts are ranked by, a fraction for each."""
        if self.probability is None:
            return {entry.layout: entry.accuracy for entry in self.ranking}
        return dict(zip(self.layouts, self.probability, strict=True))

    def pick(self, choice: str) -> Entry:
        """An entry by its name (see `CHOICES`) or its layout.

        Raises:
            InputError: if the layout is none of those ranked.
        """
        if choice in CHOICES:
            if (entry := getattr(self, choice)) is None:
                raise InputError(
                    f"pick {choice}: the default is none of the {len(self.ranking)} layouts of this search"
                )
            return entry
        layout = str(Layout.parse(choice))
        for entry in self.ranking:
            if entry.layout == layout:
                return entry
        raise InputError(f"pick {layout} is none of the {len(self.ranking)} layouts of this search")

    def place(self, layout: str) -> int:
        """Rank of a layout, the best one's being 1."""
        return self.ranking.index(self.pick(layout)) + 1


class Choice(Record):
    """A choice of a search that was trained alone, and measured on the score split.

    Attributes:
        right: of so many `images` it classified correctly.
        better: images that it alone gets right, of it and the default; `worse` those that the default alone does.
        p_value: McNemar's, exact, two-sided, corrected for all comparisons (Holm); None for the default.
    """

    layout: LayoutText
    right: Count
    images: Annotated[int, Field(ge=1, lt=2**63)]
    macs: Count
    better: Count
    worse: Count
    p_value: Fraction | None

    @property
    def accuracy(self) -> float:
        """On the score split, a fraction."""
        return self.right / self.images

    @property
    def wins(self) -> bool:
        """Whether it is shown to be better than the default."""
        return self.p_value is not None and self.p_value < LEVEL and self.better > self.worse


class Confirmation(Record):
    """Confirmation of a search: its choices, each trained alone.

    Attributes:
        choices: those that beat the default first, then by accuracy.
        default: the layout that they were compared with.
        best: the most accurate of those that beat it; the default if none does.
        best_within_default_macs: the same among those that cost no more.
        verdict: what that means, in a line.
        epochs: of each, by a schedule of that length.
        from_supernet: whether each began with the weights of the supernet that ranked it, instead of from scratch.
        spent_macs: multiply-accumulates of all of it.
    """

    choices: Annotated[list[Choice], Field(min_length=1, max_length=1000), FailFast()]
    default: LayoutText
    best: LayoutText
    best_within_default_macs: LayoutText
    verdict: Annotated[str, Field(max_length=300)]
    epochs: Annotated[int, Field(ge=1, lt=2**63)]
    from_supernet: bool = False
    seed: Count
    spent_macs: Count

    @property
    def start(self) -> str:
        """Where its trainings began, in words."""
        return "from the weights of its supernet" if self.from_supernet else "from scratch"

    @classmethod
    def of(cls, choices: Iterable[Choice], default: str, **about: Any) -> "Confirmation":
        """What the choices show; `about` are the fields that say how they were trained."""
        ordered = sorted(choices, key=lambda choice: (not choice.wins, -choice.right, choice.macs, choice.layout))
        return cls(**{**about, "choices": ordered, "default": default, **_conclusions(ordered, default)})

    @property
    def abstains(self) -> str | None:
        """The verdict, where it keeps the default."""
        return self.verdict if self.best == self.default else None

    @property
    def cheaper_tie(self) -> str | None:
        """The most accurate choice that costs less than the default and ties with it, if no winner does: no winner."""
        usual = next(choice for choice in self.choices if choice.layout == self.default)
        cheaper = [c for c in self.choices if c.macs < usual.macs and c.p_value is not None and c.p_value >= LEVEL]
        if self.best_within_default_macs != self.default or not cheaper:
            return None
        choice = max(cheaper, key=lambda choice: (choice.right, -choice.macs))
        gap, images = choice.better - choice.worse, choice.images
        # of paired differences, by Bonett and Price (2012): two more images, one for each side, so that it has a width
        likely, differing = gap / (images + 2), (choice.better + choice.worse + 2) / (images + 2)
        comparisons = len(self.choices) - 1  # all of which it is corrected for, as p is
        half = NormalDist().inv_cdf(1 - LEVEL / 2 / comparisons) * ((differing - likely**2) / (images + 2)) ** 0.5
        low, mean, high = (f"{100 * value:+.1f}" for value in (likely - half, gap / images, likely + half))
        cost = f"{choice.macs / usual.macs:.2f} of its cost"
        return f"{choice.layout} ties with {self.default} at {cost}: {mean} points, 95 % interval {low} to {high}"

    @model_validator(mode="after")
    def _is_what_choices_say(self) -> Self:
        if self.default not in [choice.layout for choice in self.choices]:
            raise ValueError("its default is none of its choices")
        for name, value in _conclusions(self.choices, self.default).items():
            if getattr(self, name) != value:
                raise ValueError(f"its {name} is not what its choices say")
        return self


def _conclusions(choices: Sequence[Choice], default: str) -> dict[str, str]:
    """The best of the ordered choices, the best within the default's cost, and the verdict."""
    usual = next(choice for choice in choices if choice.layout == default)
    best = next((choice for choice in choices if choice.wins), usual)
    within = next((choice for choice in choices if choice.wins and choice.macs <= usual.macs), usual)
    verdict = f"no layout beats the default: keep {default}"
    if best.p_value is not None:
        level = next((level for level in (0.001, 0.01) if best.p_value < level), LEVEL)
        points, evidence = 100 * (best.accuracy - usual.accuracy), f"p < {level}, {best.images:,} images, 1 seed"
        verdict = f"{best.layout} beats the default {default} by {points:.1f} points ({evidence})"
    return {"best": best.layout, "best_within_default_macs": within.layout, "verdict": verdict}


class SearchResult(Ranking, Run):
    """Result of a search.

    Attributes:
        undecided: why no layout can be called the best; None if one can. The confirmation's verdict, if it abstains;
            of an unconfirmed search see `ranking.why_undecided`.
        assignment_matrix: p(supernet given layout), (L, M); None where the strategy has none.
        scores: moving averages of the score accuracy that the strategy went by, fractions, (L, M); None likewise.
        spent_macs: multiply-accumulates of the convolutions of the whole run: training steps three times their
            forward, scoring, all evaluations (of layouts that begin alike, what they share counts once), and the
            confirmation.
        norms: those of its supernets.
        details: what else the strategy says of its search.
        confirmed: what its choices showed when they were trained alone; None if they were not.
        latency: of its layouts, as networks that are deployed; None if it was not measured.
        license: of its supernets' weights, as the Hub writes it; None if none was named.
    """

    settings: Annotated[Settings, _checked(SearchConfig)]
    dataset: SearchDataset
    peak_memory_mib: Count | None = None
    undecided: Annotated[str, Field(max_length=300)] | None = None
    assignment_matrix: Matrix | None = None
    scores: Matrix | None = None
    spent_macs: Count | None = None
    norms: str | None = None
    details: Annotated[dict[str, JsonValue], AfterValidator(_finite)] = {}
    confirmed: Confirmation | None = None
    latency: LatencyResult | None = None
    license: License = None

    @model_validator(mode="after")
    def _is_about_its_own(self) -> Self:
        for batch in self.latency.batches if self.latency else ():
            for layout in self.layouts:
                batch.of(layout)
        if self.confirmed and not {choice.layout for choice in self.confirmed.choices} <= set(self.layouts):
            raise ValueError("it confirms layouts that it does not rank")
        return self

    def pick(self, choice: str) -> Entry:
        """An entry by its name or its layout; of a confirmed search, "best" is what its confirmation says."""
        if self.confirmed and choice in ("best", "best_within_default_macs"):
            choice = getattr(self.confirmed, choice)
        return super().pick(choice)

    def trained_alone(self, layout: str) -> Choice | None:
        """What the confirmation measured of a layout; None if it was not one of its choices."""
        choices = self.confirmed.choices if self.confirmed else ()
        return next((choice for choice in choices if choice.layout == layout), None)

    def prices(self) -> dict[str, Callable[[Entry], float]]:
        """What a layout costs, by the words for an axis: multiply-accumulates, and the latency if it was measured."""
        found: dict[str, Callable[[Entry], float]]
        found = {"multiply-accumulates for one image, millions": lambda entry: entry.macs / 1e6}
        if self.latency:
            single = self.latency.single
            found[f"milliseconds for one image ({self.latency.where})"] = lambda entry: single.of(entry.layout)
        return found

    def to_train(self, choice: str) -> Entry:
        """What a training takes for a pick: the default, if it was searched and no best one can be told from others."""
        return self.pick("default" if self.undecided and self.default and choice.startswith("best") else choice)


class Repeat(Record):
    """The same training with another seed, whose weights were not kept.

    Attributes:
        test_accuracy: of its weights on all test images, a fraction.
        test_loss: mean cross-entropy on them, nats.
    """

    seed: Count
    test_accuracy: Fraction
    test_loss: float
    segments: Annotated[list[Segment], Field(min_length=1), FailFast()]

    @classmethod
    def of(cls, result: "TrainResult") -> Self:
        """What to keep of a training."""
        return cls(**{name: getattr(result, name) for name in cls.model_fields})


class TrainResult(Run):
    """Result of a training.

    Attributes:
        test_accuracy: of the saved weights on all test images, a fraction.
        test_loss: mean cross-entropy on them, nats.
        macs: multiply-accumulates for one image.
        weights_sha256: of the published model.safetensors; None until that is written.
        license: of the weights, as the Hub writes it; None if none was named.
        class_images: test images of every class, in the order of the label names.
        class_right: how many of them are classified correctly.
        confused: the most frequent mistakes: class, what it was taken for, test images.
        repeats: the same training with other seeds.
    """

    model: str
    layout: LayoutText
    test_accuracy: Fraction
    test_loss: float
    test_images: Annotated[int, Field(ge=1, lt=2**63)]
    test_precision: str
    macs: Count
    parameters: Count
    runs: Count
    train_images: Count
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    license: License = None
    class_images: Annotated[list[Count] | None, FailFast()] = None
    class_right: Annotated[list[Count] | None, FailFast()] = None
    confused: Annotated[list[Annotated[list[Count], Field(min_length=3, max_length=3)]], FailFast()] = []
    repeats: Annotated[list[Repeat], FailFast()] = []
    settings: Annotated[Settings, _checked(TrainConfig)]
    dataset: TrainDataset

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies of all seeds, fractions, its own first."""
        return [self.test_accuracy, *(repeat.test_accuracy for repeat in self.repeats)]

    @property
    def seeds(self) -> list[int]:
        """All seeds, its own first."""
        return [self.seed, *(repeat.seed for repeat in self.repeats)]

    @model_validator(mode="after")
    def _repeats_with_other_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"it repeats a training with seeds {self.seeds}, of which some are the same")
        return self

    @model_validator(mode="after")
    def _counts_its_classes(self) -> Self:
        images, right, classes = self.class_images, self.class_right, len(self.dataset.label_names)
        if (images is None) != (right is None) or any(max(pair[:2]) >= classes for pair in self.confused):
            raise ValueError("it counts other classes than its data set has")
        if images is not None and right is not None:
            fits = len(images) == len(right) == classes and all(r <= n for r, n in zip(right, images, strict=True))
            if not fits or sum(images) != self.test_images:
                raise ValueError("the counts of its classes are not of its test images")
        return self


class TrialResult(Run):
    """Result of a trial: a training measured on held-out training images, the test images being closed.

    Attributes:
        holdout_accuracy: on all held-out training images, a fraction; no test accuracy.
        holdout_loss: mean cross-entropy on them, nats.
        from_supernet: whether it began with the weights of a supernet of its search, instead of as its settings say.
        macs: multiply-accumulates for one image.
        spent_macs: those of the whole training, three times the forward's, and of the evaluation.
    """

    model: str
    layout: LayoutText
    holdout_accuracy: Fraction
    holdout_loss: float
    holdout_images: Annotated[int, Field(ge=1, lt=2**63)]
    from_supernet: bool = False
    macs: Count
    spent_macs: Count
    train_images: Count
    settings: Annotated[Settings, _checked(TrainConfig)]
