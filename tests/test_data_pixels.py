"""Images of any depth, damaged EXIF data, decoders that fail, and cache files that are not to be trusted."""

import io
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_data import NAMES, noise, numbered, open_source, png, save, split

from bmsn_zoo import InputError
from bmsn_zoo.data import to_pixels

# more than 8 bits a channel


def tiff(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return {"bytes": buffer.getvalue(), "path": None}


def gray_set(folder, values, kind):
    images = [tiff(image.astype(kind)) for image in values]
    return save(folder, split(images, NAMES * (len(images) // 4)), test=split(images[:8], NAMES * 2))


@pytest.mark.parametrize(
    ("kind", "white", "black"),
    [
        ("uint16", 65535, 0),
        ("int32", 255, 0),
        ("int32", 1023, 0),
        ("int32", 65535, 0),
        ("int32", 2**24 - 1, 0),
        ("int32", 2047, -2047),
        ("float32", 1, 0),
        ("float32", 16, 0),
        ("float32", 255, 0),
        ("float32", 4095, 0),
        ("float32", 1, -1),
        ("float32", 4, -4),
    ],
)
def test_values_of_a_whole_set_share_one_scale(tmp_path, kind, white, black):
    shares = np.random.default_rng(0).random((20, 8, 8))
    shares[0, 0, :2] = 0, 1
    shares[1] /= 50  # a dark image stays dark
    data = open_source(gray_set(tmp_path, black + shares * (white - black), kind), in_chans=1)
    images = data.train().images
    assert np.abs(images.pixels[..., 0].numpy() - 255 * shares).max() <= (1 if white > 255 or kind[0] == "f" else 1.01)
    assert torch.equal(data.test().images.pixels, images.pixels[:8])


@pytest.mark.parametrize(("low", "high"), [(-0.05, 1.05), (0, 256), (0, 1.0)])
def test_what_lies_a_little_outside_is_cut_off(tmp_path, low, high):
    values = low + np.random.default_rng(0).random((20, 8, 8)) * (high - low)
    white = 255 if high > 2 else 1
    pixels = open_source(gray_set(tmp_path, values, "float32"), in_chans=1).train().images.pixels[..., 0]
    assert np.abs(pixels.numpy() - (255 * values / white).clip(0, 255)).max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    values = np.random.default_rng(0).random((20, 8, 8))
    values[7, 3, 3] = bad
    with pytest.raises(InputError, match="row 7 of split 'train' cannot be read: it holds NaN or infinite values"):
        open_source(gray_set(tmp_path, values, "float32")).train()


def test_a_type_of_values_that_the_sample_lacks_is_refused(tmp_path):
    images = [{"bytes": png(Image.fromarray(noise(8, 8))), "path": None}] * 200
    images[150] = tiff(np.random.default_rng(0).random((8, 8)).astype("float32"))
    path = save(tmp_path, split(numbered(20), NAMES * 5), test=split(images, NAMES * 50))
    with pytest.raises(InputError, match="row 150 of split 'test' cannot be read: its values are of type F"):
        open_source(path).test()


# EXIF data and decoders


def ifd(*entries):
    """EXIF data of raw entries (tag, type, count, value)."""
    body = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return body + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)


ORIENTATION = (0x0112, 3, 1, struct.pack("<I", 6))
DAMAGED = {
    "resolution as text": ifd(ORIENTATION, (0x011A, 2, 4, b"abc\0")),
    "description as a number": ifd((0x010E, 4, 1, struct.pack("<I", 7)), ORIENTATION),
    "rational beyond the end": ifd(ORIENTATION, (0x011B, 5, 1, struct.pack("<I", 9999))),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", DAMAGED)
def test_images_are_turned_even_if_their_exif_data_is_damaged(kind):
    pixels = noise(8, 8, 3)
    image = Image.open(io.BytesIO(png(Image.fromarray(pixels), exif=DAMAGED[kind])))
    assert np.array_equal(to_pixels(image, 8, 3), np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_undone_as_pillow_does(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(io.BytesIO(png(Image.fromarray(noise(8, 8, 3)), exif=exif)))
    assert np.array_equal(to_pixels(image, 8, 3), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"", b"Exif\0\0II*\0\xff\xff\xff\x7f", ifd((0x0112, 2, 2, b"x\0\0\0"))]
)
def test_exif_data_that_says_nothing_changes_nothing(exif):
    pixels = noise(8, 8, 3)
    image = Image.open(io.BytesIO(png(Image.fromarray(pixels), exif=exif)))
    assert np.array_equal(to_pixels(image, 8, 3), pixels)


@pytest.mark.parametrize(
    "error", [TypeError("no"), struct.error("short"), AssertionError(), KeyError("x"), MemoryError()]
)
def test_whatever_a_decoder_raises_is_about_one_image(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    path = save(tmp_path, split(numbered(20), NAMES * 5))
    source = open_source(path)
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert len(source.train().images) == 16, "EXIF data is not needed"
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(InputError, match=r"of split 'train' cannot be read: \S") as caught:
        open_source(path, image_size=9).train()
    assert "\n" not in str(caught.value)


# cache files


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A data set, its pixels, and the one file of their cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = save(tmp_path, split(numbered(20), NAMES * 5), test=split(numbered(4), NAMES))
    data = open_source(path).train()
    (file,) = (tmp_path / "cache" / "bmsn_zoo_pixels").iterdir()
    return path, data, file


def test_a_damaged_cache_file_is_never_used(cached):
    path, data, file = cached
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for index in range(60):
        broken = bytearray(whole)
        place = rng.integers(len(broken)) if index % 2 else rng.integers(400)  # the header, or anywhere
        broken[place] ^= 1 << rng.integers(8)
        file.write_bytes(broken[: rng.integers(len(broken))] if index % 5 == 0 else broken)
        again = open_source(path).train()
        assert torch.equal(again.images.pixels, data.images.pixels)
        assert (again.mean, again.std, again.fingerprint) == (data.mean, data.std, data.fingerprint)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("change", ["rows", "type", "values", "statistics", "no statistics", "of another set"])
def test_a_foreign_cache_file_is_never_used(cached, tmp_path, change):
    path, data, file = cached
    with safe_open(str(file), "pt") as opened:
        pixels, about = opened.get_tensor("pixels"), opened.metadata()
    if change == "of another set":
        open_source(
            save(tmp_path / "other", split(numbered(20)[::-1], NAMES * 5), test=split(numbered(4), NAMES))
        ).train()
        (other,) = set(file.parent.iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    else:
        pixels = {"rows": pixels[:-1], "type": pixels.float(), "values": 255 - pixels}.get(change, pixels)
        key, value = next(iter(about.items()))
        about = {"statistics": {key: value.replace("mean", "main")}, "no statistics": {}}.get(change, about)
        save_file({"pixels": pixels.contiguous()}, file, about)
    again = open_source(path).train()
    assert torch.equal(again.images.pixels, data.images.pixels)
    assert (again.mean, again.fingerprint) == (data.mean, data.fingerprint)


def test_sets_in_memory_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    open_source("digits").train()
    assert not (tmp_path / "cache").exists()
