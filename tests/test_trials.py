"""Trials: trainings that are measured on held-out training images, and the plans that are made of them."""

import csv
import os
import re
import signal
import threading
import time
from collections import Counter
from itertools import pairwise
from math import comb
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from bmsn_zoo import hub, reference, report
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.card import portable, search_card
from bmsn_zoo.compare import expected_best
from bmsn_zoo.config import ALONE, SearchConfig
from bmsn_zoo.errors import InputError
from bmsn_zoo.layout import Layout
from bmsn_zoo.results import Confirmation, SearchResult, TrialResult
from bmsn_zoo.run_folder import load_tensors
from bmsn_zoo.search_space import SearchSpace
from bmsn_zoo.trials import PLANS, Trial, confirm, runner

COMMON = ("--batch-size", "16", "--epochs", "1", "--mixed-precision", "no")


def run(module, *arguments):
    """Call a command in this process; returns its exit code."""
    return module.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def closed(image_dataset, tmp_path_factory):
    """The images, with test images that cannot be read."""
    import datasets

    broken = {"bytes": b"no image", "path": None}
    features = image_dataset["train"].features
    bad = datasets.Dataset.from_dict({"image": [broken] * 8, "label": [0, 1, 2, 3] * 2}, features=features)
    folder = tmp_path_factory.mktemp("closed") / "compass"
    datasets.DatasetDict(train=image_dataset["train"], test=bad).save_to_disk(folder)
    return folder


def test_a_trial_is_measured_on_held_out_images_and_never_opens_the_test_images(closed, tmp_path, capsys):
    output = tmp_path / "trial"
    arguments = ("--dataset", closed, "--layout", "4-3-3", "--holdout", "0.5", "--measure", "holdout", *COMMON)
    assert run(train_module, *arguments, "--output", output) == 0
    assert "held-out training images (no test accuracy)" in capsys.readouterr().out
    result = TrialResult.read(output / "trial.json")
    right = load_tensors(output / "right.safetensors")["right"]
    assert len(right) == result.holdout_images == result.train_images == 32
    assert right.sum() / 32 == pytest.approx(result.holdout_accuracy)
    assert result.spent_macs == (3 * 32 + 32) * result.macs
    assert not (output / "metrics.json").exists() and not (output / "model").exists()
    with pytest.raises(InputError, match="neither a model"):
        hub.push(output, "someone/something")
    with pytest.raises(InputError):
        hub.add(output, "bmsn_resnet20_trial", zoo=tmp_path / "zoo")


@pytest.mark.parametrize(
    "extra",
    [(), ("--holdout", "0.5", "--onnx"), ("--holdout", "0.5", "--push-to-hub", "someone/something")],
    ids=["nothing held out", "onnx", "push"],
)
def test_what_a_trial_cannot_do_is_one_line(extra, closed, tmp_path, capsys):
    output = tmp_path / "trial"
    assert (
        run(train_module, "--dataset", closed, "--measure", "holdout", "--layout", "4-3-3", *extra, "--output", output)
        == 2
    )
    assert capsys.readouterr().err.startswith("error: measure holdout")
    assert not output.exists()


# plans


def play(plan, truth, backwards=False):
    """Run a plan on known accuracies; returns the batches of trials that it asked for."""
    done, batches = {}, []
    while trials := plan.next(dict(reversed(done.items())) if backwards else done):
        assert not set(trials) & set(done), "nothing is done twice"
        batches.append(trials)
        done |= {trial: truth[trial.layout] for trial in trials}
    return batches


SPACE = SearchSpace("bmsn_resnet20")
TRUTH = reference.table("cifar10-resnet20").accuracy


def test_settings_know_all_plans():
    assert set(ALONE) == set(PLANS)


@pytest.mark.parametrize("strategy", PLANS)
def test_a_plan_depends_on_its_seed_and_the_accuracies_alone(strategy):
    def batches(seed, backwards=False):
        config = SearchConfig(strategy=strategy, epochs=200, trials=14, seed=seed)
        return play(PLANS[strategy](SPACE, config), TRUTH, backwards)

    assert batches(3) == batches(3, backwards=True)
    assert {trial.layout for trial in batches(3)[0]} <= set(SPACE)
    if strategy in ("random", "evolution"):
        assert batches(3) != batches(4)
        assert len({trial.layout for batch in batches(3) for trial in batch}) == 14


def test_halving_trains_fewer_layouts_for_longer_from_rung_to_rung():
    for eta, rungs in ((3, [(36, 7), (12, 22), (4, 67), (1, 200)]),
                       (2, [(36, 6), (18, 12), (9, 25), (4, 50), (2, 100), (1, 200)])):  # fmt: skip
        batches = play(PLANS["halving"](SPACE, SearchConfig(epochs=200, eta=eta)), TRUTH)
        assert [(len(batch), batch[0].epochs) for batch in batches] == rungs
        assert str(batches[-1][0].layout) == "7-1-2", "without noise, the best of all"
        for before, after in pairwise(batches):
            worst = min(TRUTH[trial.layout] for trial in after)
            left_out = {trial.layout for trial in before} - {trial.layout for trial in after}
            assert worst >= max(TRUTH[layout] for layout in left_out)


def test_evolution_moves_one_cut_by_one_and_finds_more_than_chance():
    found = []
    for seed in range(10):
        batches = play(PLANS["evolution"](SPACE, SearchConfig(epochs=200, trials=18, seed=seed)), TRUTH)
        assert [len(batch) for batch in batches] == [10] + [1] * 8
        layouts = [trial.layout for batch in batches for trial in batch]
        for place, child in enumerate(layouts[10:], 10):
            cuts = [np.cumsum(layout.units_per_scale)[:-1] for layout in (child, *layouts[:place])]
            assert min(np.abs(cuts[0] - other).sum() for other in cuts[1:]) == 1
        found.append(max(TRUTH[layout] for layout in layouts))
    assert np.mean(found) > expected_best(TRUTH, 16)


def test_brute_force_trains_every_layout_with_every_seed():
    (batch,) = play(PLANS["brute-force"](SPACE, SearchConfig(epochs=5, trial_seeds=2, seed=7)), TRUTH)
    assert Counter(trial.layout for trial in batch) == dict.fromkeys(SPACE, 2)
    assert {trial.seed for trial in batch} == {7, 8}


# runs

PLAN = ("--strategy", "brute-force", "--default-layout", "5-5", *COMMON, "--threads", "1", "--jobs", "1")


@pytest.fixture(scope="module")
def brute(closed, tmp_path_factory):
    """A brute force of nine layouts, killed in its fourth training, and resumed."""
    output = tmp_path_factory.mktemp("brute") / "run"
    real, count = runner.train, 0

    def train(*arguments, **options):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "train", train)
        with pytest.raises(KeyboardInterrupt):
            run(search_module, "--dataset", closed, *PLAN, "--output", output)
        assert run(search_module, "--output", output, "--resume") == 0
    assert count == 10, "three were read, one was lost"
    return output


def test_a_plan_ends_in_a_search_that_training_takes(brute, capsys):
    result = SearchResult.read(brute / "search.json")
    assert len(result.ranking) == len(result.details["trials"]) == 9
    assert result.mixture_size == 1 and result.assignment_matrix is None
    assert result.spent_macs == sum((3 * 32 + 32) * entry.macs for entry in result.ranking)
    settings = train_module.settings_from_search(result, "7-3")
    assert settings["layout"] == "7-3"
    rows = list(csv.DictReader((brute / "ground_truth.csv").open()))
    accuracies = {entry.layout: entry.accuracy for entry in result.ranking}
    assert {row["layout"]: float(row["standalone_top1"]) for row in rows} == {
        layout: round(100 * accuracy, 2) for layout, accuracy in accuracies.items()
    }
    assert "trained alone" not in (card := search_card(portable(result), "me/search"))
    assert "standalone trainings (brute-force)" in card and "init-from" not in card
    assert run(report, brute) == 0
    assert "9 layouts, ranked by" in capsys.readouterr().out


def test_a_plan_begins_no_training_that_its_budget_does_not_pay_for(closed, tmp_path):
    def cost(trial):
        return (3 * 32 + 32) * SPACE.macs(trial.layout, 16)

    (plan,) = play(PLANS["random"](SPACE, SearchConfig(epochs=1, trials=36)), TRUTH)
    budget = sum(map(cost, plan[:4])) - 1
    flags = ["--strategy", "random", *COMMON, "--threads", 1, "--jobs", 1, "--budget", budget]
    assert run(search_module, "--dataset", closed, *flags, "--output", tmp_path / "run") == 0
    result = SearchResult.read(tmp_path / "run" / "search.json")
    assert [trial["layout"] for trial in result.details["trials"]] == [str(trial.layout) for trial in plan[:3]]
    assert result.spent_macs == sum(map(cost, plan[:3])) <= budget


@pytest.mark.slow
def test_a_cluster_finds_what_one_process_finds_and_loses_no_trial_with_a_worker(brute, closed, tmp_path):
    """A real scheduler and two workers, of which one is killed in the middle."""
    distributed = pytest.importorskip("distributed")
    plain = TrialResult.read(brute / "trials" / "5-5_seed0_epochs1" / "trial.json")
    settings = {**SearchResult.read(brute / "search.json").settings, "dataset": str(closed), "threads": 1}
    home, trials = tmp_path / "run", [Trial(Layout((n, 10 - n)), 0, 1) for n in range(3, 9)]
    home.mkdir()
    (home / "run.json").write_text("{}")
    results = {}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        config = SearchConfig(**{**settings, "cluster": address})
        killed = []

        def kill():
            while not list(home.glob("trials/*/run.json")):
                time.sleep(0.02)
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        with runner.Runner(config, home, Accelerator()) as running:
            running.run(trials, lambda trial, result: results.update({trial: result}))
    assert killed and set(results) == set(trials)
    assert results[trials[2]].holdout_accuracy == plain.holdout_accuracy
    assert results[trials[2]].holdout_loss == plain.holdout_loss
    for trial in trials:
        before = brute / "trials" / f"{trial.layout}_seed0_epochs1"
        right = [
            load_tensors(folder / "right.safetensors")["right"] for folder in (before, runner.trial_folder(home, trial))
        ]
        assert torch.equal(*right)
    assert sum(len(result.segments) for result in results.values()) <= 7, "one more run, of the trial that was lost"


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 1, "000"), (None, 2, "010"), ("3", 1, "333"), ("5,2", 2, "525"), ("7,8,9", 2, "787")],
)
def test_workers_share_the_gpus_that_are_visible(visible, count, expected, monkeypatch, tmp_path):
    """A worker without one would train on the CPU, and say nothing."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision="no")
    with runner.Runner(SearchConfig(jobs=3), tmp_path, accelerator) as running:
        (devices,) = running._executor._initargs
        assert "".join(devices.get(timeout=10) for _ in range(3)) == expected


@pytest.mark.slow
def test_workers_of_this_machine_find_the_same_and_one_that_is_killed_costs_a_run(brute, closed, tmp_path):
    settings = {**SearchResult.read(brute / "search.json").settings, "dataset": str(closed), "threads": 1}
    home, trials, results = tmp_path / "run", [Trial(Layout((n, 10 - n)), 0, 1) for n in range(4, 7)], {}
    home.mkdir()
    (home / "run.json").write_text("{}")
    with runner.Runner(SearchConfig(**settings, jobs=2), home, Accelerator()) as running:

        def kill():
            while not list(home.glob("trials/*/run.json")):
                time.sleep(0.02)
            os.kill(next(iter(running._executor._processes)), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        running.run(trials, lambda trial, result: results.update({trial: result}))
    for trial in trials:
        before = TrialResult.read(brute / "trials" / f"{trial.layout}_seed0_epochs1" / "trial.json")
        assert results[trial].holdout_loss == before.holdout_loss


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--strategy", "random", "--budget", "1e6"), "budget 1e+06 is too small: the first training"),
        (("--strategy", "random", "--cluster", "slurm"), "cluster 'slurm' is unknown: give dask://HOST:PORT"),
        pytest.param(  # is waited for
            ("--strategy", "random", "--cluster", "dask://127.0.0.1:1"),
            "cluster dask://127.0.0.1:1 does not answer",
            marks=pytest.mark.slow,
        ),
        (("--confirm", "1"), "confirm 1 leaves the default layout alone"),
    ],
    ids=["budget", "engine", "address", "confirm"],
)
def test_mistakes_are_one_line(flags, expected, closed, tmp_path, capsys):
    assert run(search_module, "--dataset", closed, *flags, "--output", tmp_path / "run") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {expected}")


# confirmation


def test_the_test_is_mcnemars_exact_one_with_holms_correction():
    usual = torch.zeros(1000, dtype=torch.bool)
    usual[:500] = True
    better, luck, same = usual.clone(), usual.clone(), usual.clone()
    better[500:520], better[0] = True, False
    luck[500:508], luck[0:2] = True, False
    right = {"4-3-3": usual, "5-3-2": better, "6-3-1": luck, "3-4-3": same}
    choices = {choice.layout: choice for choice in confirm.compare(right, dict.fromkeys(right, 10))}
    one = 2 * sum(comb(21, k) for k in (0, 1)) / 2**21
    other = 2 * sum(comb(10, k) for k in range(3)) / 2**10
    assert choices["5-3-2"].p_value == pytest.approx(3 * one)
    assert choices["6-3-1"].p_value == pytest.approx(2 * other)
    assert choices["3-4-3"].p_value == 1 and choices["4-3-3"].p_value is None
    about = {"epochs": 3, "seed": 0, "spent_macs": 7}
    found = Confirmation.of(choices.values(), "4-3-3", **about)
    assert found.verdict == "5-3-2 beats the default 4-3-3 by 1.9 points (p < 0.001, 1,000 images, 1 seed)"
    assert (found.best, found.best_within_default_macs, found.abstains) == ("5-3-2", "5-3-2", None)
    assert found.choices[0].layout == "5-3-2"
    dear = Confirmation.of(confirm.compare(right, {**dict.fromkeys(right, 10), "5-3-2": 11}), "4-3-3", **about)
    assert (dear.best, dear.best_within_default_macs) == ("5-3-2", "4-3-3")
    cost = {**dict.fromkeys(right, 10), "5-3-2": 11, "6-3-1": 8, "3-4-3": 9}
    tied = Confirmation.of(confirm.compare(right, cost), "4-3-3", **about)
    said = r"6-3-1 ties with 4-3-3 at 0.80 of its cost: \+0.6 points, 95 % interval (\S+) to (\S+)"
    low, high = map(float, re.fullmatch(said, tied.cheaper_tie).groups())
    half = NormalDist().inv_cdf(1 - 0.025 / 3) * 10**0.5 / 10  # of large samples, and three comparisons
    assert low == pytest.approx(0.6 - half, abs=0.1) and high == pytest.approx(0.6 + half, abs=0.1)
    assert tied.best_within_default_macs == "4-3-3", "no winner"
    assert tied.cheaper_tie in report.confirmation_table(tied)
    assert found.cheaper_tie is None, "a winner is no dearer"
    lost = {**right, "6-3-1": torch.zeros(1000, dtype=torch.bool)}
    equal = Confirmation.of(confirm.compare(lost, cost), "4-3-3", **about).cheaper_tie
    assert equal.endswith("3-4-3 ties with 4-3-3 at 0.90 of its cost: +0.0 points, 95 % interval -0.3 to +0.3"), equal
    reverse = Confirmation.of(confirm.compare(dict(reversed(right.items())), dict.fromkeys(right, 1)), "3-4-3", **about)
    assert reverse.best == "5-3-2", "whichever is the default"
    worse = Confirmation.of(
        confirm.compare({"5-3-2": better, "4-3-3": usual}, dict.fromkeys(right, 1)), "5-3-2", **about
    )
    assert worse.verdict == worse.abstains == "no layout beats the default: keep 5-3-2"
    with pytest.raises(ValueError, match="best is not what its choices say"):
        Confirmation(**{**dict(found), "best": "6-3-1"})


CONFIRMED = (*COMMON, "--mixture-size", "1", "--threads", "1", "--confirm", "3", "--confirm-epochs", "1")


@pytest.mark.slow
def test_a_confirmation_that_shows_nothing_keeps_the_default_and_goes_on_where_it_was_killed(closed, tmp_path, capsys):
    whole, broken, real, layouts = tmp_path / "whole", tmp_path / "broken", runner.train, []
    assert run(search_module, "--dataset", closed, *CONFIRMED, "--output", whole) == 0
    printed = capsys.readouterr().out
    result = SearchResult.read(whole / "search.json")
    assert result.confirmed and len(result.confirmed.choices) == 3
    named = {entry.layout for entry in (result.best, result.default, result.best_within_default_macs)}
    assert named <= {choice.layout for choice in result.confirmed.choices}
    assert result.undecided == result.confirmed.verdict == "no layout beats the default: keep 4-3-3"
    assert result.pick("best").layout == "4-3-3" == train_module.settings_from_search(result, "best")["layout"]
    assert "no layout beats the default: keep 4-3-3\n" in printed
    assert printed.count(" --from-search ") == 3
    assert "keep 4-3-3" in search_card(portable(result), "me/search")

    def train(config, *arguments, **options):
        if len(layouts) == 1:
            layouts.append("killed")
            raise KeyboardInterrupt
        layouts.append(config.layout)
        return real(config, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "train", train)
        with pytest.raises(KeyboardInterrupt):
            run(search_module, "--dataset", closed, *CONFIRMED, "--output", broken)
        assert run(search_module, "--output", broken, "--resume") == 0
    assert len(layouts) == 4 and len(set(layouts)) == 4, "none is trained twice"
    again = SearchResult.read(broken / "search.json")
    assert (again.confirmed, again.spent_macs) == (result.confirmed, result.spent_macs)
    alone = sum((3 * 32 + 32) * choice.macs for choice in result.confirmed.choices)
    assert result.confirmed.spent_macs == alone < result.spent_macs


@pytest.mark.parametrize("start", [None, "supernet", "scratch"])
def test_choices_start_from_the_supernet_that_ranked_them_or_from_scratch(start, closed, tmp_path, monkeypatch):
    given, real, home = [], runner.train, tmp_path / "run"

    def train(config, output, resume, supernet):
        given.append((config.layout, supernet and {key: tensor.clone() for key, tensor in supernet.items()}))
        return real(config, output, resume, supernet)

    monkeypatch.setattr(runner, "train", train)
    flags = ["--dataset", closed, *COMMON, "--mixture-size", "2", "--confirm", "2", "--confirm-epochs", "1"]
    flags += ["--max-macs", "default", *(["--confirm-from", start] if start else [])]
    assert run(search_module, *flags, "--output", home) == 0
    result = SearchResult.read(home / "search.json")
    warm = start != "scratch"
    assert result.confirmed.from_supernet == warm and result.settings["confirm_from"] == (start or "supernet")
    assert ("from the weights of its supernet" if warm else "from scratch") in report.confirmation_table(
        result.confirmed
    )
    saved = load_tensors(home / "supernets.safetensors")
    for layout, supernet in given:
        (trial,) = (home / "trials").glob(f"{layout}_*/trial.json")
        assert TrialResult.read(trial).from_supernet == warm == (supernet is not None)
        own = next(entry for entry in result.ranking if entry.layout == layout).supernet
        assert not warm or all(torch.equal(tensor, saved[f"{own}.{key}"]) for key, tensor in supernet.items())
    assert len(given) == 2


def test_what_has_no_supernet_of_shared_weights_is_confirmed_from_scratch(closed, tmp_path, capsys):
    flags = ("--dataset", closed, *COMMON, "--mixture-size", "1", "--confirm", "2", "--confirm-epochs", "1")
    flags += ("--strategy", "unshared", "--max-macs", "default", "--output", tmp_path / "run")
    assert run(search_module, *flags, "--confirm-from", "supernet") == 2
    assert "confirm-from supernet: by sharing random resolutions have weights of their own" in capsys.readouterr().err
    assert run(search_module, *flags) == 0
    assert not SearchResult.read(tmp_path / "run" / "search.json").confirmed.from_supernet


def test_where_labels_do_not_depend_on_detail_the_default_is_kept(image_dataset, tmp_path):
    """Plain colours: every layout tells them apart."""
    import datasets

    colours = np.repeat(np.eye(4, 3), 24, 0)[:, None, None] * np.full((1, 16, 16, 1), 255)
    data = {"image": list(colours.astype(np.uint8)), "label": np.repeat(range(4), 24).tolist()}
    table = datasets.Dataset.from_dict(data, features=image_dataset["train"].features)
    datasets.DatasetDict(train=table, test=image_dataset["test"]).save_to_disk(tmp_path / "plain")
    flags = ("--dataset", tmp_path / "plain", *CONFIRMED[2:], "--batch-size", "8", "--epochs", "3", "--lr", "0.02")
    assert run(search_module, *flags, "--confirm-epochs", "3", "--output", tmp_path / "run") == 0
    result = SearchResult.read(tmp_path / "run" / "search.json")
    assert result.pick("best") == result.default
    assert result.confirmed.abstains
