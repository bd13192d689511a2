"""The commands' lines. --help and mistakes are answered before torch and timm are imported, which takes seconds."""

import argparse
import difflib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import run_command
from .config import (
    DataConfig,
    SearchConfig,
    TrainConfig,
    about,
    build_config,
    kind_of,
    load_recipe,
    over_recipe,
)
from .errors import InputError, brief
from .launch import check_launch

_RUNS: dict[str, type[SearchConfig] | type[TrainConfig]] = {"search": SearchConfig, "train": TrainConfig}
_MODULES = {"search": "searching", "train": "training"}  # others are in a module of their name
_ABOUT = {
    "search": "Search where a convolutional network should downsample.",
    "train": "Train one layout, from scratch, or from the weights of --init-from or --pretrained.",
    "hub": "Push models and searches to the Hugging Face Hub, and add found models to the zoo.",
    "evaluate": "Measure the accuracy of a model of the zoo, or of any model folder, again.",
    "predict": "Print the most probable labels of images.",
    "compare": "Compare finished searches, layouts of one with several seeds, or strategies on published accuracies.",
    "runs": "List runs: what they found, or how far they are and how to resume them.",
    "report": "Show runs: tables here, pictures in their folders, and one HTML page of all of them.",
}
_EXAMPLES = {
    "search": "--dataset my_photos --epochs 100 --output runs/photos",
    "train": "--from-search runs/photos --pick best_within_default_macs",
    "hub": "push runs/photos-trained my-name/photos",
    "evaluate": "bmsn_resnet20_cifar10",
    "predict": "runs/photos-trained photo.jpg more_photos",
    "compare": "runs/photos-seed0 runs/photos-seed1",
    "runs": "",
    "report": "runs/photos",
}
# what `--help` shows of many flags; `--help-all` shows every one
_FIRST = {
    "search": "dataset recipe model strategy mixture-size epochs batch-size seed output resume",
    "train": "dataset from-search pick layout epochs batch-size lr seed output resume",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = self._flags()
            bare = not unknown[0].startswith("-") and "--dataset" in flags
            close = ["--dataset FOLDER"] if bare else difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            raise InputError(f"unknown argument {brief(unknown[0])}: {hint}")
        return known

    def _flags(self) -> list[str]:
        """All flags, those of commands below this one included."""
        below = [c for a in self._actions if isinstance(a, argparse._SubParsersAction) for c in a.choices.values()]
        return [*self._option_string_actions, *(flag for command in below for flag in command._flags())]


class _Help(argparse.Action):
    """Prints the flags that matter most; all of them as `--help-all`."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        if given[-1] != "--help-all":
            for group in parser._action_groups[3:]:  # behind argparse's own two, and ours of the first flags
                for action in group._group_actions:
                    action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def add_push_flags(parser: argparse._ActionsContainer) -> None:
    """The flags that say how to push to the Hub."""
    parser.add_argument("--private", action="store_true", help="make a new Hub repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch of the Hub repository")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing")


def build_parser(
    config_class: type[DataConfig], description: str, first: Sequence[str] = (), example: str = ""
) -> argparse.ArgumentParser:
    """A parser with one flag for every setting; flags not given are absent from the result.

    Args:
        first: flags that `--help` shows; `--help-all` shows all.
        example: a line below them.
    """
    parser = Parser(
        usage="%(prog)s [--FLAG VALUE ...]", description=description, epilog=example, allow_abbrev=False,
        add_help=False, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    of_all = (
        "what matters most",
        "data and model",
        config_class.__name__.removesuffix("Config").lower(),
        "this machine",
        "Hub",
    )
    most, data, own, machine, pushing = (parser.add_argument_group(title) for title in of_all)
    most.add_argument("--help", "-h", "--help-all", action=_Help, nargs=0, help="these flags, or all of them")
    most.add_argument("--output", help="folder of this run; a new one under runs/ if not given")
    most.add_argument("--resume", action="store_true", help="continue the run in --output")
    pushing.add_argument("--push-to-hub", metavar="USER/REPO", help="push the result to this repository at the end")
    add_push_flags(pushing)
    machine.add_argument(
        "--dry-run",
        action="store_true",
        help="print settings, layouts, time and memory, as a few steps show them, and stop; nothing is written",
    )
    loud = machine.add_mutually_exclusive_group()
    loud.add_argument("--quiet", action="store_true", help="print the result and errors alone")
    loud.add_argument("--verbose", action="store_true", help="also log versions, settings and every step")
    for name, field in config_class.model_fields.items():
        flag, choices = "--" + name.replace("_", "-"), about(config_class, name)["choices"]
        default = "" if field.default is None else f" (default: {field.default})"
        help_text = str(field.description).replace("%", "%%") + default
        rest = machine if about(config_class, name)["environment"] else data if name in DataConfig.model_fields else own
        group = most if flag[2:] in first else rest
        if kind_of(config_class, name) is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            metavar = "|".join(map(str, choices)) if choices else name.split("_")[-1].upper()
            group.add_argument(flag, metavar=metavar, help=help_text)
    return parser


def parser_of(command: str) -> argparse.ArgumentParser:
    """The command line of one of our modules."""
    example = f"example:\n  {start_of(command)} {_EXAMPLES[command]}".rstrip()
    script = Path(sys.argv[0]).name if sys.argv else ""
    prog = script if script.startswith("bmsn-") else f"python -m bmsn_zoo.{_MODULES.get(command, command)}"
    if command in _RUNS:
        run = build_parser(_RUNS[command], _ABOUT[command], _FIRST[command].split(), example)
        run.prog = prog if sys.argv[:1] == ["-m"] else run.prog
        return run
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=_ABOUT[command], epilog=example, formatter_class=raw)
    if command == "evaluate":
        parser.add_argument("model", help="a model of the zoo, a model folder, or the run folder of a training")
        parser.add_argument("--dataset", help="where its data set is, if not where it was trained from")
        parser.add_argument(
            "--output", type=Path, metavar="FOLDER", help="also write every class's accuracy, and a confusion picture"
        )
        parser.add_argument(
            "--results-file", type=_new_file, metavar="FILE", help="also put its row, in timm's columns, into this CSV"
        )
    elif command == "predict":
        parser.add_argument("model", help="of the zoo, a model folder, the run folder of a training, or USER/REPO")
        parser.add_argument("image", nargs="+", type=Path, help="an image, or a folder of images")
        parser.add_argument("--top", type=int, default=5, metavar="N", help="labels for each image (default: 5)")
    elif command == "compare":
        parser.add_argument(
            "run", nargs="*", metavar="RUN_FOLDER", help="of a finished search; or USER/REPO on the Hub"
        )
        parser.add_argument("--benchmark", metavar="NAME", help="table to play on, such as cifar10-resnet20")
        parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each strategy or layout (default: 3)")
        parser.add_argument(
            "--layouts",
            metavar="NAMES",
            help="train these alone: default,within,best or layouts; the first is compared",
        )
        parser.add_argument("--from-search", type=Path, metavar="RUN_FOLDER", help="search that --layouts are of")
        parser.add_argument("--epochs", type=int, help="of each of --layouts; 30, more for few images")
        parser.add_argument("--jobs", type=int, help="trainings of --layouts side by side")
        parser.add_argument("--cluster", help="dask cluster that trains --layouts: dask://HOST:PORT")
        parser.add_argument(
            "--output", type=_new_file, metavar="FILE", help="also write the table as .md, the plays as .csv"
        )
    elif command == "runs":
        parser.add_argument("folder", nargs="?", type=Path, help="where their folders are (default: runs)")
    elif command == "report":
        parser.add_argument("run", nargs="+", type=Path, metavar="RUN_FOLDER", help="of a finished search or training")
        parser.add_argument(
            "--output",
            type=_new_file,
            metavar="FILE",
            help="the page (default: report.html in the first run folder)",
        )
    else:
        commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        single = commands.add_parser("push", help="push a model folder or a finished search to the Hub")
        single.add_argument("folder")
        single.add_argument("repo_id", metavar="USER/REPO")
        every = commands.add_parser("push-all", help="push every model of the zoo")
        every.add_argument("org")
        for pushing in (single, every):
            add_push_flags(pushing)
            pushing.add_argument("--license", metavar="NAME", help="licence that cards name instead, such as mit")
        new = commands.add_parser("add", help="make a model of the zoo from a finished training")
        new.add_argument("run", metavar="RUN_FOLDER")
        new.add_argument("name")
        new.add_argument("--default", metavar="NAME", help="model with the default layout to compare with in the card")
        new.add_argument(
            "--repeats",
            nargs="+",
            default=[],
            metavar="RUN_FOLDER",
            help="the same training with other seeds, whose accuracies the card tells too",
        )
    return parser


def _new_file(text: str) -> Path:
    """A file to write, whose folder is made if needed: said before what it is to hold is computed."""
    path = Path(text)
    if path.is_dir() or (above := next(folder for folder in path.absolute().parents if folder.exists())).is_file():
        fault = "is a folder" if path.is_dir() else f"lies in {above}, which is a file"
        raise argparse.ArgumentTypeError(f"{text} {fault}: give the name of a file")
    return path


def start_of(command: str) -> str:
    """How to start another of our commands, for people to copy: in the way that this one was started."""
    script = Path(sys.argv[0] if sys.argv else "").absolute()
    if script.name.startswith("bmsn-"):
        return f"bmsn-{command}"
    if command not in _RUNS:
        return f"python -m bmsn_zoo.{command}"
    if script.parent == Path(__file__).absolute().parents[1] and script.stem in _RUNS:
        return f"accelerate launch {shlex.quote(os.path.relpath(script.with_name(f'{command}.py')))}"
    return f"accelerate launch -m bmsn_zoo.{_MODULES[command]}"


def wrapped(command: str) -> str:
    """A command within 80 columns, where its words allow, broken before flags so that it can still be copied."""
    lines: list[str] = []
    for number, word in enumerate(map(shlex.quote, shlex.split(command))):
        if word.startswith("--") or not number:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    first, *flags = lines
    lines = [f"    {first}"]
    for flag in flags:
        if len(lines[-1]) + len(flag) > 77:
            lines[-1] += " \\"
            lines.append(f"        {flag}")
        else:
            lines[-1] += f" {flag}"
    return "\n".join(lines)


def started_command() -> str:
    """Which of our commands, modules or scripts python is starting; empty if another program imports this package."""
    if sys.argv[:1] == ["-m"]:  # as long as python looks for the module
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m").rpartition("bmsn_zoo.")[2]
        return next((command for command, name in _MODULES.items() if name == module), module)
    script = Path(sys.argv[0] if sys.argv else "").absolute()
    if script.name.startswith("bmsn-"):  # as pip installs it
        return script.stem.removeprefix("bmsn-")
    return script.stem if script.parent == Path(__file__).absolute().parents[1] else ""


def answer_early() -> None:
    """Exit if a command was asked for help only, or with settings that it does not understand."""
    command = started_command()
    if command in _ABOUT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the middle of an import
        if code := run_command(lambda: _check(command)):
            sys.exit(code)


def _check(command: str) -> None:
    given = vars(parser_of(command).parse_args())
    if command in (*_RUNS, "evaluate"):
        check_launch(os.environ, command == "search")
    if kind := _RUNS.get(command):
        recipe = load_recipe(given["recipe"], kind) if "recipe" in given else {}
        build_config(kind, over_recipe(recipe, {name: given[name] for name in given if name in kind.model_fields}))
