"""Relaxed searches, and supernets whose units hold a set of weights for each resolution."""

import json
from functools import partial
from itertools import accumulate, pairwise, product
from math import prod

import pytest
import torch
from accelerate import Accelerator
from closeness import close
from safetensors.torch import load_file
from test_processes import run as run_script
from test_processes import torchrun
from torch.nn.functional import interpolate, max_pool2d

from bmsn_zoo import SearchSpace, cost
from bmsn_zoo import searching as search_module
from bmsn_zoo.card import search_card
from bmsn_zoo.compare import compare_runs
from bmsn_zoo.config import SearchConfig
from bmsn_zoo.one_shot import OneShotSearch
from bmsn_zoo.ranking import build_result, why_undecided
from bmsn_zoo.relaxed import Architecture, ExponentiatedGradient, RelaxedSupernet, train_alpha, train_weights
from bmsn_zoo.results import SearchResult
from bmsn_zoo.search_space import BACKBONES
from bmsn_zoo.step import Trainer, train_and_score
from bmsn_zoo.supernet import Mixture, count_correct, walk_layouts

SPACE = SearchSpace("bmsn_resnet20")
BATCH = (torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)
OTHER = (torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4)
QUICK = ["--batch-size", 16, "--mixture-size", 1, "--epochs", 2, "--mixed-precision", "no", "--threads", 1]


def supernet(sharing="shared"):
    (made,) = Mixture(SPACE, 1, num_classes=4, in_chans=3, seed=0, sharing=sharing).supernets
    return made


def architecture(strategy="darts"):
    return Architecture(SPACE, SearchConfig(strategy=strategy), torch.device("cpu"))


def one_hot(levels):
    return torch.nn.functional.one_hot(torch.tensor(levels[1:]), 3).float()


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(one, other):
    return [name for name in one if torch.equal(one[name], other[name])]


# the relaxation


@pytest.mark.parametrize("sharing", ["shared", "random"])
@pytest.mark.parametrize("layout", ["4-3-3", "1-1-8", "8-1-1"])
def test_with_shares_of_one_it_is_the_network_of_that_path(sharing, layout):
    network = supernet(sharing)
    network.set_layout(layout)
    levels = list(accumulate(SPACE[SPACE.index(layout)].flags))
    close(RelaxedSupernet(network)(BATCH[0], one_hot(levels)), network(BATCH[0]), 1e-4)


def test_at_full_size_alone_it_is_the_network_without_downsampling():
    network = supernet()
    network.set_layout("10")
    close(RelaxedSupernet(network)(BATCH[0], one_hot([0] * 10)), network(BATCH[0]), 1e-4)


def test_a_path_that_rises_again_pools_where_it_falls_and_repeats_pixels_where_it_rises():
    network, levels = supernet(), [0, 1, 0, 2, 2, 1, 0, 0, 2, 1]
    x = network.forward_unit(BATCH[0], 0, False)
    for unit, (before, level) in enumerate(pairwise(levels), 1):
        steps = level - before
        x = max_pool2d(x, 2**steps) if steps > 0 else interpolate(x, scale_factor=2**-steps)
        x = network.forward_unit(x, unit, False)
    close(RelaxedSupernet(network)(BATCH[0], one_hot(levels)), network.forward_head(x), 1e-4)


def test_shares_weigh_the_sum_of_what_levels_make():
    network, shares = supernet(), one_hot([0] * 10)
    shares[4] = torch.tensor([0.2, 0.5, 0.3])
    maps, x = [], BATCH[0]
    for unit in range(5):
        x = network.forward_unit(x, unit, False)
    for level in range(3):
        made = network.forward_unit(max_pool2d(x, 2**level), 5, False)
        maps.append(interpolate(made, scale_factor=2**level))
    x = sum(share * made for share, made in zip(shares[4], maps, strict=True))
    for unit in range(6, 10):
        x = network.forward_unit(x, unit, False)
    close(RelaxedSupernet(network)(BATCH[0], shares), network.forward_head(x), 1e-4)


def test_what_a_step_of_a_resnet20_costs():
    assert cost.relaxed_macs(SPACE.backbone, 1, 32) == cost.macs(SPACE.backbone, SPACE.backbone.check("10"), 32)
    assert round(cost.relaxed_macs(SPACE.backbone, 3, 32) / 1e6, 3) == 363.086


# steps


@pytest.mark.parametrize("strategy", ["darts", "gaea"])
def test_weights_and_alpha_are_trained_each_without_the_other(strategy):
    network, alpha, accelerator = supernet(), architecture(strategy), Accelerator()
    trainer = Trainer(network, RelaxedSupernet(network), torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9))
    before, start = copies(network.state_dict()), alpha.alpha.detach().clone()

    loss = train_weights(trainer, alpha.shares(), BATCH, accelerator)
    assert loss > 0
    assert not equal(before, network.state_dict())
    assert torch.equal(alpha.alpha, start)
    assert alpha.alpha.grad is None

    before = copies(network.state_dict())
    momentum = {str(i): state["momentum_buffer"] for i, state in trainer.optimizer.state_dict()["state"].items()}
    kept = copies(momentum)
    accuracy = train_alpha(trainer.network, alpha, OTHER, accelerator)
    assert 0 <= accuracy <= 1
    assert (alpha.alpha != start).all(), "every share of every unit has a gradient"
    assert len(equal(before, network.state_dict())) == len(before)
    assert len(equal(kept, momentum)) == len(kept) > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_shares_follow_the_gradient_and_stay_on_the_simplex():
    shares = torch.full((9, 3), 1 / 3, requires_grad=True)
    optimizer = ExponentiatedGradient([shares], lr=0.1)
    shares.grad = torch.zeros(9, 3)
    optimizer.step()
    close(shares, torch.full((9, 3), 1 / 3), 1e-6)

    shares.grad = torch.tensor([1.0, 2.0, -1.0]).repeat(9, 1)
    optimizer.step()
    expected = torch.exp(-0.1 * shares.grad)
    close(shares, expected / expected.sum(1, keepdim=True))
    for _ in range(5):
        shares.grad = 1e3 * torch.randn(9, 3)
        optimizer.step()
        close(shares.sum(1), torch.ones(9))
        assert (shares > 0).all(), "none is lost for ever"


# what is found


def test_layouts_are_ranked_by_their_projected_scores():
    alpha = architecture()
    with torch.no_grad():
        alpha.alpha.copy_(torch.randn(9, 3))
    logs = alpha.alpha.detach().double().log_softmax(1)
    scores = [sum(float(logs[u - 1, level]) for u, level in enumerate(accumulate(f.flags)) if u) for f in SPACE]
    close(alpha.projected_scores(), scores)
    details = alpha.result()["details"]
    assert details["free_path"] == [0, *logs.argmax(1).tolist()]
    close(list(details["projected_scores"].values()), scores)
    close(torch.tensor(details["alpha"]), logs.exp())

    accuracy, macs = torch.rand(36, 1, dtype=torch.float64), partial(SPACE.macs, image_size=32)
    found = build_result(SPACE, accuracy, macs, probability=alpha.projected_scores().softmax(0).tolist())
    assert [e.layout for e in found.ranking] == sorted(map(str, SPACE), key=lambda a: -details["projected_scores"][a])
    assert sum(found.values.values()) == pytest.approx(1)
    assert all(entry.accuracy == accuracy[SPACE.index(entry.layout), 0] for entry in found.ranking)
    assert why_undecided(found, 0.99, 100) is None
    even = build_result(SPACE, accuracy, macs, probability=[1 / 36] * 36)
    assert why_undecided(even, 0.1, 100) == "1-1-8 and 1-2-7 are equally probable"


def test_the_most_probable_layout_is_that_of_levels_drawn_from_the_shares():
    """By enumeration of all paths of a few units."""
    space = SearchSpace("bmsn_resnet20", "9-1")
    alpha = Architecture(space, SearchConfig(strategy="gaea"), torch.device("cpu"))
    with torch.no_grad():
        alpha.alpha.copy_(torch.rand(9, 2).softmax(1))
    paths = {
        path: prod(float(alpha.alpha.detach()[unit, level]) for unit, level in enumerate(path))
        for path in product(range(2), repeat=9)
    }
    valid = [paths[tuple(accumulate(layout.flags))[1:]] for layout in space]
    close(alpha.projected_scores().softmax(0), torch.tensor(valid) / sum(valid))


# whole searches


def search(folder, output, *arguments):
    settings = ["--dataset", folder, *QUICK, "--output", output, *arguments]
    return search_module.main([*map(str, settings)])


def contents(run):
    result = json.loads((run / "search.json").read_text())
    kept = {key: result[key] for key in ("ranking", "accuracy_matrix", "details")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: row[key] for key in row if key not in ("seconds", "peak_memory_mib")} for row in rows]
    return kept, rows, copies(load_file(run / "supernets.safetensors"))


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    [
        ("unshared", "same"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("darts", "random"), ("gaea", "shared"))),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(strategy, sharing, image_folder, tmp_path):
    settings = ["--strategy", strategy, "--sharing", sharing, "--image-size", 8]
    assert search(image_folder, tmp_path / "whole", *settings) == 0
    whole = SearchResult.read(tmp_path / "whole" / "search.json")

    class Ended(Exception):
        pass

    def end(self, *_):
        raise Ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneShotSearch, "finish", end)
        real = OneShotSearch.end_epoch
        patch.setattr(OneShotSearch, "end_epoch", lambda self, *args: (real(self, *args), end(self)))
        with pytest.raises(Ended):
            search(image_folder, tmp_path / "broken", *settings)
    assert search_module.main(["--output", str(tmp_path / "broken"), "--resume"]) == 0
    (one, rows, weights), (other, rows2, weights2) = contents(tmp_path / "whole"), contents(tmp_path / "broken")
    assert one == other
    assert rows == rows2
    assert equal(weights, weights2) == list(weights)

    assert len(whole.ranking) == 36
    if strategy != "unshared":
        assert whole.probability
        assert all(len(row["alpha"]) == 9 and all(sum(s) == pytest.approx(1) for s in row["alpha"]) for row in rows)
        assert rows[0]["alpha"] != rows[1]["alpha"]
        scores = whole.details["projected_scores"]
        assert whole.best.layout == max(scores, key=scores.get)
        steps = 2 * 2 * 6 * 16 * cost.relaxed_macs(SPACE.backbone, 3, 8)  # forward, and backward twice that, for both
        assert whole.spent_macs == steps + 32 * cost.tree_macs(SPACE, 8)
        assert "by the probabilities that it learned" in search_card(whole, "me/it")
        assert compare_runs([str(tmp_path / "whole")])[1][3] == whole.best.layout
    # what was saved is what was ranked
    mixture = Mixture(SPACE, 1, 4, 3, seed=9, sharing=sharing)
    mixture.load_state_dict(weights)
    if strategy == "unshared":
        assert search(image_folder, tmp_path / "next", *settings, "--epochs", 1, "--init-from", tmp_path / "whole") == 0


EACH = """
import os, sys
from pathlib import Path
from bmsn_zoo import report
from bmsn_zoo import searching as search
from bmsn_zoo.relaxed import RelaxedSearch
from bmsn_zoo.run_folder import save_tensors
real = RelaxedSearch.finish
def finish(self, epochs):
    save_tensors(Path(os.environ["RANK"]), {"alpha": self.strategy.alpha, **self.mixture.state_dict()})
    real(self, epochs)
RelaxedSearch.finish = finish
report.draw_search = lambda folder: None
sys.exit(search.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_learn_the_same(image_folder, tmp_path):
    (tmp_path / "each.py").write_text(EACH)
    settings = ["--dataset", image_folder, *QUICK, "--strategy", "darts", "--sharing", "random", "--output", "run"]
    settings += ["--epochs", 1, "--default-layout", "5-5", "--image-size", 8]
    done = run_script(tmp_path / "each.py", *settings, launcher=torchrun(2), cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / rank) for rank in "01")
    assert equal(one, other) == list(one)
    result, rows, _ = contents(tmp_path / "run")
    assert [row["draws"] for row in rows] == [[2]]
    assert len(result["ranking"]) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--mixture-size", 2], "strategy darts trains one supernet: give --mixture-size 1"),
        (["--rate-decay", "cost"], "rate-decay cost: all steps of strategy darts cost the same: use schedule"),
        (["--model", "bmsn_resnet18"], "use bmsn_resnet20, not bmsn_resnet18, whose strides have no counterpart"),
        (["--image-size", 18], "image-size 18 cannot be halved 2 times, as strategy darts does: give a multiple of 4"),
        (["--strategy", "unshared", "--sharing", "shared"], "sharing shared is not what strategy unshared does: use"),
    ],
)
def test_what_cannot_be_relaxed_is_said_in_one_line(settings, message, image_folder, tmp_path, capsys):
    assert search(image_folder, tmp_path / "run", "--strategy", "darts", *settings) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_backbones_that_say_so_pool_the_inputs_of_their_units():
    for name, backbone in BACKBONES.items():
        network, x = backbone.create(num_classes=0, in_chans=3), torch.randn(4, 3, 4, 4)
        same = []
        for unit in range(backbone.num_units):
            if unit:
                pooled = network.forward_unit(max_pool2d(x, 2), unit, False)
                same.append(torch.equal(network.forward_unit(x, unit, True), pooled))
            x = network.forward_unit(x, unit, False)
        assert all(same) == backbone.max_pools, name


# weights for each resolution


def test_equal_sets_are_one_shared_supernet():
    shared, unshared = supernet(), supernet("same")
    for name, tensor in shared.state_dict().items():
        assert torch.equal(unshared.state_dict()[f"sets.2.{name}"] if ".fc" in name else tensor, tensor)
    with torch.no_grad():
        pairs = zip(walk_layouts(shared, SPACE, BATCH[0]), walk_layouts(unshared, SPACE, BATCH[0]), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        shared.set_layout("2-5-3")
        unshared.set_layout("2-5-3")
        assert torch.equal(shared(BATCH[0]), unshared(BATCH[0]))
    first, *others = (list(each.blocks.parameters()) for each in supernet("random").sets)
    assert not any(torch.equal(one, other[place]) for other in others for place, one in enumerate(first))


def test_walking_layouts_gives_each_the_sets_of_its_levels():
    network = supernet("random")
    with torch.no_grad():
        for layout, logits in zip(SPACE, walk_layouts(network, SPACE, BATCH[0]), strict=True):
            network.set_layout(layout)
            assert torch.equal(network(BATCH[0]), logits)
            x, level = BATCH[0], 0
            for unit, flag in enumerate(layout.flags):
                level += flag
                x = network.sets[level].forward_unit(x, unit, bool(flag))
            assert torch.equal(network.sets[0].forward_head(x), logits)


def test_a_step_trains_the_sets_of_its_path_alone():
    network = supernet("random")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    trainer = Trainer(network, network, optimizer)
    for layout in ("4-3-3", "5-3-2"):
        before, levels = copies(network.state_dict()), list(accumulate(SPACE[SPACE.index(layout)].flags))
        train_and_score(trainer, SPACE[SPACE.index(layout)], BATCH, OTHER, Accelerator())
        used = {"sets.0.fc", "sets.0.conv1", *(f"sets.{level}.blocks.{u - 1}" for u, level in enumerate(levels) if u)}
        for name in before:
            mine = any(name.startswith(f"{part}.") for part in used)
            assert torch.equal(before[name], network.state_dict()[name]) != mine, name


def test_parameters_extraction_and_saving_of_unshared_weights():
    mixture = Mixture(SPACE, 2, num_classes=4, in_chans=3, seed=0, sharing="random")
    head = sum(p.numel() for p in supernet().fc.parameters())
    count = sum(p.numel() for p in supernet().parameters()) - head
    assert sum(p.numel() for p in mixture.supernets[1].parameters()) == 3 * count + head
    copy = mixture.extract("3-4-3", 1)
    mixture.supernets[1].set_layout("3-4-3")
    assert torch.equal(copy(BATCH[0]), mixture.supernets[1](BATCH[0]))
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in mixture.supernets[1].parameters()}
    again = Mixture(SPACE, 2, num_classes=4, in_chans=3, seed=5, sharing="same")
    again.load_state_dict(mixture.state_dict())
    one, other = (count_correct(made.supernets[0], SPACE, *BATCH).tolist() for made in (mixture, again))
    assert one == other


def test_searches_start_from_others_that_share_alike(image_folder, tmp_path, capsys):
    assert search(image_folder, tmp_path / "one", "--strategy", "uniform", "--epochs", 1) == 0
    settings = ["--strategy", "unshared", "--init-from", tmp_path / "one"]
    assert search(image_folder, tmp_path / "two", *settings) == 2
    assert "was searched with sharing shared, not random: give --sharing shared" in capsys.readouterr().err
