"""What runs there are, and how to go on with those that are not finished: python -m bmsn_zoo.runs"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .card import percent
from .command import run_command
from .errors import InputError
from .results import SearchResult, TrainResult, TrialResult
from .run_folder import RUNS, RunState
from .usage import parser_of, start_of, wrapped

_WIDTH = 80


def describe_run(folder: Path) -> tuple[list[str], str]:
    """Folder, data, result and state of a run, and the command that resumes it; empty if there is nothing to resume."""
    try:
        state = RunState.read(folder / "run.json", "run.json")
        data = Path(str(state.settings["dataset"])).name
        if state.finished:
            return [str(folder), data, _result(folder), "finished"], ""
        metrics = folder / "metrics.jsonl"
        done = len(metrics.read_text("utf-8").splitlines()) if metrics.exists() else 0
    except (InputError, KeyError, OSError, UnicodeError) as error:
        return [str(folder), "", "", f"damaged: {error}"], ""
    said = f"{done} of {state.settings['epochs']} epochs" if state.settings.get("epochs") else f"{done} epochs"
    if state.kind == "search" and (folder / "trials").exists():
        said = "at its trainings"
    return [str(folder), data, "", said], f"{start_of(state.kind)} --output {shlex.quote(str(folder))} --resume"


def _result(folder: Path) -> str:
    """The layout of a finished run, and its accuracy: of a confirmed search, that of the layout trained alone."""
    if (folder / "trial.json").exists():
        trial = TrialResult.read(folder / "trial.json", "trial.json")
        return f"{trial.layout}, {percent(trial.holdout_accuracy)} held out"
    if (folder / "metrics.json").exists():
        trained = TrainResult.read(folder / "metrics.json", "metrics.json")
        return f"{trained.layout}, {percent(trained.test_accuracy)} on test"
    found = SearchResult.read(folder / "search.json", "search.json")
    entry = found.to_train("best")
    said, choice = "keeps" if found.undecided and found.default else "found", found.trained_alone(entry.layout)
    accuracy = f"{percent(choice.accuracy)} alone" if choice else percent(entry.accuracy)
    return f"{said} {entry.layout}, {accuracy}"


def runs_table(folders: Sequence[Path]) -> str:
    """One line for each run, aligned, with the command that resumes it below; a long folder has a line of its own."""
    runs = [describe_run(folder) for folder in folders]
    rows = [["folder", "data", "layout, accuracy", "state"], *(row for row, _ in runs)]
    widths = [min(30, max(len(row[column]) for row in rows)) for column in range(3)]
    lines = []
    for row, resume in [(rows[0], ""), *runs]:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        if len(row[0]) > widths[0]:
            lines.append(row[0])
            cells[0] = " " * widths[0]
        lines.append("  ".join([*cells, row[3]]).rstrip())
        if len(lines[-1]) > _WIDTH:
            lines[-1:] = ["  ".join(cells).rstrip(), f"  {row[3]}"]
        if resume:
            lines.append(f"  resume it:\n{wrapped(resume)}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("runs")

    def run() -> None:
        home = parser.parse_args(argv).folder or RUNS
        found = sorted(home.glob("*/run.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise InputError(f"no runs in {home}: start one with {start_of('search')}, or give the folder they are in")
        sys.stdout.write(runs_table([file.parent for file in found]))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
