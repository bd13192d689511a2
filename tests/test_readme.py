"""The README stays true: its commands parse, its files exist, its snippets run."""

import re
import shlex
from pathlib import Path

import pytest

from bmsn_zoo.config import SearchConfig, TrainConfig, build_config, build_parser, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:search|train)\.py(?: [^`\n&#]*)?", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    script, *arguments = shlex.split(command)
    config_class = SearchConfig if script == "search.py" else TrainConfig
    given = vars(build_parser(config_class, "").parse_args(arguments))
    for name in ("output", "resume", "help", "push_to_hub", "private", "revision", "create_pr", "onnx"):
        given.pop(name, None)
    recipe = load_recipe(given["recipe"], config_class) if "recipe" in given else {}
    build_config(config_class, {**recipe, **given})


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


def test_every_flag_exists():
    known = set()
    for config_class in (SearchConfig, TrainConfig):
        known |= set(build_parser(config_class, "")._option_string_actions)
    launchers = {"--num_processes", "--standalone", "--nproc-per-node"}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README))
    assert mentioned - known - launchers == set()


def test_every_file_exists():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_python_snippets_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        lines = [line for line in block.splitlines() if "local-dir:" not in line and "hf-hub:" not in line]
        exec(compile("\n".join(lines), "README.md", "exec"), {})


def test_the_two_set_up_commands_are_those_of_ci():
    """CI runs what the README promises."""
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("pip install -e . && accelerate launch search.py", "pip install -e '.[test]' && pytest"):
        assert command in README
        assert command.replace("pip install", "pip install --quiet") in ci
