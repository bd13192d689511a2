import io
import itertools
import logging
import multiprocessing

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, features
from scipy.stats import chisquare

from bmsn_zoo import InputError
from bmsn_zoo.command import run_command
from bmsn_zoo.config import DataConfig
from bmsn_zoo.data import (
    Augmentation,
    DataSource,
    channel_statistics,
    check_batch_size,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
    to_device,
    to_pixels,
)
from bmsn_zoo.data import pixels as pixels_module
from bmsn_zoo.data.batches import crop_with_numpy, crop_with_torch
from bmsn_zoo.data.pixels import RowReader


def noise(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def reopened(image, **options):
    return Image.open(io.BytesIO(png(image, **options)))


# one image of any kind


@pytest.mark.parametrize("in_chans", [1, 3])
def test_gray_and_colour(in_chans):
    gray, colour = noise(8, 8), noise(8, 8, 3)
    assert np.array_equal(to_pixels(Image.fromarray(gray), 8, in_chans), np.stack([gray] * in_chans, 2))
    found = to_pixels(Image.fromarray(colour), 8, in_chans)
    assert found.shape == (8, 8, in_chans)
    assert found.dtype == np.uint8
    expected = colour if in_chans == 3 else (colour @ [0.299, 0.587, 0.114])[:, :, None]
    assert np.abs(found - expected).max() <= 1


def test_palette():
    colour = noise(8, 8, 3) // 128 * 255
    paletted = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    assert np.array_equal(to_pixels(reopened(paletted), 8, 3), colour)


def test_transparent_palette_entry_is_white():
    paletted = Image.fromarray(noise(8, 8) % 2).convert("P")
    paletted.putpalette([255, 0, 0, 0, 0, 255])
    found = to_pixels(reopened(paletted, transparency=1), 8, 3)
    expected = np.where(noise(8, 8)[:, :, None] % 2, [255, 255, 255], [255, 0, 0])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_alpha_is_laid_on_white(mode, in_chans):
    gray, alpha = noise(8, 8), noise(8, 8, seed=1)
    alpha[0], alpha[1] = 0, 255
    image = Image.fromarray(gray).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    found = to_pixels(reopened(image), 8, in_chans).astype(int)
    share = alpha[:, :, None] / 255
    assert np.abs(found - (gray[:, :, None] * share + 255 * (1 - share))).max() <= 1
    assert (found[0] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transparent_colour_is_white(mode):
    gray = noise(8, 8) // 128 * 100
    image = Image.fromarray(gray).convert(mode)
    found = to_pixels(reopened(image, transparency=100 if mode == "L" else (100, 100, 100)), 8, 3)
    assert np.array_equal(found[:, :, 0], np.where(gray == 100, 255, gray))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("brightest", [255, 3, 0])
def test_sixteen_bits_are_scaled_to_eight_whatever_the_image(in_chans, brightest):
    gray = (noise(8, 8).astype(int) % (brightest + 1)).astype(np.uint8)
    image = reopened(Image.fromarray(gray.astype(np.uint16) * 257))
    assert image.mode == "I;16"
    found = to_pixels(image, 8, in_chans)
    assert np.array_equal(found, np.stack([gray] * in_chans, 2))


def test_sixteen_bit_image_that_is_all_dark_stays_dark():
    dark = Image.fromarray(np.full((8, 8), 250, dtype=np.uint16))  # 250 of 65,535
    assert to_pixels(reopened(dark), 8, 1).max() <= 1


def test_one_bit():
    bits = noise(8, 8) > 127
    found = to_pixels(reopened(Image.fromarray(bits)), 8, 3)
    assert np.array_equal(found, np.where(bits, 255, 0)[:, :, None].repeat(3, 2))


def test_cmyk():
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG", quality=100)
    found = to_pixels(Image.open(buffer), 8, 3)
    assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation_is_undone(orientation, turns):
    pixels = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = to_pixels(reopened(Image.fromarray(pixels), exif=exif), 8, 3)
    assert np.array_equal(found, np.rot90(pixels, turns))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [7, 9, 30])
def test_middle_square_is_cut_out(turned, size):
    thirds = np.repeat(np.array([[10, 120, 240]], dtype=np.uint8), 9, 0).repeat(9, 1)
    found = to_pixels(Image.fromarray(thirds.T if turned else thirds), size, 1)
    assert found.shape == (size, size, 1)
    assert np.abs(np.median(found) - 120) <= 1
    inner = found[:, size // 5 : -(size // 5)] if not turned else found[size // 5 : -(size // 5)]
    assert np.abs(inner.astype(int) - 120).max() <= 25  # the edges ring a little


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (33, 17), (5, 300)])
def test_odd_sizes(shape):
    assert to_pixels(Image.fromarray(noise(*shape, 3)), 16, 3).shape == (16, 16, 3)


# data sets on disk


def numbered(count, size=8):
    """Images that can be told apart by the brightness of their first pixel."""
    images = []
    for index in range(count):
        pixels = noise(size, size, 3, seed=index)
        pixels[0, 0] = index
        images.append(pixels)
    return images


NAMES = ["a", "b", "c", "d"]
CLASS = datasets.ClassLabel(names=NAMES)


def split(images, labels, kind=CLASS, image_column="image", label_column="label", **others):
    kinds = {image_column: datasets.Image(), label_column: kind}
    columns = {image_column: images, label_column: labels}
    for name, (values, feature) in others.items():
        kinds[name], columns[name] = feature, values
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def save(folder, train, **others):
    datasets.DatasetDict(train=train, **others).save_to_disk(folder / "set")
    return str(folder / "set")


def open_source(dataset, **settings):
    return DataSource(DataConfig(dataset=str(dataset), **{"workers": 0, **settings}), threads=1)


def ids(data):
    return sorted(pixels[0, 0, 0].item() for pixels in data.images.pixels)


def test_train_and_test_images_and_their_labels(image_folder, image_dataset):
    source = open_source(image_folder)
    assert source.image_size == 16
    assert (source.image_column, source.label_column) == ("image", "label")
    for data, name in ((source.train(), "train"), (source.test(), "test")):
        expected = np.stack([np.asarray(image) for image in image_dataset[name]["image"]])
        assert np.array_equal(data.images.pixels.numpy(), expected)
        assert data.images.labels.tolist() == image_dataset[name]["label"]
        assert data.label_names == ["north", "east", "south", "west"]
        assert data.images.pixels.dtype == torch.uint8


def test_columns_are_found_by_type(tmp_path):
    extra = dict(caption=(["x"] * 20, datasets.Value("string")), id=(list(range(20)), datasets.Value("int64")))
    path = save(tmp_path, split(numbered(20), NAMES * 5, image_column="img", label_column="fine", **extra))
    source = open_source(path)
    assert (source.image_column, source.label_column) == ("img", "fine")


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory):
    """A data set with two columns of images and two of labels."""
    coarse = (["x", "y"] * 10, datasets.ClassLabel(names=["x", "y"]))
    depth = ([255 - image for image in numbered(20)], datasets.Image())
    weight = ([0.5] * 20, datasets.Value("float64"))
    made = split(numbered(20), NAMES * 5, coarse=coarse, depth=depth, weight=weight)
    return save(tmp_path_factory.mktemp("ambiguous"), made, test=made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "several image columns: choose --image-column image or depth"),
        ({"image_column": "image"}, "several label columns: choose --label-column label or coarse"),
        ({"image_column": "picture"}, "no column 'picture': it has .*image.*depth"),
        ({"image_column": "label"}, "'label' .* holds no images"),
        ({"image_column": "image", "label_column": "class"}, "no column 'class': it has .*label.*coarse"),
        ({"image_column": "image", "label_column": "depth"}, "'depth' .* holds no class labels"),
        ({"image_column": "image", "label_column": "weight"}, "'weight' .* holds no class labels"),
        ({"train_split": "training"}, "no split 'training': it has train, test"),
        ({"image_column": "image", "label_column": "label", "test_split": "held-out"}, "no split 'held-out'"),
        ({"image_column": "image", "label_column": "label", "test_split": "train"}, "'train' is the training split"),
    ],
    ids=str,
)
def test_wrong_column_or_split(ambiguous, settings, message):
    with pytest.raises(InputError, match=message):
        open_source(ambiguous, **settings)


def test_columns_can_be_chosen(ambiguous):
    plain = open_source(ambiguous, image_column="image", label_column="coarse").train()
    other = open_source(ambiguous, image_column="depth", label_column="label").train()
    assert plain.label_names == ["x", "y"]
    assert other.label_names == NAMES
    assert torch.equal(plain.images.pixels, 255 - other.images.pixels)


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        (["pear", "apple"], "string", ["apple", "pear"]),
        ([10, 2], "int64", ["2", "10"]),
        ([7, 0], "uint8", ["0", "7"]),
        ([True, False], "bool", ["False", "True"]),
    ],
    ids=["text", "int64", "uint8", "bool"],
)
def test_plain_labels_become_classes(tmp_path, values, kind, names):
    kind = datasets.Value(kind)
    path = save(tmp_path, split(numbered(20), values * 10, kind), test=split(numbered(4), values * 2, kind))
    source = open_source(path)
    assert source.train().label_names == names
    for data, count in ((source.train(), 10), (source.test(), 2)):
        assert [names[label] for label in data.images.labels] == [str(value) for value in values] * count


def test_label_that_only_the_test_has(tmp_path):
    kind = datasets.Value("string")
    path = save(tmp_path, split(numbered(8), ["x", "y"] * 4, kind), test=split(numbered(2), ["x", "new"], kind))
    with pytest.raises(InputError, match="'new' occurs in no training image"):
        open_source(path).test()


def test_without_a_test_split_a_fixed_fifth_is_held_out(tmp_path):
    path = save(tmp_path, split(numbered(100), NAMES * 25))
    sources = [open_source(path, seed=seed) for seed in (0, 1)]
    first, second = [(ids(source.train()), ids(source.test())) for source in sources]
    assert first == second
    train, test = first
    assert sorted(train + test) == list(range(100))
    assert len(test) == 20
    assert sources[0].test().images.labels.bincount().tolist() == [5] * 4
    assert sources[0].train().images.labels.bincount().tolist() == [20] * 4


@pytest.mark.parametrize("name", ["test", "validation"])
def test_held_out_split_is_found_by_name(tmp_path, name):
    path = save(tmp_path, split(numbered(20), NAMES * 5), **{name: split(numbered(4), NAMES)})
    source = open_source(path)
    assert len(source.test().images) == 4
    assert len(source.train().images) == 20


@pytest.mark.parametrize(
    ("images", "labels", "kind", "message"),
    [
        (numbered(20), ["b"] * 20, CLASS, "has one class, 'b'"),
        (numbered(20), ["b"] * 20, datasets.Value("string"), "has one class, 'b'"),
        (numbered(20), [0, 1, 2, -1] * 5, CLASS, "unlabelled images"),
        (numbered(20), [0, 1, 2, None] * 5, CLASS, "unlabelled images"),
        (numbered(20), [0, 1, 2, None] * 5, datasets.Value("int64"), "unlabelled images"),
        (numbered(20), ["x", "y", "z", None] * 5, datasets.Value("string"), "unlabelled images"),
        (numbered(5), NAMES + ["a"], CLASS, "class 'b' has one image, too few for a test fifth"),
    ],
    ids=["one class", "one text", "minus one", "no class", "no number", "no text", "few"],
)
@pytest.mark.filterwarnings("error:invalid value")
def test_labels_that_cannot_be_learned(tmp_path, images, labels, kind, message):
    path = save(tmp_path, split(images, labels, kind))
    with pytest.raises(InputError, match=message) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


GOOD = png(Image.fromarray(noise(8, 8, 3)))


@pytest.mark.parametrize("row", [0, 7])
@pytest.mark.parametrize("memory_limit", [0.0, 4.0])
@pytest.mark.parametrize(
    "bad",
    [
        None,
        {"bytes": b"not an image", "path": None},
        {"bytes": b"", "path": None},
        {"bytes": GOOD[:-30], "path": None},
        {"bytes": GOOD[:20], "path": None},
    ],
    ids=["missing", "text", "no bytes", "cut short", "header only"],
)
def test_unreadable_image_is_named(tmp_path, bad, row, memory_limit):
    images = [{"bytes": GOOD, "path": None}] * 20
    images[row] = bad
    path = save(tmp_path, split(images, NAMES * 5), test=split(numbered(4), NAMES))
    with pytest.raises(InputError, match=f"row {row} ") as caught:
        open_source(path, memory_limit=memory_limit).train()
    assert "\n" not in str(caught.value)


def test_formats_may_differ_from_image_to_image():
    whole, files = Image.fromarray(noise(12, 12, 3)), []
    for form in ("PNG", "WEBP", "PNG", "PNG", "BMP", "PNG", "TIFF", "WEBP", "WEBP", "GIF", "JPEG", "PNG"):
        buffer = io.BytesIO()
        whole.save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
        files.append({"bytes": buffer.getvalue(), "path": None})
    results = RowReader(split(files, [0] * len(files)), "image", "train", np.arange(len(files)), 12, 3).__getitems__(
        np.arange(len(files))
    )
    for file, pixels in zip(files, results, strict=True):
        assert np.array_equal(pixels, to_pixels(Image.open(io.BytesIO(file["bytes"])), 12, 3))
    exact = np.array([not isinstance(pixels, str) and np.array_equal(pixels, np.asarray(whole)) for pixels in results])
    assert exact.sum() == len(files) - 1, "only JPEG loses anything"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_hostile_bytes_never_do_more_than_make_an_image_unreadable():
    rng, files = np.random.default_rng(0), []
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", *(["AVIF"] if features.check("avif") else [])):
        buffer = io.BytesIO()
        Image.fromarray(noise(12, 12, 3)).save(buffer, form)
        for _ in range(40):
            broken = bytearray(buffer.getvalue())
            for position in rng.integers(0, len(broken), 4):
                broken[position] = rng.integers(256)
            files.append({"bytes": bytes(broken[: rng.integers(len(broken) // 2, len(broken) + 1)]), "path": None})
    reader = RowReader(split(files, [0] * len(files)), "image", "train", np.arange(len(files)), 8, 3)
    results = reader.__getitems__(np.arange(len(files)))
    assert {type(result) for result in results} == {np.ndarray, str}
    assert all(result.shape == (8, 8, 3) for result in results if isinstance(result, np.ndarray))


def test_unreadable_image_in_a_worker_process(tmp_path):
    images = numbered(20)
    images[11] = {"bytes": b"nothing", "path": None}
    path = save(tmp_path, split(images, NAMES * 5), test=split(numbered(4), NAMES))
    with pytest.raises(InputError, match="row 11 of split 'train' cannot be read"):
        open_source(path, memory_limit=0, workers=1).train()


@pytest.mark.parametrize("dataset", ["./nowhere", "/nowhere", "~/nowhere-at-all", "nobody/nothing", "nothing"])
def test_no_such_data_set(dataset):
    with pytest.raises(InputError) as caught:
        open_source(dataset)
    assert "\n" not in str(caught.value)
    assert repr(dataset) in str(caught.value)


def test_no_images_at_all(tmp_path):
    with pytest.raises(InputError, match="is an empty folder"):
        open_source(tmp_path)
    split([], []).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="is empty"):
        open_source(tmp_path)
    (tmp_path / "folders" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot be loaded.*contain any data files"):
        open_source(tmp_path / "folders")


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(InputError, match=r"no column of images|cannot be loaded"):
        open_source(tmp_path)


def test_image_folder_of_files_with_a_folder_for_each_class(tmp_path):
    for index, pixels in enumerate(numbered(40)):
        folder = tmp_path / "pets" / ["cat", "dog"][index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    source = open_source(tmp_path / "pets")
    train, test = source.train(), source.test()
    assert train.label_names == ["cat", "dog"]
    assert (len(train.images), len(test.images)) == (32, 8)
    assert sorted(ids(train) + ids(test)) == list(range(40))
    for data in (train, test):
        assert [p[0, 0, 0].item() % 2 for p in data.images.pixels] == data.images.labels.tolist()


def test_digits_come_with_the_package():
    source = open_source("digits", in_chans=1)
    train, test = source.train(), source.test()
    assert train.images.pixels.shape[1:] == (32, 32, 1)
    assert len(train.images) + len(test.images) == 1797
    assert train.label_names == list("0123456789")
    assert 0.1 < train.mean[0] < 0.6


# limit, size, channels, statistics


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """100 images of unequal classes: 50, 30, 15 and 5."""
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 15 + ["d"] * 5
    return save(tmp_path_factory.mktemp("unequal"), split(numbered(100), labels), test=split(numbered(8), NAMES * 2))


@pytest.mark.parametrize("limit", [20, 40])
def test_limit_keeps_the_share_of_every_class(unequal, limit):
    data = open_source(unequal, limit=limit).train()
    assert data.images.labels.bincount().tolist() == [limit // 2, limit * 3 // 10, limit * 15 // 100, limit // 20]
    assert len(set(ids(data))) == limit
    assert ids(data) == ids(open_source(unequal, limit=limit, seed=1).train())
    assert len(open_source(unequal, limit=limit).test().images) == 8


@pytest.mark.parametrize("limit", [96, 97, 98, 99, 100, 1000])
def test_limit_may_be_near_or_over_what_there_is(unequal, limit):
    assert len(open_source(unequal, limit=limit).train().images) == min(limit, 100)


def test_limit_below_the_number_of_classes(unequal):
    with pytest.raises(InputError, match="limit 3"):
        open_source(unequal, limit=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 1025}, "image-size 1025 is too large"),
        ({"crop_padding": 257}, "crop-padding 257 is too large"),
        ({"crop_padding": 8}, "crop-padding 8 would cut whole images of 8 pixels away"),
    ],
    ids=["size", "padding", "padding of this size"],
)
def test_sizes_beyond_reason(unequal, settings, message):
    with pytest.raises(InputError, match=message):
        open_source(unequal, **settings)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("image_size", [None, 8, 12])
def test_image_size_and_channels(unequal, image_size, in_chans):
    source = open_source(unequal, image_size=image_size, in_chans=in_chans)
    size = image_size or 8
    assert source.image_size == size
    for data in (source.train(), source.test()):
        assert data.images.pixels.shape[1:] == (size, size, in_chans)
        assert data.image_size == size
        assert len(data.mean) == len(data.std) == in_chans


def test_size_is_the_median_shorter_side_within_reason(tmp_path):
    images = [noise(90, 80, 3)] + [noise(30, 50, 3)] * 10 + [noise(40, 20, 3)] * 9
    source = open_source(save(tmp_path, split(images, NAMES * 5)))
    assert (source.image_size, source.size_origin) == (30, "the median shorter side of 16 images")
    source = open_source(save(tmp_path / "large", split([noise(300, 400, 3)] * 20, NAMES * 5)))
    assert (source.image_size, source.size_origin) == (224, "the median shorter side of 16 images, at most 224")
    assert open_source(tmp_path, image_size=12).size_origin == "given"


def test_statistics_are_those_of_the_training_images(unequal):
    data = open_source(unequal).train()
    plain = data.images.pixels.numpy() / 255
    assert data.mean == pytest.approx(plain.mean((0, 1, 2)), abs=1e-5)
    assert data.std == pytest.approx(plain.std((0, 1, 2)), abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics(channels):
    pixels = noise(2500, 3, 3, channels)
    pixels[..., 0] //= 7
    mean, std = channel_statistics(torch.from_numpy(pixels))
    assert mean == pytest.approx((pixels / 255).mean((0, 1, 2)), abs=1e-5)
    assert std == pytest.approx((pixels / 255).std((0, 1, 2)), abs=1e-5)


def test_a_constant_channel_can_still_be_divided_by():
    _, std = channel_statistics(torch.full((4, 2, 2, 3), 9, dtype=torch.uint8))
    assert min(std) > 0


def test_fingerprint_follows_pixels_and_labels(tmp_path):
    def fingerprint(name, images, labels):
        path = save(tmp_path / name, split(images, labels), test=split(images, labels))
        return open_source(path).train().fingerprint

    images, labels = numbered(20), NAMES * 5
    first = fingerprint("first", images, labels)
    assert fingerprint("again", images, labels) == first
    assert fingerprint("labels", images, labels[::-1]) != first
    images[3] = images[3].copy()
    images[3][4, 4, 1] ^= 1
    assert fingerprint("pixels", images, labels) != first


# cache and streaming


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bmsn_zoo_pixels"


def same(first, second):
    return (
        torch.equal(first.images.pixels, second.images.pixels)
        and torch.equal(first.images.labels, second.images.labels)
        and (first.mean, first.std, first.fingerprint) == (second.mean, second.std, second.fingerprint)
    )


def test_second_load_decodes_nothing(unequal, cache, monkeypatch):
    first = [open_source(unequal).train(), open_source(unequal).test(), open_source(unequal, limit=40).train()]

    def decode(*_):
        raise RuntimeError("it was decoded again")

    monkeypatch.setattr(pixels_module, "to_pixels", decode)
    second = [open_source(unequal).train(), open_source(unequal).test(), open_source(unequal, limit=40).train()]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    for settings in ({"image_size": 12}, {"in_chans": 1}, {"limit": 20}):
        with pytest.raises(InputError, match="decoded again"):
            open_source(unequal, **settings).train()


@pytest.mark.parametrize("damage", [lambda old: old[: len(old) // 2], lambda old: b"", lambda old: b"x" * len(old)])
def test_damaged_cache_is_ignored_and_replaced(unequal, cache, caplog, damage):
    first = open_source(unequal).train()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert same(open_source(unequal).train(), first)
    assert "damaged cache" in caplog.text
    assert file.read_bytes() == whole


def test_cache_that_cannot_be_written_is_done_without(unequal, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert len(open_source(unequal).train().images) == 100
    assert "cannot cache" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_are_those_in_memory(unequal, workers):
    memory = open_source(unequal, image_size=12).train()
    streamed = open_source(unequal, image_size=12, memory_limit=0, workers=workers).train()
    assert streamed.images.pixels is None
    assert (streamed.mean, streamed.std) == (memory.mean, memory.std)
    order = shuffled_batches(100, 16, np.random.default_rng(0))
    chosen = np.random.default_rng(1).permutation(100)[:50]
    for a, b, positions in (
        (streamed.images, memory.images, order),
        (streamed.images.select(chosen), memory.images.select(chosen), [np.array([0, 49]), np.array([7])]),
    ):
        batches = list(zip(a.batches(positions), b.batches(positions), strict=True))
        assert len(batches) == len(positions)
        for (pixels, labels), (expected_pixels, expected_labels) in batches:
            assert torch.equal(pixels, expected_pixels)
            assert torch.equal(labels, expected_labels)


def test_workers_stay_for_all_epochs(unequal):
    images = open_source(unequal, memory_limit=0, workers=2).train().images
    workers = []
    for epoch in range(3):
        order = shuffled_batches(100, 16, np.random.default_rng(epoch))
        for positions, (pixels, _) in zip(order, images.batches(order), strict=True):
            assert sorted(pixels[:, 0, 0, 0].tolist()) == sorted(positions.tolist())
        workers.append({process.pid for process in multiprocessing.active_children()})
    assert len(workers[0]) == 2
    assert workers[0] == workers[1] == workers[2]


def test_a_killed_worker_is_one_line(unequal, capfd):
    def run():
        images = open_source(unequal, memory_limit=0, workers=1).train().images
        for _ in images.batches([np.array([0])] * 100):
            for worker in multiprocessing.active_children():
                worker.kill()

    assert run_command(run) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "a process that reads images ended" in line
    assert "--workers" in line


def test_selection_keeps_images_and_labels_together(unequal):
    images = open_source(unequal).train().images
    twice = images.select(np.arange(10, 60)).select(np.array([3, 1]))
    ((pixels, labels),) = twice.batches([np.array([0, 1])])
    assert pixels[:, 0, 0, 0].tolist() == [13, 11]
    assert labels.tolist() == images.labels[[13, 11]].tolist()


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu", "cuda"])
def test_only_cuda_is_not_waited_for(kind):
    """Elsewhere a copy that is still under way reads memory that was given back."""
    calls = []

    class Recorded(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append((function.__name__, (kwargs or {}).get("non_blocking", False)))
            return False if function.__name__ == "__get__" else args[0]

    to_device(torch.zeros(2).as_subclass(Recorded), torch.device(kind))
    copies = [call for call in calls if call[0] != "__get__"]
    assert copies == ([("pin_memory", False), ("to", True)] if kind == "cuda" else [("to", False)])


# order of images


def test_split_is_stratified_disjoint_and_seeded():
    labels = np.array([0] * 40 + [1] * 20 + [2] * 4)
    first, second = stratified_split(labels, 0.5, 3, "two halves")
    assert sorted([*first, *second]) == list(range(64))
    assert np.bincount(labels[first]).tolist() == np.bincount(labels[second]).tolist() == [20, 10, 2]
    assert np.array_equal(stratified_split(labels, 0.5, 3, "")[0], first)
    assert not np.array_equal(stratified_split(labels, 0.5, 4, "")[0], first)
    with pytest.raises(InputError, match="class 'dog' has one image, too few for two halves"):
        stratified_split(np.array([0, 0, 0, 0, 1]), 0.5, 0, "two halves", ["cat", "dog"])
    with pytest.raises(InputError, match="6 images are too few for two parts"):
        stratified_split(np.array([0, 0, 1, 1, 2, 2]), 2, 0, "two parts")


@pytest.mark.parametrize(("count", "batch"), [(100, 16), (64, 16), (16, 16), (10, 16)])
def test_shuffled_batches_are_full_and_never_repeat(count, batch):
    batches = shuffled_batches(count, batch, np.random.default_rng(0))
    assert [len(positions) for positions in batches] == [batch] * (count // batch)
    taken = [position for positions in batches for position in positions]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(count))
    if taken:
        assert taken != sorted(taken)
        assert taken != np.concatenate(shuffled_batches(count, batch, np.random.default_rng(1))).tolist()


@pytest.mark.parametrize("processes", [2, 4])
def test_shards_of_a_batch_make_up_the_batch(processes):
    whole = shuffled_batches(100, 16, np.random.default_rng(0))
    shards = [shuffled_batches(100, 16, np.random.default_rng(0), (rank, processes)) for rank in range(processes)]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert {len(part) for part in parts} == {16 // processes}
        assert sorted(np.concatenate(parts)) == sorted(batch)


@pytest.mark.parametrize(("count", "batch"), [(100, 16), (64, 16), (17, 16), (5, 16), (1, 1), (20, 2), (2, 2)])
def test_even_batches_cover_everything_once(count, batch):
    batches = even_batches(count, batch, np.random.default_rng(0))
    sizes = [len(positions) for positions in batches]
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-count // batch)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert count < 16 or np.concatenate(batches).tolist() != list(range(count))


def test_no_image_is_alone_in_a_batch_whose_statistics_normalise_it():
    assert sorted(map(len, even_batches(21, 2, np.random.default_rng(0)))) == [2] * 9 + [3]


def test_random_streams_are_told_apart_by_every_argument():
    keys = list(itertools.product((0, 1, 2**31 - 1), (0, 1, 4), (0, 1, 10**6)))
    drawn = [tuple(random_stream(*key).integers(0, 2**60, 4)) for key in keys]
    assert drawn == [tuple(random_stream(*key).integers(0, 2**60, 4)) for key in keys]
    assert len(set(drawn)) == len(keys)


# augmentation


def crops(image, padding, flip):
    """Every crop of the padded image, and its mirror image: (vertical, horizontal, mirrored) to pixels."""
    size = image.shape[0]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    for y, x in itertools.product(range(2 * padding + 1), repeat=2):
        crop = padded[y : y + size, x : x + size]
        yield (y, x, 0), crop
        if flip:
            yield (y, x, 1), crop[:, ::-1]


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True), (1, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_becomes_one_of_its_own_crops(padding, flip, channels):
    images = torch.from_numpy(noise(400, 5, 5, channels))
    augment = Augmentation(padding, flip)
    augmented = augment(images, augment.draw(1, 400, np.random.default_rng(0))[0])
    assert augmented.dtype == torch.uint8
    assert augmented.shape == images.shape
    chosen = {}
    for original, found in zip(images.numpy(), augmented.numpy(), strict=True):
        matches = [kind for kind, crop in crops(original, padding, flip) if np.array_equal(crop, found)]
        assert len(matches) == 1
        chosen[matches[0]] = chosen.get(matches[0], 0) + 1
    kinds = (2 * padding + 1) ** 2 * (1 + flip)
    assert len(chosen) == kinds
    assert chisquare(list(chosen.values())).pvalue > 1e-3


def test_augmentation_draws_anew_from_its_numbers_alone():
    images, augment = torch.from_numpy(noise(32, 6, 6, 3)), Augmentation(2, True)
    first, second = augment.draw(2, 32, random_stream(0, 1, 5))
    torch.manual_seed(9)
    assert torch.equal(augment.draw(2, 32, random_stream(0, 1, 5))[1], second)
    assert not torch.equal(augment(images, first), augment(images, second))
    assert torch.equal(images, torch.from_numpy(noise(32, 6, 6, 3))), "the original was changed"


@pytest.mark.parametrize("processes", [2, 4])
def test_augmentation_does_not_depend_on_the_number_of_processes(processes):
    images, augment = torch.from_numpy(noise(32, 6, 6, 3)), Augmentation(2, True)
    whole = augment(images, augment.draw(3, 32, random_stream(0, 1, 5))[1])
    for rank in range(processes):
        drawn = augment.draw(3, 32, random_stream(0, 1, 5), (rank, processes))
        assert torch.equal(augment(images[rank::processes], drawn[1]), whole[rank::processes])


def test_augmentation_that_is_off_changes_nothing():
    images, augment = torch.from_numpy(noise(8, 6, 6, 3)), Augmentation(0, False)
    assert torch.equal(augment(images, augment.draw(1, 8, np.random.default_rng(0))[0]), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_other_devices_crop_and_mirror_as_cpus_do(channels, padding):
    images = torch.from_numpy(noise(32, 6, 6, channels))
    (drawn,) = Augmentation(padding, True).draw(1, 32, np.random.default_rng(0))
    assert torch.equal(crop_with_torch(images, drawn, padding), crop_with_numpy(images, drawn, padding))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise(channels):
    pixels = noise(4, 5, 6, channels)
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels]
    found = normalise(torch.from_numpy(pixels), mean, std)
    expected = ((pixels / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "processes", "multiple", "fitting"),
    [(128, 3, 1, "126 or 129"), (128, 3, 2, "126 or 132"), (4, 3, 1, "6"), (2, 4, 2, "8"), (130, 4, 1, "128 or 132")],
)
def test_a_batch_that_processes_cannot_share_is_answered_by_sizes_that_they_can(
    batch_size, processes, multiple, fitting
):
    with pytest.raises(InputError, match=f"batch-size {batch_size} .* {processes} processes: use {fitting}$"):
        check_batch_size(batch_size, processes, multiple)
    for size in fitting.split(" or "):
        check_batch_size(int(size), processes, multiple)
