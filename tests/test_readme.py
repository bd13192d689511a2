"""The README stays true: its commands parse, its files exist, its snippets run."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
from PIL import Image

from bmsn_zoo.card import portable
from bmsn_zoo.config import SearchConfig, TrainConfig, build_config, load_recipe
from bmsn_zoo.results import Repeat, TrainResult
from bmsn_zoo.usage import build_parser, parser_of

ROOT = Path(__file__).parents[1]
SOURCE = "bmsn_resnet20_cifar100"
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    for command in ("compare", "evaluate", "report", "predict"):
        known |= set(parser_of(command)._option_string_actions)
    (commands,) = parser_of("hub")._subparsers._group_actions
    for parser in commands.choices.values():
        known |= set(parser._option_string_actions)
    others = {
        "--num_processes",
        "--standalone",
        "--nproc-per-node",
        "--model",
        "--multi_gpu",
        "--num_machines",
        "--machine_rank",
        "--main_process_ip",
        "--main_process_port",
        "--logdir",
    }  # of launchers, timm, tensorboard
    pages = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))]
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", "\n".join(pages)))
    assert mentioned - known - others == set()


def test_every_file_exists():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_python_snippets_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("photo.jpg")
    for block in blocks:
        lines = [line for line in block.splitlines() if "local-dir:" not in line and "hf-hub:" not in line]
        exec(compile("\n".join(lines), "README.md", "exec"), {})


def test_the_two_set_up_commands_are_those_of_ci():
    """CI runs what the README promises."""
    ci = (ROOT / ".ci" / "run").read_text()
    for command in (
        "pip install -e . && accelerate launch search.py",
        "pip install -e '.[test]' && pytest -n 2 -m \"not slow\"",
    ):
        assert command in README
        assert command.replace("pip install", "pip install --quiet") in ci


def test_every_number_comes_from_a_record():
    """Those of the zoo from its metrics.json, those of speed from the committed measurements."""
    summary = runpy.run_path(str(ROOT / "benchmarks" / "summary.py"))
    native = summary["load"](summary["COLUMNS"]["bf16 computed natively"])
    evidence = runpy.run_path(str(ROOT / "benchmarks" / "evidence.py"))
    tuned = json.loads((ROOT / "results" / "fine_tuning.json").read_text(encoding="utf-8"))
    means = {start: [100 * run["accuracy"] for run in tuned[start]["runs"]] for start in ("scratch", SOURCE)}
    scratch, started = (f"{mean(values):.1f} ± {stdev(values):.1f} %" for values in (means["scratch"], means[SOURCE]))
    claims = [
        evidence["models"](evidence["zoo"]()),
        evidence["searches"](evidence["load"](ROOT / "results" / "searches")),
        f"{started} of the test images are classified correctly, from scratch {scratch} (n = 3 seeds",
        "--lr 0.01",
        summary["table"](),
        f"makes it {native['evaluation_prefix_tree_alone']['ratio']:.1f} times faster for ResNet20",
        f"peak at {native['memory_of_eight_supernets']['peak_memory_mib'] / 1024:.1f} GiB",
        f"it would be {native['search_step_if_only_convolutions_took_time']['median']:.1f} times faster",
        f"made a step {1 / native['compiled_units_speedup']['median']:.1f} times slower",
        f"read from the cache {native['loading']['first_over_cached']:.0f} times faster",
    ]
    text = README.replace("\n", " ")
    for claim in claims:
        claim = claim.replace("\n", " ")
        assert claim in text
        text = text.replace(claim, "")
    assert 0.57 < native["time_of_a_step"]["convolutions"] < 0.65 and "three fifths of a step" in text
    assert 1.8 < native["mixture_parallel_two_processes"]["speedup"] < 2.3 and "about twice the steps" in text
    assert abs(native["loading"]["first_over_decoding"] - 1) < 0.1 and "in the time of decoding it once" in text
    text = re.sub(r"2306\.11982|87\.5 % to 92\.0 %|--lr [.\d]+", "", text)  # the paper and its own numbers, settings
    assert re.findall(r"\d+\.\d+", text) == []


@pytest.mark.slow
def test_timms_scripts_know_our_models(tmp_path):
    """By the one line that the README gives, which starts a script of timm's from its folder."""
    (command,) = re.findall(r"^python -c .*$", README, re.M)
    script = "import argparse, timm\nparser = argparse.ArgumentParser()\nparser.add_argument('--model')\n"
    (tmp_path / "validate.py").write_text(script + "print(timm.create_model(parser.parse_args().model).layout)\n")
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    expected = TrainResult.read(ROOT / "hub_configs" / words[-1] / "metrics.json")
    assert done.stdout == f"{expected.layout}\n", done.stderr


def test_the_tables_of_models_and_the_readmes_of_searches_are_those_of_their_records():
    evidence = runpy.run_path(str(ROOT / "benchmarks" / "evidence.py"))
    results = evidence["zoo"]()
    assert evidence["with_tables"](README, results, evidence["load"](ROOT / "results" / "searches")) == README
    written = (ROOT / "results" / "zoo.md").read_text(encoding="utf-8")
    assert written == evidence["zoo_page"](results, ROOT / "results" / "recipe")
    repeats = [
        Repeat(seed=seed, test_accuracy=accuracy, test_loss=1, segments=results[SOURCE].segments)
        for seed, accuracy in ((1, 0.61), (2, 0.62))
    ]
    several = {name: one.model_copy(update={"repeats": repeats, "test_accuracy": 0.6}) for name, one in results.items()}
    assert "| 60.00 % | 61.00 ± 1.00 % over 3 seeds |" in evidence["models"](several)
    assert "| 0, 1, 2 | 60.00 %, 61.00 %, 62.00 % | 61.00 ± 1.00 % | +0.00 points (95 % interval -2.27 to +2.27) |" in (
        evidence["gains"](several)
    )


def test_the_tables_of_searches_are_those_of_their_records():
    """The page is what its command writes; rows of the development are not read against the truth."""
    evidence = runpy.run_path(str(ROOT / "benchmarks" / "evidence.py"))
    rows = evidence["load"](ROOT / "results" / "searches")
    alone = evidence["trained_alone"](ROOT / "results" / "alone")
    assert (ROOT / "results" / "searches.md").read_text(encoding="utf-8") == evidence["page"](rows, alone)
    for results in (*rows.values(), *alone.values()):
        for result in results.values():
            assert portable(result) == result, "a record names folders of the machine that it was made on"
    developed = evidence["page"]({f"dev-{name}": seeds for name, seeds in rows.items()}, alone)
    assert "Not read against the published table" in developed and "| dev-uniform | " in developed
    assert developed.count(" tau ") == 2, "a table of the development has a column of the truth"  # of the final rows
