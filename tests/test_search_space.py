from math import comb

import pytest
import timm
import torch
from torch import nn

from bmsn_zoo import BACKBONES, InputError, Layout, SearchSpace

# millions of multiply-accumulates for one 32x32 image, known before any code was written
MACS = {
    "1-1-8": 18.6,
    "2-4-4": 30.2,
    "2-5-3": 33.7,
    "3-4-3": 37.3,
    "4-3-3": 40.8,
    "2-6-2": 44.7,
    "5-3-2": 62.8,
    "7-1-2": 91.1,
    "8-1-1": 149.3,
}


@pytest.fixture(scope="module")
def space():
    return SearchSpace("bmsn_resnet20")


def test_resnet20_has_36_layouts_in_order(space):
    layouts = list(space)
    assert len(space) == len(layouts) == len(set(layouts)) == 36
    assert layouts == sorted(layouts)
    assert [str(layouts[0]), str(layouts[-1])] == ["1-1-8", "8-1-1"]
    assert all(layout.num_units == 10 and layout.num_scales == 3 for layout in layouts)


def test_index_both_ways(space):
    for index, layout in enumerate(space):
        assert space[index] == layout
        assert space.index(layout) == space.index(str(layout)) == space.index(list(layout.units_per_scale)) == index


def test_default_is_the_standard_network(space):
    assert str(space.default_layout) == "4-3-3"
    assert space.default_layout in list(space)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("scales", [1, 2, 4])
def test_default_layout_sets_the_number_of_scales(name, scales):
    units = BACKBONES[name].num_units
    default = (1,) * (scales - 1) + (units - scales + 1,)
    space = SearchSpace(name, default)
    assert len(space) == comb(units - 1, scales - 1)
    assert space.num_scales == scales
    assert space.default_layout == Layout(default)
    assert list(space) == sorted(set(space))


@pytest.mark.parametrize(
    ("name", "default", "message"),
    [
        ("resnet20", None, "'resnet20' has no search space.*bmsn_resnet20"),
        ("", None, "no search space"),
        ("bmsn_resnet20", "4-3-4", "4-3-4 sums to 11"),
        ("bmsn_resnet20", [4, 0, 6], "has 0"),
    ],
)
def test_bad_space(name, default, message):
    with pytest.raises(InputError, match=message):
        SearchSpace(name, default)


@pytest.mark.parametrize(
    ("layout", "message"),
    [("5-5", "5-5 has 2 scales.*has 3"), ("5-3-3", "sums to 11"), ("best", "'best'"), (None, "None"), (-1, "-1")],
)
def test_index_refuses_what_is_not_in_the_space(space, layout, message):
    with pytest.raises(InputError, match=message):
        space.index(layout)


@pytest.mark.parametrize("layout", MACS)
def test_macs_check_values(space, layout):
    assert round(space.macs(Layout.parse(layout), 32) / 1e6, 1) == MACS[layout]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("image_size", "in_chans"), [(32, 3), (28, 1), (33, 3)])
def test_macs_are_those_of_the_real_convolutions(name, image_size, in_chans):
    space, counted = SearchSpace(name), []
    for layout in {space[0], space[len(space) // 2], space[-1], space.default_layout}:
        model = timm.create_model(name, layout=str(layout), in_chans=in_chans).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda conv, _, out: counted.append(out[0, 0].numel() * conv.weight.numel())
                )
        counted.clear()
        with torch.no_grad():
            model(torch.zeros(1, in_chans, image_size, image_size))
        assert space.macs(layout, image_size, in_chans) == sum(counted)


def test_macs_of_an_image_that_is_too_small(space):
    with pytest.raises(InputError, match="3 scales, too many for 3-pixel images"):
        space.macs(space.default_layout, 3)


def test_parameters_of_resnet20(space):
    counts = {sum(p.numel() for p in timm.create_model(space.name, layout=str(v)).parameters()) for v in space}
    assert len(counts) == 1
    assert 0.265e6 < counts.pop() < 0.28e6
