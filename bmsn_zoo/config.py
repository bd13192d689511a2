"""Settings of a run: recipe file, then flags, strictly checked, and written down again. No torch here."""

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .errors import InputError, brief
from .files import read_yaml

PRECISIONS = ("auto", "no", "bf16", "fp16")
LICENSE = "[a-z0-9][a-z0-9.+-]{0,60}"  # as the Hub writes them
_LIMIT = re.compile(r"default|\d{1,20}(\.\d{0,20})?(e\+?\d{1,2})?x?")
ConfigT = TypeVar("ConfigT", bound="DataConfig")
ALONE = ("random", "halving", "evolution", "brute-force")  # strategies that train layouts alone, for `epochs` each
_SEVERAL = ("fixed", "few-shot")  # those that are nothing with one supernet
RELAXED = ("darts", "gaea")  # those that run all resolutions at once, by steps of one cost
MAX_LAYOUTS = 20_000  # of a search space
FEW_STEPS = 500  # of a supernet: with fewer, a ranking is mostly noise
_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def setting(default: Any, help: str, low: float | None = None, high: float | None = None, **more: Any) -> Any:
    """A setting with its help text and range, perhaps `choices`.

    `environment` marks what may differ when a run is resumed, because it does not say what is computed.
    """
    about: Any = {"low": low, "high": high, "choices": None, "environment": False, **more}
    return Field(default=default, description=help, json_schema_extra=about)


class DataConfig(BaseModel):
    """Settings that search and training share: the data, the seed, and the environment.

    Text is read as the setting's type, so that flags need no types of their own. `model_fields_set` names what was
    given.

    Raises:
        InputError: for the first value of another type, or out of its range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_fault(type(self), error)) from None

    dataset: str = setting("digits", "Hub id or local folder of the images; digits needs no download")
    dataset_id: str | None = setting(None, "Hub id that a local folder is a copy of, for the records")
    dataset_config: str | None = setting(None, "configuration of the data set, where it has several")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the data set on the Hub")
    image_column: str | None = setting(None, "column of the images; found by its type")
    label_column: str | None = setting(None, "column of the labels; found by its type")
    train_split: str = setting("train", "split of the training images")
    test_split: str | None = setting(None, "split of the test images; test, else validation, else a fixed fifth")
    image_size: int | None = setting(
        None, "side of the square network input in pixels; the median shorter side of the images", 4, 1024
    )
    in_chans: int = setting(3, "channels of the network input: 3 for colour, 1 for gray", choices=(1, 3))
    limit: int | None = setting(None, "use only this many training images, class-stratified", 2)
    model: str = setting(
        "bmsn_resnet20",
        "bmsn_resnet20, bmsn_resnet18, bmsn_resnet50, or the name of a ResNet in timm, such as resnet50d",
    )
    pretrained: bool = setting(False, "start from the weights that timm knows for this name, through the Hub")
    seed: int = setting(0, "seed of everything random", 0, 2**31 - 1)
    grad_checkpointing: bool = setting(
        False, "compute what was forgotten again in the backward pass: less memory, a third more time"
    )
    flip: bool = setting(True, "mirror training images at random")
    crop: str | None = setting(
        None,
        "random crops of training images: random-resized, of 8 % of the area or more, or pad, of the padded image; "
        "that from 128 pixels on, this below",
        choices=("pad", "random-resized"),
    )
    crop_padding: int = setting(4, "crop training images at random after padding them by this many pixels", 0, 256)
    crop_pct: float | None = setting(
        None,
        "side of the middle square that evaluation sees, as a part of an image's shorter side; 1, or 0.875 where "
        "training images are random-resized crops",
        0.1,
        1,
    )
    store_size: int | None = setting(
        None,
        "make a copy of the training images once, of so many pixels on the shorter side, and train on that",
        8,
        4096,
    )

    recipe: str | None = setting(
        None,
        "settings by name, perhaps with -small behind (ends in minutes), or from a YAML file; flags win over it",
        environment=True,
    )
    mixed_precision: str = setting("auto", "auto takes the fastest of the device", choices=PRECISIONS, environment=True)
    threads: int | None = setting(None, "CPU threads of each process; all cores shared evenly", 1, environment=True)
    report_to: str | None = setting(
        None,
        "also show the curves of the run in one of these; they need the extra bmsn_zoo[trackers]",
        choices=("tensorboard", "trackio", "wandb"),
        environment=True,
    )
    license: str | None = setting(
        None, "licence of the weights that the card names, as the Hub writes it, such as mit; none", environment=True
    )
    workers: int | None = setting(
        None, "processes that read images; one for each thread, at most 8", 0, environment=True
    )
    memory_limit: float = setting(4.0, "decoded images up to this many GiB stay in memory, more are streamed", 0)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        # numbers and text become one another, but neither becomes true or false
        kind = kind_of(cls, str(info.field_name))
        if value is not None and isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{brief(value)} is not {_WANTED[kind]}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _allowed(cls, value: Any, info: ValidationInfo) -> Any:
        low, high, choices, _ = about(cls, str(info.field_name)).values()
        if value is not None and low is not None and value < low:
            raise ValueError(f"{brief(value)} is too small: it must be at least {low}")
        if value is not None and high is not None and value > high:
            raise ValueError(f"{brief(value)} is too large: it must be at most {high}")
        if choices and value is not None and value not in choices:
            raise ValueError(f"{brief(value)} is unknown: use {_options(choices)}")
        if info.field_name == "license" and value is not None and not re.fullmatch(LICENSE, value):
            raise ValueError(f"{brief(value)} is no name of the Hub's: write it as apache-2.0, mit, cc-by-4.0 or other")
        return value

    def settings(self) -> dict[str, Any]:
        """What is computed: every setting that is not environment."""
        return {name: value for name, value in self if not about(type(self), name)["environment"]}

    def as_dict(self) -> dict[str, Any]:
        """Every setting."""
        return dict(self)


def kind_of(config_class: type[DataConfig], name: str) -> type:
    """The type of a setting, None apart: int, float, bool or str."""
    annotation: Any = config_class.model_fields[name].annotation
    return (*get_args(annotation), annotation)[0]


def about(config_class: type[DataConfig], name: str) -> dict[str, Any]:
    """What `setting` says of a setting: low, high, choices, environment."""
    return config_class.model_fields[name].json_schema_extra  # type: ignore[return-value]


def _fault(config_class: type[DataConfig], error: ValidationError) -> str:
    """The first thing that is wrong with settings, in one line."""
    first = error.errors(include_url=False)[0]
    name, value = str(first["loc"][0]), first["input"]
    if first["type"] == "extra_forbidden":
        return f"unknown setting {brief(name)}: {_hint(name, config_class)}"
    kind, flag = kind_of(config_class, name), name.replace("_", "-")
    if value is None:
        return f"{flag} is empty: give a {kind.__name__}"
    if first["type"] == "value_error":
        return f"{flag} {first['msg'].removeprefix('Value error, ')}"
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    finite = first["type"] != "finite_number" or kind is int
    return f"{flag} {brief(value)} is not {_WANTED[kind] if finite else 'a finite number'}"


class SearchConfig(DataConfig):
    """Settings of a search; results/PROTOCOL.md tells how the defaults were chosen."""

    default_layout: str | None = setting(
        None, "layout to compare with, which also sets the number of scales; the model's own"
    )
    max_macs: str | None = setting(
        None,
        "search only layouts of so many multiply-accumulates for an image: a number, default for those of the default "
        "layout, 0.8x for a part of them",
    )
    max_activations: str | None = setting(
        None, "the same of what all convolutions put out, which memory and time follow: a number, default, or 0.8x"
    )
    max_latency: float | None = setting(
        None,
        "search only layouts that classify one image within so many milliseconds on this device, measured first",
        0,
    )
    latency: bool = setting(
        True, "measure how long the layouts take on this device, for the result: some seconds", environment=True
    )
    strategy: str = setting(
        "balanced",
        "who is trained next: balanced, uniform, fixed, boltzmann, mcts, few-shot, unshared; or relaxed: darts, gaea; "
        "or layouts alone: random, halving, evolution, brute-force",
    )
    trials: int = setting(8, "random, evolution: layouts to train alone; with a budget as many as it pays for", 1)
    trial_seeds: int = setting(1, "brute-force: seeds of each layout", 1, 1000)
    eta: int = setting(
        3, "halving: a rung has 1/eta of the layouts of the one before, and eta times its epochs", 2, 100
    )
    jobs: int | None = setting(
        None,
        "trainings side by side, where layouts are trained alone; one for each GPU, or CPU thread",
        1,
        environment=True,
    )
    cluster: str | None = setting(
        None, "cluster that trains them: dask://HOST:PORT of a dask scheduler; this machine", environment=True
    )
    confirm: int = setting(
        4, "then train so many choices alone, the default layout among them, and test which beat it; 0 is off", 0, 1000
    )
    confirm_epochs: int | None = setting(
        None, "epochs of each of these; as many as make all of them train as long as the search did", 1
    )
    confirm_from: str | None = setting(
        None,
        "weights that each of these starts from: its supernet's, or scratch; its supernet's if not given, but scratch "
        "where resolutions have weights of their own, or were mixed (darts, gaea)",
        choices=("supernet", "scratch"),
    )
    draws: str | None = setting(
        None,
        "layouts that are drawn uniformly: permutation, every layout once before any again, or random; permutation if "
        "not given, but random by --parallel mixture",
        choices=("random", "permutation"),
    )
    uniform_share: float = setting(0.4, "boltzmann, mcts, few-shot: share of the search that draws uniformly", 0, 1)
    exploration: float = setting(0.5, "mcts: weight of what was seldom visited against what scored well", 0, 1e4)
    mcts_momentum: float = setting(0.95, "mcts: share of a node's old value kept at an update", 0, 1)
    mcts_temperature: float = setting(0.0, "mcts: 0 visits the best child, more draws from a softmax over this", 0, 1e4)
    alpha_lr: float | None = setting(
        None,
        "darts, gaea: learning rate of what resolutions are mixed by; 0.01 for darts (Adam, as its authors for pooling "
        "have it), 0.1 for gaea (exponentiated gradient)",
        0,
    )
    sharing: str | None = setting(
        None,
        "weights of a unit: shared by all its resolutions, or a set for each of them, which start with the same values "
        "or at random; they are shared if not given, and by unshared at random",
        choices=("shared", "same", "random"),
    )
    mixture_size: int = setting(
        1,
        "supernets, M; 1 is one-shot search; where it is not given, fixed, few-shot and scores in pairs have 2, from "
        "20,000 images on 4, and --parallel mixture one for each process",
        1,
        1024,
    )
    epochs: int | None = setting(
        30, "passes over the weight split in all, so each supernet gets 1/M of them; more for few images", 1
    )
    budget: float | None = setting(
        None,
        "multiply-accumulates to spend, such as 1.4e14, evaluations included, confirmation aside, instead of epochs; "
        "where layouts are trained alone, each for its epochs, no training begins that would exceed it",
        1,
    )
    batch_size: int = setting(
        32, "images of one step, over all processes; smaller for few images, more for many processes", 2
    )
    eval_batch_size: int = setting(256, "score images that a supernet normalises together in the evaluation", 2)
    evaluate_every: int = setting(
        0, "evaluate all layouts after every so many epochs, not only at the end; 0 is off", 0
    )
    evaluate_last: int = setting(
        1, "rank by the mean of so many evaluations: after each of the last epochs, or late in a budget", 1, 100
    )
    opt: str = setting("momentum", "timm optimizer; momentum is plain, sgd is Nesterov's")
    lr: float = setting(0.05, "learning rate at the start", 0)
    min_lr: float = setting(0.0, "learning rate at the end", 0)
    warmup_epochs: int = setting(0, "epochs of linear warm-up", 0)
    rate_decay: str | None = setting(
        None,
        "cost: a power of the way left for each layout, with momentum for each quarter of them; schedule: a cosine; "
        "cost if not given, but schedule where all steps cost the same (darts, gaea)",
        choices=("schedule", "cost"),
    )
    gamma_cheap: float = setting(4.0, "that power for the cheapest layout, which learns fast", 0, 100)
    gamma_dear: float = setting(0.25, "that power for the dearest layout", 0, 100)
    momentum: float = setting(0.9, "momentum of the optimizer", 0, 1)
    weight_decay: float = setting(0.0, "weight decay", 0)
    scores: str = setting(
        "batch",
        "batch: the drawn supernet is scored, sharpness grows with the steps; pairs: all are, on the same images, and "
        "it grows with the evidence for their differences",
        choices=("batch", "pairs"),
    )
    max_sharpness: float = setting(
        100.0, "factor on the scores before the softmax at the end; starts at 1; in pairs the most it can be", 1, 1e4
    )
    score_momentum: float = setting(0.9, "share of the old score kept at an update", 0, 1)
    init_from: str | None = setting(
        None, "earlier search whose supernets to start from: its run folder, or USER/REPO[@revision] on the Hub"
    )
    pretrained_from: str | None = setting(
        None,
        "trained network whose weights every supernet, and every training of what is found, starts from: a model of "
        "the zoo, the run folder of a training, or USER/REPO[@revision] on the Hub",
    )
    parallel: str = setting(
        "data",
        "several processes: data shards every batch, mixture gives each process its own supernets",
        choices=("data", "mixture"),
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for name in ("max_macs", "max_activations"):
            limit = getattr(self, name)
            if limit is not None and not _LIMIT.fullmatch(limit):
                wanted = "a number such as 4e7, default, or a part of the default layout's such as 0.8x"
                raise InputError(f"{name.replace('_', '-')} {brief(limit)} is no limit: give {wanted}")
        alone = self.strategy in ALONE
        if not alone and self.budget is not None and self.epochs is not None and "epochs" in self.model_fields_set:
            raise InputError(f"budget and epochs {self.epochs} are two ends of one search: give one of them")
        for name in ("pretrained", "init_from"):
            if self.pretrained_from and getattr(self, name):
                raise InputError(f"pretrained-from and {name.replace('_', '-')} are two starts: give one of them")
        if self.confirm == 1:
            raise InputError("confirm 1 leaves the default layout alone: give 2 or more, or 0")


def fit_to_images(config: SearchConfig, images: int, processes: int = 1) -> SearchConfig:
    """A search's settings, those that were not given chosen for its number of training images, half of which train.

    - batch_size: the largest power of two that makes 4 steps of that half, from 8 to 32, or to 16 for each process,
      which share it evenly;
    - mixture_size: 1; where supernets share the layouts in any case 4 from 20,000 images on, else 2; one a process if
      each has its own;
    - draws, rate_decay, confirm_from: as their help says;
    - epochs: 30, or as many, at most 300, as give every supernet `FEW_STEPS`; none with a budget, but of layouts alone.

    So CIFAR-10 has the defaults of `SearchConfig`, and 363 photos have 100 epochs.
    """
    half, given = images // 2, {name for name in config.model_fields_set if getattr(config, name) is not None}
    relaxed, apart = config.strategy in RELAXED, config.parallel == "mixture"
    several = processes if apart else 4 if images >= 20_000 else 2
    one = relaxed or not (apart or config.strategy in _SEVERAL or config.scores == "pairs")
    sharing = sharing_of(config.settings())
    chosen: dict[str, Any] = {
        "batch_size": _fitting_batch(half, 4, 32 if apart else max(32, 16 * processes), processes),
        "mixture_size": 1 if one else several,
        "draws": "random" if apart else "permutation",
        "rate_decay": "schedule" if relaxed else "cost",
        "confirm_from": "supernet" if sharing == "shared" and not relaxed else "scratch",
    }
    chosen = {name: config.as_dict()[name] if name in given else value for name, value in chosen.items()}
    enough = math.ceil(FEW_STEPS * chosen["mixture_size"] / max(1, half // chosen["batch_size"]))
    alone = config.strategy in ALONE
    if config.budget is not None and not alone:
        chosen["epochs"] = None
    elif "epochs" not in given:
        chosen["epochs"] = max(30, min(300, enough))
    if config.budget is not None and alone and "trials" not in given:
        chosen["trials"] = MAX_LAYOUTS
    return SearchConfig(**{**config.as_dict(), **chosen})


def fit_training(config: "TrainConfig", images: int, processes: int = 1) -> "TrainConfig":
    """A training's settings, those that were not given chosen for its number of training images.

    - batch_size: the largest power of two that makes 8 steps of an epoch, from 8 to 128, which processes share evenly;
    - epochs: 30, or as many, at most 300, as make `FEW_STEPS`.

    So from 1,024 images on the batches are those of `TrainConfig`, and 300 photos have batches of 32 and 56 epochs.
    """
    given = config.model_fields_set
    fitting = _fitting_batch(images, 8, 128, processes * config.batch_unit)
    batch = config.batch_size if "batch_size" in given else fitting
    enough = math.ceil(FEW_STEPS / max(1, images // batch))
    epochs = config.epochs if "epochs" in given else max(30, min(300, enough))
    return TrainConfig(**{**config.as_dict(), "batch_size": batch, "epochs": epochs})


def _fitting_batch(images: int, steps: int, most: int, parts: int) -> int:
    """The largest power of two that makes so many steps of the images, from 8 to `most`; less for fewer images.

    Where that cannot be shared by so many parts, what can; two for each at least.
    """
    size = 2 ** min(max(3, (images // steps).bit_length() - 1), max(1, images.bit_length() - 1), most.bit_length() - 1)
    return max(size // parts, 2) * parts if parts > 1 else size


def sharing_of(settings: Mapping[str, Any]) -> str:
    """How a search with these settings shares weights among resolutions, see its setting `sharing`."""
    return settings.get("sharing") or ("random" if settings.get("strategy") == "unshared" else "shared")


class TrainConfig(DataConfig):
    """Settings of a training, from scratch or from trained weights."""

    layout: str | None = setting(None, "layout to train, such as 5-3-2")
    from_search: str | None = setting(
        None, "search whose layout to train: its run folder, or USER/REPO[@revision] on the Hub"
    )
    pick: str = setting("best", "layout of that search: best, best_within_default_macs, default, or a layout")
    init_from: str | None = setting(
        None,
        "trained network whose weights to start from: a model of the zoo, the run folder of a training, or "
        "USER/REPO[@revision] on the Hub; its layout is trained, unless --layout or --from-search says another",
    )
    epochs: int = setting(30, "passes over the training images; more for few images", 1)
    batch_size: int = setting(128, "images of one step, over all processes; smaller for few images", 2)
    opt: str = setting("sgd", "timm optimizer; sgd is Nesterov's, momentum is plain")
    lr: float = setting(0.1, "highest learning rate", 0)
    min_lr: float = setting(0.0, "learning rate at the end", 0)
    sched: str = setting("cosine", "path from lr to min-lr; poly is a line", choices=("cosine", "poly", "constant"))
    warmup_epochs: int = setting(1, "epochs of linear warm-up", 0)
    momentum: float = setting(0.9, "momentum of the optimizer", 0, 1)
    weight_decay: float = setting(5e-4, "weight decay, not on normalisation and biases", 0)
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", 0, 0.99)
    mixup: float = setting(0.0, "alpha of mixup; 0 is off", 0)
    cutmix: float = setting(0.0, "alpha of cutmix; 0 is off", 0)
    ema_decay: float = setting(0.0, "decay of the weights' moving average, which is then what is saved; 0 is off", 0, 1)
    drop_rate: float = setting(0.0, "dropout before the classifier", 0, 0.99)
    alternate_flip: bool = setting(False, "mirror every image in every second epoch instead of at random")
    onnx: bool = setting(False, "also write the network as model/model.onnx", environment=True)
    holdout: float = setting(0.0, "share of the training images to hold out and evaluate after every epoch", 0, 0.5)
    validation_split: str | None = setting(
        None,
        "split to evaluate after every epoch, for the curves alone, where none is held out; one for validation, if "
        "there is one beside the test split; none: no split",
    )
    holdout_seed: int | None = setting(
        None,
        "seed that chooses those; that of a search and --holdout 0.5 make its two halves; the run's own",
        0,
        2**31 - 1,
    )
    measure: str = setting(
        "test",
        "images that the result is measured on: test, or holdout, the held-out ones, once at the end: the test images "
        "stay closed, and no model is made that could be published",
        choices=("test", "holdout"),
    )

    @property
    def batch_unit(self) -> int:
        """What a process's part of a batch is a multiple of: images are mixed in pairs."""
        return 2 if self.mixup or self.cutmix else 1


def _options(values: Sequence[Any]) -> str:
    names = [str(value) for value in values]
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], word: str = "now") -> str:
    """What differs between two sets of settings, in words; empty if nothing does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {brief(before.get(name))} ({word} {brief(now.get(name))})" for name in names)


def shipped_folder(name: str) -> Path:
    """Where data that we ship lies (recipes, hub_configs): in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parents[1] / name


def with_reachable_data(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a record, with the Hub's id of a data set where its local copy is not on this machine."""
    if settings["dataset_id"] and not os.path.exists(settings["dataset"]):
        return {**settings, "dataset": settings["dataset_id"], "dataset_id": None}
    return settings


def shipped_recipes() -> dict[str, Path]:
    """Files of the recipes that we ship, by name."""
    return {file.stem: file for file in sorted(shipped_folder("recipes").glob("*.yaml"))}


def load_recipe(name: str, config_class: type[ConfigT]) -> dict[str, Any]:
    """Settings of a recipe for one kind of run.

    A recipe is a YAML file: settings that search and training share at the top, their own under `search:` and
    `train:`. Those under `small:` are what its name with -small behind changes; what it does not say is taken from the
    recipe that it is `like:`. Every key of all of them is checked, whichever is asked for.

    Args:
        name: the name of a recipe that we ship, or a file.
        config_class: `SearchConfig` or `TrainConfig`.

    Raises:
        InputError: if there is no such recipe, it is not a mapping, or a key is unknown.
    """
    whole = _read_recipe(name, name)
    small = whole.pop("small", None) or {}
    if not isinstance(small, dict):
        raise InputError(f"recipe {name}: small is not a mapping of settings")
    variants = [_checked(name, content) for content in (whole, _merged(whole, small))]
    shared, sections = variants[is_small(name)]
    return {"recipe": name, **shared, **sections["search" if config_class is SearchConfig else "train"]}


def _checked(name: str, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What search and training share, and their sections."""
    sections = {section: content.get(section) or {} for section in ("search", "train")}
    shared = {key: value for key, value in content.items() if key not in sections}
    for section, part in sections.items():
        if not isinstance(part, dict):
            raise InputError(f"recipe {name}: {section} is not a mapping of settings")
    for keys, known in ((shared, DataConfig), (sections["search"], SearchConfig), (sections["train"], TrainConfig)):
        for key in keys:
            if key not in _names(known):
                raise InputError(f"recipe {name} has the unknown setting {brief(key)}: {_hint(key, known)}")
    return shared, sections


def is_small(name: str) -> bool:
    """Whether the name of a recipe asks for the small variant of one that we ship."""
    return name.endswith("-small") and not os.path.isfile(name)


def _read_recipe(name: str, asked: str) -> dict[str, Any]:
    """What a recipe says, over what the shipped one says that it is `like`."""
    path, shipped = Path(name), shipped_recipes()
    if not os.path.isfile(name):
        if name.removesuffix("-small") not in shipped:
            raise InputError(f"recipe {name!r} is neither a file nor one of {', '.join(shipped)}, perhaps with -small")
        path = shipped[name.removesuffix("-small")]
    content = read_yaml(path, f"recipe {asked}")
    if not isinstance(content, dict):
        raise InputError(f"recipe {asked} is not a mapping of settings")
    like = content.pop("like", None)
    if like is not None and (not isinstance(like, str) or like not in shipped):
        raise InputError(f"recipe {asked} is like {brief(like)}: it can be like {', '.join(shipped)}")
    return content if like is None else _merged(_read_recipe(like, asked), content)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Settings and sections of both; where both have one, those of `over`."""
    both = {key for key in base.keys() & over.keys() if isinstance(base[key], dict) and isinstance(over[key], dict)}
    return {**base, **over, **{key: _merged(base[key], over[key]) for key in both}}


def over_recipe(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a recipe and flags, which win over it: epochs over its budget, too, and the other way round.

    How many supernets a recipe has is for its own strategy: another one that is given does not take it over.
    """
    own = recipe.get("strategy", "balanced")
    ends = set() if given.get("strategy", own) in ALONE else {"epochs", "budget"}
    lost = ends if ends & set(given) else set()
    if given.get("strategy", own) != own:
        lost = lost | {"mixture_size"}
    return {**{name: value for name, value in recipe.items() if name not in lost}, **given}


def _names(config_class: type[DataConfig]) -> list[str]:
    return [name for name in config_class.model_fields if name != "recipe"]


def _hint(key: Any, known: type[DataConfig]) -> str:
    """What the writer of a recipe may have meant by a setting that is unknown where it stands."""
    key = brief(key).strip("'")
    homes = [section for section, home in (("search", SearchConfig), ("train", TrainConfig)) if key in _names(home)]
    if homes:
        return f"it belongs under {' or '.join(homes)}"
    close = difflib.get_close_matches(key, _names(known), 1)
    return f"did you mean {close[0]}?" if close else f"see --help for the {len(_names(known))} that exist"


def build_config(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """A checked config from settings of a recipe, flags or a file; text is read as the setting's type.

    Raises:
        InputError: if one is unknown, of another type, or out of its range.
    """
    return config_class(**{brief(name) if not isinstance(name, str) else name: v for name, v in values.items()})
