"""What layouts cost, budgets that cut a search space, and the memory of the dearest layout."""

import runpy
from pathlib import Path

import pytest
import torch
from small_runs import COMMON, run

from bmsn_zoo import BACKBONES, InputError, Layout, SearchSpace, cost, one_shot
from bmsn_zoo import searching as search_module
from bmsn_zoo.results import SearchResult
from bmsn_zoo.supernet import Mixture

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "millions"), [("resnet18", 2.5), ("resnet50", 11.1)])
def test_activations_are_those_that_timm_publishes(name, millions):
    backbone = SearchSpace(name).backbone
    assert cost.activations(backbone, backbone.default_layout, 224) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_budget_leaves_what_costs_no_more():
    space = SearchSpace("bmsn_resnet20")
    macs = {layout: space.macs(layout, 32) for layout in space}
    usual, limit = macs[space.default_layout], sorted(macs.values())[9]
    for text, most in (("default", usual), ("0.8x", 0.8 * usual), (str(limit), limit), ("4e7", 4e7)):
        assert list(space.within(32, 3, text)) == [layout for layout in space if macs[layout] <= most]
    assert space.default_layout in space.within(32, 3, "default")
    assert space.default_layout not in space.within(32, 3, "0.8x")
    assert list(space.within(32, 3)) == list(space)

    made = {layout: cost.activations(space.backbone, layout, 32) for layout in space}
    half = 0.7 * made[space.default_layout]
    left = list(space.within(32, 3, "0.8x", "0.7x"))
    assert left == [layout for layout in space if macs[layout] <= 0.8 * usual and made[layout] <= half]


def test_a_budget_that_nothing_meets_tells_the_cheapest():
    space = SearchSpace("bmsn_resnet20")
    least = space.macs(Layout((1, 1, 8)), 32)
    with pytest.raises(
        InputError, match=f"max-macs 0.1x leaves none of 36 layouts: the cheapest, 1-1-8, costs {least}"
    ):
        space.within(32, 3, "0.1x")
    with pytest.raises(
        InputError, match=f"max-activations 9 leaves none of {len(space.within(32, 3, '0.8x'))} layouts"
    ):
        space.within(32, 3, "0.8x", "9")


def test_a_resnet18_is_searched_within_its_default_cost(tmp_path):
    command = ["--model", "resnet18", "--image-size", 32, "--max-macs", "default", "--limit", 40]
    assert run(search_module, *command, *COMMON, "--mixture-size", 1, "--output", tmp_path / "run") == 0
    found, space = SearchResult.read(tmp_path / "run" / "search.json"), SearchSpace("resnet18")
    macs = {str(layout): space.macs(layout, 32, found.dataset.in_chans) for layout in space}
    fitting = {layout: count for layout, count in macs.items() if count <= macs["2-2-2-2"]}
    assert {entry.layout: entry.macs for entry in found.ranking} == fitting
    assert found.default.layout == "2-2-2-2" and 1 < len(fitting) < len(space) == 35


@pytest.mark.parametrize("limit", ["", "x", "-1", "0.8y", "nan", "1e9999", "defaultx"])
def test_what_is_no_limit_is_refused(limit, tmp_path, capsys):
    assert run(search_module, "--max-macs", limit, "--output", tmp_path / "run") == 2
    assert "max-macs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_search_within_a_budget_tries_the_memory_of_its_dearest_layout(tmp_path, image_folder, monkeypatch, capsys):
    tried, plain, dearest = [], one_shot.OneShotSearch.try_memory, one_shot.OneShotSearch.run_dearest

    def weights(search):
        return [tensor.clone() for net in search.mixture.supernets for tensor in net.state_dict().values()]

    def watched(search):
        before, state = weights(search), torch.get_rng_state()
        plain(search)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(search), strict=True))
        assert torch.equal(state, torch.get_rng_state())
        assert all(
            p.grad is None and net.grad_checkpointing for net in search.mixture.supernets for p in net.parameters()
        )

    def noted(search, supernet, layout, images):
        tried.append((str(layout), tuple(images.shape)))
        return dearest(search, supernet, layout, images)

    monkeypatch.setattr(one_shot.OneShotSearch, "try_memory", watched)
    monkeypatch.setattr(one_shot.OneShotSearch, "run_dearest", noted)
    command = ["--dataset", image_folder, *COMMON, "--mixture-size", 2, "--max-macs", "0.7x", "--grad-checkpointing"]
    assert run(search_module, *command, "--output", tmp_path / "run") == 0
    found = SearchResult.read(tmp_path / "run" / "search.json")
    space = SearchSpace("bmsn_resnet20").within(16, 3, "0.7x")
    assert found.layouts == [str(layout) for layout in space]
    assert (found.default, found.best_within_default_macs) == (None, None)
    assert found.norms == "statistics of the batch, without scale and shift"
    most = str(max(space, key=lambda layout: space.macs(layout, 16)))
    assert tried == [(most, (16, 3, 16, 16))]

    def too_much(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(one_shot.OneShotSearch, "try_memory", plain)
    for where, what in ((one_shot.OneShotSearch, "run_dearest"), (one_shot, "count_correct")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, too_much)
            capsys.readouterr()
            assert run(search_module, *command, "--output", tmp_path / "other") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        need = "16 images a step and 32 in the evaluation"
        assert f"layout {most}, the dearest of {len(space)}, does not fit into memory with {need}" in said
        assert "--max-macs" in said
        assert "--grad-checkpointing" in said
        assert not (tmp_path / "other" / "run.json").exists()
    monkeypatch.setattr(one_shot, "_TRIED_ON_CPU", 0)  # what would take too long is not tried
    assert run(search_module, *command, "--output", tmp_path / "third") == 0


@pytest.mark.parametrize("name", ["bmsn_resnet20", "test_resnet"])
def test_checkpointed_gradients_are_the_same(name):
    supernet = Mixture(SearchSpace(name), 1, num_classes=4, in_chans=3, seed=0).supernets[0]
    images, gradients = torch.randn(4, 3, 32, 32), []
    for enable in (False, True):
        supernet.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(supernet(images).logsumexp(1).sum(), list(supernet.parameters())))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("more", [["--strategy", "darts", "--mixture-size", 1], ["--strategy", "unshared"]])
def test_searches_that_cannot_forget_maps_say_so(more, tmp_path, image_folder, capsys):
    command = ["--dataset", image_folder, *COMMON, "--grad-checkpointing", *more]
    assert run(search_module, *command, "--output", tmp_path / "run") == 2
    assert "grad-checkpointing" in capsys.readouterr().err


def test_the_example_of_an_own_backbone_is_searched(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "own_backbone.py"))
    try:
        small = ["--dataset", "digits", "--limit", 120, *COMMON, "--mixture-size", 2]
        command = ["--model", "plain_net", *map(str, small), "--output", str(tmp_path / "run")]
        for alone in (["--confirm", "2"], ["--strategy", "random", "--mixture-size", "1"]):
            assert example["main"]([*command, *alone]) == 2
            assert "timm has no model plain_net: register it there" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert example["main"](command) == 0
        found = SearchResult.read(tmp_path / "run" / "search.json")
    finally:
        BACKBONES.pop("plain_net")
    assert (found.model, len(found.layouts), found.default.layout) == ("plain_net", 10, "2-2-2")
    assert found.norms == "statistics of the batch, with scale and shift"
    # 3x3 convolutions of 16-16-32-32-64-64 channels on 32 x 32, 16 x 16 and 8 x 8 pixels
    chans = found.dataset.in_chans
    assert found.default.macs == 9 * (1024 * (16 * chans + 256) + 256 * (512 + 1024) + 64 * (2048 + 4096))
