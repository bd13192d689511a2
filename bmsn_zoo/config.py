"""Settings of a run: recipe file, then flags, strictly checked, and written down again. No torch here."""

import argparse
import dataclasses
import difflib
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin

import yaml

from .errors import InputError

PRECISIONS = ("auto", "no", "bf16", "fp16")
ConfigT = TypeVar("ConfigT", bound="DataConfig")


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
    environment: bool = False,
) -> Any:
    """A dataclass field with its help text, range and choices.

    `environment` marks what may differ when a run is resumed, because it does not say what is computed.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, environment=environment)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Settings that search and training share: the data, the seed, and the environment."""

    dataset: str = setting("digits", "Hub id or local folder of the images; digits needs no download")
    dataset_id: str | None = setting(None, "Hub id that a local folder is a copy of, for the records")
    dataset_config: str | None = setting(None, "configuration of the data set, where it has several")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the data set on the Hub")
    image_column: str | None = setting(None, "column of the images; found by its type")
    label_column: str | None = setting(None, "column of the labels; found by its type")
    train_split: str = setting("train", "split of the training images")
    test_split: str | None = setting(None, "split of the test images; test, else validation, else a fixed fifth")
    image_size: int | None = setting(None, "side of the square network input in pixels; that of the first image", 4)
    in_chans: int = setting(3, "channels of the network input: 3 for colour, 1 for gray", choices=(1, 3))
    limit: int | None = setting(None, "use only this many training images, class-stratified", 2)
    model: str = setting("bmsn_resnet20", "timm name of the backbone")
    seed: int = setting(0, "seed of everything random", 0, 2**31 - 1)
    flip: bool = setting(True, "mirror training images at random")
    crop_padding: int = setting(4, "crop training images at random after padding them by this many pixels", 0)

    recipe: str | None = setting(None, "settings by name, or from a YAML file; flags win over it", environment=True)
    mixed_precision: str = setting(
        "auto", "auto takes what the device computes natively", choices=PRECISIONS, environment=True
    )
    threads: int | None = setting(None, "CPU threads of each process; all cores shared evenly", 1, environment=True)
    workers: int | None = setting(None, "processes that read images; one for each thread", 0, environment=True)
    memory_limit: float = setting(4.0, "decoded images up to this many GiB stay in memory, more are streamed", 0)

    def check(self) -> Self:
        """Return self if every value has the right type and range.

        Raises:
            InputError: for the first that has not.
        """
        for item in dataclasses.fields(self):
            setattr(self, item.name, _checked(item, getattr(self, item.name)))
        return self

    def settings(self) -> dict[str, Any]:
        """What is computed: every field that is not environment."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["environment"]}

    def as_dict(self) -> dict[str, Any]:
        """Every field."""
        return dataclasses.asdict(self)


@dataclass
class SearchConfig(DataConfig):
    """Settings of a search; the defaults are the paper's for ResNet20 on CIFAR-10, but for the epochs."""

    default_layout: str | None = setting(
        None, "layout to compare with, which also sets the number of scales; the model's own"
    )
    mixture_size: int = setting(4, "supernets, M; 1 is plain one-shot search", 1, 1024)
    epochs: int = setting(30, "passes over the weight split in all, so each supernet gets 1/M of them", 1)
    batch_size: int = setting(128, "images of one step, over all processes", 2)
    eval_batch_size: int = setting(256, "score images that a supernet normalises together in the evaluation", 2)
    evaluate_every: int = setting(
        0, "evaluate all layouts after every so many epochs, not only at the end; 0 is off", 0, environment=True
    )
    opt: str = setting("sgd", "timm optimizer")
    lr: float = setting(0.1, "learning rate at the start", 0)
    min_lr: float = setting(0.001, "learning rate at the end of its cosine decay", 0)
    warmup_epochs: int = setting(0, "epochs of linear warm-up", 0)
    momentum: float = setting(0.9, "momentum of the optimizer", 0, 1)
    weight_decay: float = setting(0.0, "weight decay", 0)
    max_sharpness: float = setting(100.0, "factor on the scores before the softmax at the end; starts at 1", 1, 1e4)
    score_momentum: float = setting(0.9, "share of the old score kept at an update", 0, 1)
    init_from: str | None = setting(
        None, "earlier search whose supernets to start from: its run folder, or USER/REPO[@revision] on the Hub"
    )
    parallel: str = setting(
        "data",
        "several processes: data shards every batch, mixture gives each process its own supernets",
        choices=("data", "mixture"),
    )


@dataclass
class TrainConfig(DataConfig):
    """Settings of a training from scratch."""

    layout: str | None = setting(None, "layout to train, such as 5-3-2")
    from_search: str | None = setting(
        None, "search whose layout to train: its run folder, or USER/REPO[@revision] on the Hub"
    )
    pick: str = setting("best", "layout of that search: best, best_within_default_macs, default, or a layout")
    epochs: int = setting(30, "passes over the training images", 1)
    batch_size: int = setting(128, "images of one step, over all processes", 2)
    opt: str = setting("sgd", "timm optimizer; sgd is Nesterov's")
    lr: float = setting(0.1, "highest learning rate", 0)
    min_lr: float = setting(0.0, "learning rate at the end", 0)
    sched: str = setting("cosine", "timm schedule of the learning rate", choices=("cosine", "poly", "constant"))
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


def _checked(item: dataclasses.Field, value: Any) -> Any:
    """The value of one field, a number read as the field's type."""
    name, meta = item.name.replace("_", "-"), item.metadata
    options = get_args(item.type) if get_origin(item.type) is types.UnionType else (item.type,)
    if value is None:
        if type(None) in options:
            return None
        raise InputError(f"{name} is empty: give a {options[0].__name__}")
    kind: Any = options[0]
    try:
        if kind is bool:
            ok = isinstance(value, bool)
        elif kind is str:
            ok = isinstance(value, str)
        else:
            ok = not isinstance(value, bool) and kind(value) == float(value)
            value = kind(value) if ok else value
    except (TypeError, ValueError, OverflowError):
        ok = False
    if not ok:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        raise InputError(f"{name} {value!r} is not {wanted}")
    low, high, choices = meta["low"], meta["high"], meta["choices"]
    if kind is float and value == float("inf"):
        raise InputError(f"{name} {value} is not a finite number")
    if low is not None and value < low:
        raise InputError(f"{name} {value} is too small: it must be at least {low}")
    if high is not None and value > high:
        raise InputError(f"{name} {value} is too large: it must be at most {high}")
    if choices and value not in choices:
        raise InputError(f"{name} {value!r} is unknown: use {_options(choices)}")
    return value


def _options(values: Sequence[Any]) -> str:
    names = [str(value) for value in values]
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


def shipped_folder(name: str) -> Path:
    """Where data that we ship lies (recipes, hub_configs): in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parents[1] / name


def with_reachable_data(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a record, with the Hub's id of a data set where its local copy is not on this machine."""
    if settings["dataset_id"] and not Path(settings["dataset"]).exists():
        return {**settings, "dataset": settings["dataset_id"], "dataset_id": None}
    return settings


def shipped_recipes() -> dict[str, Path]:
    """Files of the recipes that we ship, by name."""
    return {file.stem: file for file in sorted(shipped_folder("recipes").glob("*.yaml"))}


def load_recipe(name: str, config_class: type[ConfigT]) -> dict[str, Any]:
    """Settings of a recipe for one kind of run.

    A recipe is a YAML file: settings that search and training share at the top, their own under `search:` and
    `train:`. Every key of all of them is checked, whichever is asked for.

    Args:
        name: the name of a recipe that we ship, or a file.
        config_class: `SearchConfig` or `TrainConfig`.

    Raises:
        InputError: if there is no such recipe, it is not a mapping, or a key is unknown.
    """
    path = Path(name)
    if not path.is_file():
        shipped = shipped_recipes()
        if name not in shipped:
            raise InputError(f"recipe {name!r} is neither a file nor one of {', '.join(shipped)}")
        path = shipped[name]
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"recipe {name} is not a mapping of settings")
    sections = {}
    for section in ("search", "train"):
        part = content.pop(section, None) or {}
        if not isinstance(part, dict):
            raise InputError(f"recipe {name}: {section} is not a mapping of settings")
        sections[section] = part
    for keys, known in ((content, DataConfig), (sections["search"], SearchConfig), (sections["train"], TrainConfig)):
        for key in keys:
            if key not in _names(known):
                raise InputError(f"recipe {name} has the unknown setting {key!r}: {_hint(str(key), known)}")
    return {"recipe": name, **content, **sections["search" if config_class is SearchConfig else "train"]}


def _names(config_class: type[DataConfig]) -> list[str]:
    return [item.name for item in dataclasses.fields(config_class) if item.name != "recipe"]


def _hint(key: str, known: type[DataConfig]) -> str:
    """What the writer of a recipe may have meant by a setting that is unknown where it stands."""
    homes = [section for section, home in (("search", SearchConfig), ("train", TrainConfig)) if key in _names(home)]
    if homes:
        return f"it belongs under {' or '.join(homes)}"
    close = difflib.get_close_matches(key, _names(known), 1)
    return f"did you mean {close[0]}?" if close else f"see --help for the {len(_names(known))} that exist"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (see --help)")


def add_push_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how to push to the Hub."""
    parser.add_argument("--private", action="store_true", help="make a new Hub repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch of the Hub repository")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing")


def build_parser(config_class: type[DataConfig], description: str) -> argparse.ArgumentParser:
    """A parser with one flag for every setting; flags not given are absent from the result."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--output", help="folder of this run; a new one under runs/ if not given")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument("--push-to-hub", metavar="USER/REPO", help="push the result to this repository at the end")
    add_push_flags(parser)
    for item in dataclasses.fields(config_class):
        meta, flag = item.metadata, "--" + item.name.replace("_", "-")
        default = "" if item.default is None else f" (default: {item.default})"
        help_text = meta["help"].replace("%", "%%") + default
        if item.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            metavar = "|".join(map(str, meta["choices"])) if meta["choices"] else item.name.split("_")[-1].upper()
            parser.add_argument(flag, metavar=metavar, help=help_text)
    return parser


def _from_text(item: dataclasses.Field, text: Any) -> Any:
    """A flag's text as YAML would read it, for a field that is not text itself."""
    if not isinstance(text, str) or item.type is str or item.type == str | None:
        return text
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def build_config(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """A checked config from settings of a recipe, flags or a file; text is read as the setting's type."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise InputError(f"unknown setting {unknown[0]!r}")
    return config_class(**{name: _from_text(fields[name], value) for name, value in values.items()}).check()
