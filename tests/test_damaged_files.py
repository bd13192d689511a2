"""Over a thousand damaged files: every reader of ours gives a right result or one line, and none takes long."""

import random
import re
import shutil
import time

import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from small_runs import COMMON, FOUND

from bmsn_zoo import InputError, hub, one_shot, report
from bmsn_zoo import searching as search_module
from bmsn_zoo.config import SearchConfig, build_config, load_recipe, shipped_folder
from bmsn_zoo.data import DataSource
from bmsn_zoo.model_folder import load_model
from bmsn_zoo.models.found import register_folder
from bmsn_zoo.optimizer import create_optimizer
from bmsn_zoo.results import SearchResult, TrainResult
from bmsn_zoo.run_folder import load_tensors, load_training_state, open_run, resolve_config
from bmsn_zoo.search_space import SearchSpace
from bmsn_zoo.supernet import Mixture

VALUES = [b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"true", b"null", b'"x"', b"[" * 100_000, b"{}", b".inf"]


def somewhere(content, rng):
    return rng.randrange(len(content) + 1)


def cut(content, rng):
    return content[: somewhere(content, rng)]


def flip_bits(content, rng):
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 8])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def replace_part(content, rng):
    """A part of up to 64 bytes becomes zeros, noise, nothing, or another part."""
    start = somewhere(content, rng)
    part = content[start : start + rng.randint(1, 64)]
    other = somewhere(content, rng)
    new = rng.choice([bytes(len(part)), rng.randbytes(len(part)), b"", b"\xff\xfe", content[other : other + 64]])
    return content[:start] + new + content[start + len(part) :]


def replace_value(content, rng):
    found = [
        match.span() for match in re.finditer(rb"[-+.\d]+(?:e-?\d+)?|true|false|null|\"[^\"\n]*\"", content[:20_000])
    ]
    if not found:
        return cut(content, rng)
    start, end = rng.choice(found)
    return content[:start] + rng.choice(VALUES) + content[end:]


def drop_line(content, rng):
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def other_file(content, rng):
    return rng.choice(
        [b"", b"\n", b"{}", b"[]", b"null", b"\x80\x05.", b"[" * 100_000, b"a: " * 9000, rng.randbytes(999)]
    )


WAYS = [cut, flip_bits, flip_bits, replace_part, replace_part, replace_value, replace_value, drop_line, other_file]


def damage_all(file, count, read, right):
    """Damage one file in many ways, one after the other; returns how many of them changed what is read."""
    whole, noticed, result = file.read_bytes(), 0, read()
    assert right(result), "the file itself is read"
    first = repr(result)
    try:
        for seed in range(count):
            rng = random.Random(f"{file.name} {seed}")
            way = rng.choice(WAYS)
            file.write_bytes(way(whole, rng))
            started = time.monotonic()
            try:
                result = read()
            except InputError as error:
                noticed += 1
                assert "\n" not in str(error) and len(str(error)) < 1000, (seed, way.__name__, str(error))
            except Exception as error:
                raise AssertionError(f"{file.name} damaged by {way.__name__}, seed {seed}") from error
            else:
                assert right(result), (seed, way.__name__)
                noticed += repr(result) != first
            assert time.monotonic() - started < 5, (seed, way.__name__)
    finally:
        file.write_bytes(whole)
    assert noticed
    return noticed


@pytest.fixture(scope="module")
def copies(runs, tmp_path_factory):
    """Copies of the small runs that may be damaged."""
    return shutil.copytree(runs.base, tmp_path_factory.mktemp("damaged") / "runs")


@pytest.fixture(scope="module")
def stopped(image_folder, tmp_path_factory):
    """A search that was ended after its second epoch."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    settings = ["--dataset", str(image_folder), *COMMON, "--epochs", "2", "--mixture-size", "1"]

    def end(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module._Search, "_evaluate_all", end)
        with pytest.raises(KeyboardInterrupt):
            search_module.main([*settings, "--output", str(output)])
    return output


# results, configs and recipes


@pytest.mark.parametrize("folder", ["search", "zoo/" + FOUND])
def test_search_results(folder, copies):
    whole = SearchResult.read(copies / folder / "search.json")

    def ranked(result):
        return [(entry.layout, entry.accuracy, entry.supernet) for entry in result.ranking]

    damage_all(
        copies / folder / "search.json",
        80,
        lambda: hub.load_search(str(copies / folder)),
        lambda result: ranked(result) == ranked(whole) and result.layouts == whole.layouts,
    )


def test_training_results(copies):
    file = copies / "found" / "metrics.json"
    damage_all(file, 120, lambda: TrainResult.read(file), lambda result: isinstance(result, TrainResult))


@pytest.mark.parametrize("name", ["digits-resnet20", "cifar100-resnet20"])
def test_recipes(name, tmp_path):
    file = tmp_path / "recipe.yaml"
    shutil.copy(shipped_folder("recipes") / f"{name}.yaml", file)
    damage_all(
        file,
        80,
        lambda: build_config(SearchConfig, load_recipe(str(file), SearchConfig)),
        lambda config: isinstance(config, SearchConfig),
    )


# a stopped run


def resumed(folder):
    """What a search goes on with: its settings, and the state of its last whole checkpoint."""
    config = resolve_config(SearchConfig, {}, folder, True)
    PartialState()
    with open_run("search", folder, True) as run:
        checkpoint = run.checkpoint(run.epoch)
        (supernet,) = Mixture(SearchSpace(config.model), 1, 4, config.in_chans, 0).supernets
        optimizer = create_optimizer(supernet, config)
        load_training_state(checkpoint / "supernet-0.safetensors", supernet, optimizer)
        state = {**supernet.state_dict(), **load_tensors(checkpoint / "strategy.safetensors")}
        return config.settings(), run.epoch, {name: tensor.clone() for name, tensor in state.items()}


FILES = [
    ("config.yaml", 70),
    ("run.json", 70),
    *(
        pytest.param(f"checkpoint-2/{name}", 25, marks=pytest.mark.slow)
        for name in ("complete.json", "supernet-0.safetensors", "strategy.safetensors", "metrics.jsonl")
    ),
]


@pytest.mark.parametrize(("name", "count"), FILES, ids=lambda value: str(value).split("/")[-1])
def test_stopped_runs(name, count, stopped):
    settings, last, state = resumed(stopped)
    assert last == 2
    aside = stopped / "checkpoint-2"
    aside.rename(stopped / "aside")
    whole = {2: state, 1: resumed(stopped)[2]}
    (stopped / "aside").rename(aside)

    def right(result):
        return result[0] == settings and all(
            torch.equal(whole[result[1]][key], value) for key, value in result[2].items()
        )

    damage_all(stopped / name, count, lambda: resumed(stopped), right)


@pytest.mark.parametrize("name", ["supernet-0", "strategy"])
def test_tensors_without_a_checksum(name, stopped):
    file = stopped / "checkpoint-2" / f"{name}.safetensors"
    (supernet,) = Mixture(SearchSpace("bmsn_resnet20"), 1, 4, 3, 0).supernets
    optimizer = create_optimizer(supernet, SearchConfig())

    def read():
        load_training_state(file, supernet, optimizer)
        return supernet.state_dict()

    finite = lambda tensors: all(tensor.isfinite().all() for tensor in tensors.values())  # noqa: E731
    damage_all(file, 50, read if name == "supernet-0" else lambda: load_tensors(file), finite)


# models and searches that others give away


@pytest.mark.slow
def test_supernets(copies):
    result, whole = hub.load_supernets(str(copies / "search"))
    mixture = Mixture(SearchSpace(result.model), 2, 4, result.dataset.in_chans, 0)
    config = SearchConfig(mixture_size=2)

    def read():
        one_shot.start_mixture_from(str(copies / "search"), mixture, config)
        return mixture.state_dict()

    damage_all(
        copies / "search" / "supernets.safetensors",
        50,
        read,
        lambda state: state.keys() == whole.keys() and all(tensor.isfinite().all() for tensor in state.values()),
    )


@pytest.mark.parametrize(
    ("name", "count"), [("config.json", 70), ("model.safetensors", 40), ("metrics.json", 30), ("README.md", 40)]
)
def test_model_folders(name, count, copies):
    folder = copies / "found" / "model"
    whole = load_model(folder)

    def read():
        hub._contents(folder, "someone/net")
        return load_model(folder)

    def right(model):
        state = model.state_dict()
        equal = all(torch.equal(tensor, state[key]) for key, tensor in whole.state_dict().items())
        return equal and model.layout == whole.layout

    damage_all(folder / name, count, read, right)


@pytest.mark.filterwarnings("ignore:Overwriting")
def test_folders_of_found_models(copies):
    folder = copies / "zoo" / FOUND
    renamed = folder.rename(folder.with_name("bmsn_resnet20_damaged"))
    try:
        damage_all(
            renamed / "config.json",
            60,
            lambda: register_folder(renamed),
            lambda _: timm.is_model("bmsn_resnet20_damaged"),
        )
    finally:
        renamed.rename(folder)


# pictures and tables, and decoded images


@pytest.mark.parametrize(
    ("name", "count"),
    [("search/metrics.jsonl", 30), ("found/metrics.jsonl", 30), ("search/search.json", 20), ("found/metrics.json", 30)],
)
def test_reports(name, count, copies, capfd, monkeypatch):
    monkeypatch.setattr(report, "_save", lambda figure, path: None)  # drawing is not what is tried

    def read():
        code = report.main([str((copies / name).parent)])
        lines = capfd.readouterr().err.splitlines()
        if code == 2:
            assert len(lines) == 1
            raise InputError(lines[0])
        return code

    damage_all(copies / name, count, read, lambda code: code == 0)


def test_the_pixel_cache(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    source = DataSource(SearchConfig(dataset=str(image_folder), workers=0), 1)

    def pixels(data):
        return torch.cat([images for images, _ in data.images.batches([np.arange(64)])])

    whole = source.train()
    (file,) = (tmp_path / "bmsn_zoo_pixels").iterdir()
    kept = file.read_bytes()
    for seed in range(60):
        rng = random.Random(seed)
        file.write_bytes(rng.choice(WAYS)(kept, rng))
        started = time.monotonic()
        data = source.train()
        assert torch.equal(pixels(data), pixels(whole)), seed
        assert (data.mean, data.std, data.fingerprint) == (whole.mean, whole.std, whole.fingerprint)
        assert time.monotonic() - started < 5
