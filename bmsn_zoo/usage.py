"""The commands' lines. --help and mistakes are answered before torch and timm are imported, which takes seconds."""

import argparse
import os
import signal
import sys
from pathlib import Path

from .command import run_command
from .config import (
    Parser,
    SearchConfig,
    TrainConfig,
    add_push_flags,
    build_config,
    build_parser,
    load_recipe,
    over_recipe,
)
from .launch import check_launch

_RUNS: dict[str, type[SearchConfig] | type[TrainConfig]] = {"search": SearchConfig, "train": TrainConfig}
_ABOUT = {
    "search": "Search where a convolutional network should downsample.",
    "train": "Train one pooling layout from scratch.",
    "hub": "Push models and searches to the Hugging Face Hub, and add found models to the zoo.",
    "evaluate": "Measure the accuracy of a model of the zoo, or of any model folder, again.",
    "compare": "Compare finished searches with each other, or play all strategies on a table of published accuracies.",
    "report": "Draw the pictures of runs, and print their tables.",
}


def parser_of(command: str) -> argparse.ArgumentParser:
    """The command line of one of our modules."""
    if command in _RUNS:
        parser = build_parser(_RUNS[command], _ABOUT[command])
        if sys.argv[:1] == ["-m"]:
            parser.prog = f"python -m bmsn_zoo.{command}"
        return parser
    parser = Parser(prog=f"python -m bmsn_zoo.{command}", description=_ABOUT[command])
    if command == "evaluate":
        parser.add_argument("model", help="a model of the zoo, a model folder, or the run folder of a training")
        parser.add_argument("--dataset", help="where its data set is, if not where it was trained from")
    elif command == "compare":
        parser.add_argument(
            "run", nargs="*", metavar="RUN_FOLDER", help="of a finished search; or USER/REPO on the Hub"
        )
        parser.add_argument("--benchmark", metavar="NAME", help="table to play on, such as cifar10-resnet20")
        parser.add_argument("--seeds", type=int, default=3, metavar="N", help="plays of each strategy (default: 3)")
        parser.add_argument(
            "--output", type=Path, metavar="FILE", help="also write the table as .md, the plays as .csv"
        )
    elif command == "report":
        parser.add_argument("run", nargs="+", type=Path, metavar="RUN_FOLDER", help="of a finished search or training")
    else:
        commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        single = commands.add_parser("push", help="push a model folder or a finished search to the Hub")
        single.add_argument("folder")
        single.add_argument("repo_id", metavar="USER/REPO")
        add_push_flags(single)
        every = commands.add_parser("push-all", help="push every model of the zoo")
        every.add_argument("org")
        add_push_flags(every)
        new = commands.add_parser("add", help="make a model of the zoo from a finished training")
        new.add_argument("run", metavar="RUN_FOLDER")
        new.add_argument("name")
        new.add_argument("--default", metavar="NAME", help="model with the default layout to compare with in the card")
    return parser


def started_command() -> str:
    """Which of our modules or scripts python is starting; empty if another program imports this package."""
    if sys.argv[:1] == ["-m"]:  # as long as python looks for the module
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m").rpartition("bmsn_zoo.")[2]
    script = Path(sys.argv[0] if sys.argv else "").absolute()
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
