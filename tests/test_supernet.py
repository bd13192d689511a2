import weakref

import pytest
import safetensors.torch
import timm
import torch

from bmsn_zoo import BACKBONES, SearchSpace
from bmsn_zoo.runtime import computes_bf16
from bmsn_zoo.supernet import Mixture, count_correct, walk_layouts

CPU = torch.device("cpu")


def mixture(size=2, seed=0, default_layout=None, name="bmsn_resnet20", **kwargs):
    return Mixture(SearchSpace(name, default_layout), size, num_classes=5, in_chans=3, seed=seed, **kwargs)


def one_by_one(supernet, space, images):
    outputs = []
    for layout in space:
        supernet.set_layout(layout)
        outputs.append(supernet(images))
    return outputs


def prefixes(space):
    """Unit runs that any evaluation of these layouts needs."""
    return len({layout.flags[: unit + 1] for layout in space for unit in range(10)})


def weights(supernet):
    return {name: tensor.clone() for name, tensor in supernet.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))


# exhaustive evaluation


@pytest.mark.parametrize("default_layout", ["5-5", "3-3-2-2", "10", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_walk_equals_one_by_one(name, default_layout, images):
    if name != "bmsn_resnet20" and default_layout is not None:
        pytest.skip("these layouts are ResNet20's")
    made = mixture(1, default_layout=default_layout, name=name)
    if len(made.space) > 36:
        made.space = made.space.subset(made.space[index] for index in range(0, len(made.space), len(made.space) // 8))
    walked = list(walk_layouts(made.supernets[0], made.space, images))
    expected = one_by_one(made.supernets[0], made.space, images)
    assert len(walked) == len(made.space)
    assert all(torch.equal(a, b) for a, b in zip(walked, expected, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in walked}) == len(walked), "layouts cannot be told apart"


@pytest.mark.parametrize("layouts", [["5-3-2"], ["10", "1-9", "5-5", "4-1-5", "5-3-2", "3-3-2-2", "3-3-3-1"]])
@torch.no_grad()
def test_walk_of_any_layouts_leaves_the_supernet_as_it_is(layouts, images):
    made = mixture(1)
    supernet, space = made.supernets[0], made.space.subset(reversed(layouts))
    supernet.set_layout("7-1-2")
    before = supernet(images)
    walk = walk_layouts(supernet, space, images)
    first = next(walk)
    assert torch.equal(supernet(images), before)
    walked = [first, *walk]
    assert torch.equal(supernet(images), before)
    assert supernet.layout == "7-1-2"
    assert [len(walked), len(space)] == [len(layouts)] * 2
    for logits, expected in zip(walked, one_by_one(supernet, space, images), strict=True):
        assert torch.equal(logits, expected)


@pytest.mark.skipif(not computes_bf16(CPU), reason="this processor only emulates bf16")
@torch.no_grad()
def test_walk_equals_one_by_one_in_bf16(images):
    made = mixture(1)
    supernet = made.supernets[0].to(memory_format=torch.channels_last)
    batch = images.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        walked = list(walk_layouts(supernet, made.space, batch))
        expected = one_by_one(supernet, made.space, batch)
    assert walked[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(walked, expected, strict=True))


@pytest.mark.parametrize("default_layout", [None, "3-3-2-2"])
@torch.no_grad()
def test_walk_holds_no_more_maps_than_there_are_scales(default_layout, images):
    made = mixture(1, default_layout=default_layout)
    supernet, alive, peak = made.supernets[0], weakref.WeakSet(), []

    def watch(module, inputs, result):
        alive.add(result)
        peak.append(len(alive))

    for module in (supernet.act1, *supernet.blocks):
        module.register_forward_hook(watch)
    for _ in walk_layouts(supernet, made.space, images):
        pass
    # one for each scale, and the new one beside its input
    assert max(peak) <= made.space.default_layout.num_scales + 1
    assert len(alive) == 0


@torch.no_grad()
def test_walk_runs_every_shared_prefix_once(images):
    made = mixture(1)
    supernet, runs = made.supernets[0], []
    for module in (supernet.conv1, *supernet.blocks):
        module.register_forward_hook(lambda *_: runs.append(1))
    list(walk_layouts(supernet, made.space, images))
    assert len(runs) == prefixes(made.space) == 164
    runs.clear()
    three = made.space.subset(["1-1-8", "4-3-3", "4-4-2"])
    list(walk_layouts(supernet, three, images))
    assert len(runs) == prefixes(three) == 22


def test_correct_answers_are_counted_for_every_layout(images):
    made = mixture(1)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    correct = count_correct(made.supernets[0], made.space, images, labels)
    assert correct.dtype == torch.int64
    assert not correct.requires_grad
    expected = [int((out.argmax(1) == labels).sum()) for out in one_by_one(made.supernets[0], made.space, images)]
    assert correct.tolist() == expected
    assert len(set(expected)) > 1


# supernets


def test_supernets_start_different_and_depend_on_seed_and_number_alone():
    first = mixture(3, seed=5)
    torch.manual_seed(77)
    second = mixture(2, seed=5, default_layout="5-5")
    for a, b in zip(first.supernets, second.supernets, strict=False):
        assert equal(weights(a), weights(b))
    starts = [weights(supernet) for made in (first, mixture(3, seed=6)) for supernet in made.supernets]
    for index, start in enumerate(starts):
        for other in starts[:index]:
            assert not any(torch.equal(start[key], other[key]) for key in start if start[key].ndim > 1)


def test_building_leaves_the_global_random_state_alone():
    expected = torch.rand(3)
    torch.manual_seed(0)
    mixture(2)
    assert torch.equal(torch.rand(3), expected)


def test_a_step_trains_the_drawn_supernet_alone(images):
    made = mixture(3)
    before = [weights(supernet) for supernet in made.supernets]
    optimizers = [torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9) for supernet in made.supernets]
    drawn = made.supernets[1]
    drawn.set_layout("7-1-2")
    torch.nn.functional.cross_entropy(drawn(images), torch.arange(6) % 5).backward()
    optimizers[1].step()
    after = [weights(supernet) for supernet in made.supernets]
    assert equal(before[0], after[0])
    assert equal(before[2], after[2])
    assert not any(torch.equal(before[1][name], after[1][name]) for name in before[1])


@pytest.mark.parametrize("layout", ["1-1-8", "5-3-2", "8-1-1"])
def test_extract_gives_an_independent_copy_with_equal_logits(layout, images):
    made = mixture(2)
    source = made.supernets[1]
    source.set_layout("4-3-3")
    copy = made.extract(layout, 1)
    assert source.layout == "4-3-3"
    assert copy.layout == layout
    source.set_layout(layout)
    assert torch.equal(copy(images), source(images))
    assert not torch.equal(copy(images), made.extract(layout, 0)(images))

    before = weights(source)
    copy.set_layout("2-2-6")
    for parameter in copy.parameters():
        parameter.data.zero_()
    assert source.layout == layout
    assert equal(weights(source), before)


def test_state_round_trip_through_a_file(tmp_path, images):
    made, other = mixture(2, seed=1), mixture(2, seed=2)
    for supernet in made.supernets:
        supernet.to(memory_format=torch.channels_last)  # as in a search; safetensors takes contiguous tensors only
    safetensors.torch.save_file(made.state_dict(), tmp_path / "supernets.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "supernets.safetensors"))
    for a, b in zip(made.supernets, other.supernets, strict=True):
        assert equal(weights(a), weights(b))


def test_state_of_another_mixture_is_refused():
    state = mixture(2).state_dict()
    for size in (1, 3):
        with pytest.raises(RuntimeError, match=r"Unexpected|Missing"):
            mixture(size).load_state_dict(state)


def test_mixture_has_its_size_and_ordinary_timm_models():
    made = mixture(3)
    assert len(made) == len(made.supernets) == 3
    assert all(supernet.searchable and supernet.num_classes == 5 for supernet in made.supernets)
    assert {type(supernet) for supernet in made.supernets} == {type(timm.create_model("bmsn_resnet20"))}
