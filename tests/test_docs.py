"""The pages stay true: their commands parse, their snippets run, their pictures are there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import bmsn_zoo
from bmsn_zoo.config import SearchConfig, TrainConfig, build_config
from bmsn_zoo.search_space import SearchSpace
from bmsn_zoo.strategies import STRATEGIES
from bmsn_zoo.usage import build_parser, parser_of

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
SCRIPTS = {"search.py": SearchConfig, "train.py": TrainConfig}


def commands(pattern):
    text = "\n".join(PAGES.values()).replace("NAME`", "uniform`").replace("FOLDER`", "photos`")
    return sorted(set(re.findall(pattern, text)))


@pytest.mark.parametrize("command", commands(r"(?:search|train)\.py(?: --[^`\n&#]*)?"))
def test_every_script_is_accepted(command):
    script, *arguments = shlex.split(command)
    given = vars(build_parser(SCRIPTS[script], "").parse_args(arguments))
    build_config(SCRIPTS[script], {name: given[name] for name in given if name in SCRIPTS[script].model_fields})


@pytest.mark.parametrize("command", commands(r"python -m bmsn_zoo\.[a-z]+[^`\n]*"))
def test_every_module_is_accepted(command):
    module, *arguments = shlex.split(command.split("bmsn_zoo.")[1])
    parser_of(module).parse_args(arguments)


def test_every_page_is_in_the_contents_and_every_picture_is_there():
    contents = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert {page for entry in contents for page in entry.values()} == set(PAGES)
    for page in PAGES.values():
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page):
            assert (DOCS / picture).stat().st_size > 1000


def test_the_strategy_of_the_pages_draws_alike_after_resuming(monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGES["own-strategy.md"], re.S)
    monkeypatch.setattr("bmsn_zoo.strategies.STRATEGIES", dict(STRATEGIES))
    names = {}
    exec(compile(snippet, "own-strategy.md", "exec"), names)
    space, config = SearchSpace("bmsn_resnet20"), SearchConfig(mixture_size=2)
    strategy, resumed = (names["Greedy"](space, config) for _ in range(2))
    drawn = []
    for step in range(200):
        drawn.append(strategy.draw(step, step / 200, range(2)))
        strategy.update(drawn[-1], [drawn[-1].layout / 36])
        if step == 99:
            resumed.load_state_dict(strategy.state_dict())
        if step >= 100:
            assert resumed.draw(step, step / 200, range(2)) == drawn[-1]
            resumed.update(drawn[-1], [drawn[-1].layout / 36])
    best = [max(draw.layout for draw in drawn if draw.supernet == m) for m in range(2)]
    share = sum(draw.layout == best[draw.supernet] for draw in drawn[100:]) / 100
    assert 0.35 < share < 0.75


def test_what_the_page_does_in_python_works(image_dataset, tmp_path, monkeypatch):
    """Its snippets one after the other, on a folder of photos, by searches and trainings of one epoch."""
    for number, row in enumerate(image_dataset["train"]):
        (home := tmp_path / "photos" / str(row["label"])).mkdir(parents=True, exist_ok=True)
        row["image"].save(home / f"{number}.png")
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "photos" / "0" / "0.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    short = {"epochs": 1, "mixed_precision": "no"}
    search, train = bmsn_zoo.search, bmsn_zoo.train
    smaller = {**short, "default_layout": "5-5"}
    monkeypatch.setattr(bmsn_zoo, "search", lambda dataset, **flags: search(dataset, **{**flags, **smaller}))
    monkeypatch.setattr(bmsn_zoo, "train", lambda **flags: train(**{**flags, **short}))
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGES["python.md"], re.S):
        exec(compile(snippet, "python.md", "exec"), names)
    assert names["trained"].record.model == "bmsn_resnet20" and len(names["runs"]) == 2
    assert names["accuracies"].shape == (9, 2) and (tmp_path / "accuracy_macs.svg").exists()
    assert len(names["table"]) == 36
