import dataclasses
import json
import math
import time

import pytest

from bmsn_zoo import InputError, Layout

FORMS = ["5-3-2", "5,3,2", "5, 3, 2", " 5-3-2 ", (5, 3, 2), [5, 3, 2], Layout((5, 3, 2))]
HOSTILE = {
    "empty text": "",
    "blank": " ",
    "empty list": [],
    "word": "default",
    "negative text": "-5-3-2",
    "negative": [12, -1, -1],
    "zero": [5, 0, 5],
    "zero text": "5-0-5",
    "double dash": "5--2",
    "open end": "5-3-2-",
    "line break": "5-3-2\n",
    "two lines": "5-3-2\n5-3-2",
    "decimal text": "5.0-3-2",
    "arabic digits": "\u0665-\u0663-\u0662",
    "wide digits": "\uff15-\uff13-\uff12",
    "superscript": "\u00b2-\u00b2",
    "bool": [True, 7, 2],
    "float": [5.0, 3, 2],
    "nan": [math.nan, 3, 2],
    "none": None,
    "none inside": [5, None, 2],
    "text inside": ["5", "3", "2"],
    "line break inside": [0, "3\n2"],
    "nested": [[5, 3, 2]],
    "number": 532,
    "dictionary": {"5": 3},
    "set": {5, 3, 2},
    "wrong sum": "5-3-3",
    "one scale too large": "11",
    "huge": [10**9, 3, 2],
    "huge beyond printing": [10**5000, 3, 2],
    "huge text": "9" * 1_000_000,
    "million entries": [1] * 1_000_000,
    "million entries text": "1-" * 999_999 + "1",
    "million zeros": [0] * 1_000_000,
    "million nested": [[1] * 1_000_000],
}


@pytest.mark.parametrize("value", FORMS, ids=repr)
def test_every_form_is_the_same_layout(value):
    layout = Layout.parse(value)
    assert layout == Layout((5, 3, 2))
    assert hash(layout) == hash(Layout((5, 3, 2)))
    assert str(layout) == "5-3-2"


@pytest.mark.parametrize("units", [(10,), (1, 9), (4, 3, 3), (1, 1, 1, 7), (3, 4, 6, 3)])
def test_text_and_json_round_trips(units):
    layout = Layout(units)
    assert Layout.parse(str(layout)) == layout
    assert Layout.parse(json.loads(json.dumps(layout.units_per_scale))) == layout


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_bad_layout_is_one_short_line_at_once(value):
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        Layout.parse(value).check(10, 32)
    assert time.perf_counter() - started < 2
    message = str(caught.value)
    assert message.startswith("layout")
    assert message.isprintable()
    assert len(message) < 400


def test_messages_name_value_rule_and_fix():
    with pytest.raises(InputError, match=r"5-3-3 sums to 11.* 10 units"):
        Layout.parse("5-3-3").check(10)
    with pytest.raises(InputError, match=r"5-0-5 has 0.*at least 1.*such as 5-3-2"):
        Layout.parse("5-0-5")
    with pytest.raises(InputError, match=r"1-1-1-1-1-1-4 has 7 scales.*32-pixel.*at least 64 pixels"):
        Layout.parse("1-1-1-1-1-1-4").check(10, 32)


def test_too_small_image_is_the_first_without_a_pixel():
    layout = Layout((4, 3, 3))
    assert layout.check(10, 4) is layout
    for size in (3, 0, -8):
        with pytest.raises(InputError, match="too many"):
            layout.check(10, size)


@pytest.mark.parametrize("units", [(10,), (1, 9), (5, 3, 2), (1, 1, 1, 7)])
def test_flags_scales_and_resolutions_agree(units):
    layout = Layout(units)
    assert layout.num_units == sum(units) == len(layout.flags)
    assert layout.num_scales == len(units) == 1 + sum(layout.flags)
    assert layout.flags[0] == 0
    size = 40
    for flag, side in zip(layout.flags, layout.resolutions(40), strict=True):
        size = size // 2 if flag else size
        assert side == size
    assert [layout.resolutions(40).count(40 >> scale) for scale in range(len(units))] == list(units)


def test_flags_are_one_where_a_resolution_starts():
    assert Layout((5, 3, 2)).flags == (0, 0, 0, 0, 0, 1, 0, 0, 1, 0)


def test_odd_sizes_are_rounded_down():
    assert Layout((1, 1, 1)).resolutions(33) == (33, 16, 8)


def test_strides_round_up():
    def halve(side):
        return -(-side // 2)

    assert Layout((2, 1, 1, 1)).resolutions(28, halve) == (28, 28, 14, 7, 4)
    assert Layout((1, 1, 1)).check(3, 3, halve).resolutions(3, halve) == (3, 2, 1)
    for size in (0, 1, 2):  # of one pixel nothing can be left out
        with pytest.raises(InputError, match=f"too many for {size}-pixel images: use images of at least 3 pixels"):
            Layout((1, 1, 1)).check(3, size, halve)
    with pytest.raises(InputError, match="at least 9 pixels"):
        Layout((1, 1, 1)).check(3, 8, halve, lambda side: halve(halve(side)))


def test_layouts_are_ordered_and_frozen():
    layouts = [Layout((5, 3, 2)), Layout((1, 8, 1)), Layout((1, 1, 8))]
    assert [str(layout) for layout in sorted(layouts)] == ["1-1-8", "1-8-1", "5-3-2"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        layouts[0].units_per_scale = (4, 3, 3)
