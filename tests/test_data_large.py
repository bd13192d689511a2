"""Images of any size: random resized crops, evaluation as timm does it, and copies that are shrunk once."""

import io
import json

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from bmsn_zoo import InputError
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.config import DataConfig
from bmsn_zoo.data import AUGMENT, ORDER, DataSource, random_stream, shuffled_batches
from bmsn_zoo.data import sources as sources_module
from bmsn_zoo.results import SearchResult, TrainResult

NAMES = [f"dish_{number:03}" for number in range(101)]


def photo(rng, low=70, high=160):
    """A JPEG of a size of its own, smooth as photos are."""
    width, height = map(int, rng.integers(low, high, 2))
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def food(tmp_path_factory):
    """A set with the columns, splits and classes of Food-101."""
    rng, features = (
        np.random.default_rng(0),
        datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES)),
    )
    folder = tmp_path_factory.mktemp("food") / "food101"
    folder.mkdir()
    for split, each in (("train", 4), ("validation", 1)):
        table = {"image": [photo(rng) for _ in range(101 * each)], "label": [*range(101)] * each}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def source_of(dataset, **settings):
    return DataSource(DataConfig(dataset=str(dataset), image_size=48, crop="random-resized", **settings), 1)


def crops_of(source, epoch=0):
    """Training images of an epoch in its order, and plain ones of the same rows."""
    images, augment = source.train().images, source.augmentation(True)
    order = shuffled_batches(len(images), 16, random_stream(0, ORDER, epoch))[:4]
    drawn = augment.draw(len(order), 16, random_stream(0, AUGMENT, epoch))
    crops = [batch for batch, _ in images.batches(zip(order, drawn, strict=True), augment=augment)]
    return torch.cat(crops), torch.cat([batch for batch, _ in images.batches(order)])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_crops_depend_on_seed_epoch_and_image_alone(food):
    crops, plain = crops_of(source_of(food, memory_limit=0, workers=0))
    assert crops.shape == plain.shape == (64, 48, 48, 3)
    for workers in (1, 3):
        again = crops_of(source_of(food, memory_limit=0, workers=workers))
        assert torch.equal(again[0], crops) and torch.equal(again[1], plain)
    assert not torch.equal(crops_of(source_of(food, memory_limit=0), 1)[0], crops)
    memory_crops, memory_plain = crops_of(source_of(food))
    assert torch.equal(memory_crops, crops_of(source_of(food))[0])
    assert torch.equal(memory_plain, plain), "evaluation sees the same of images in memory"
    assert memory_crops.shape == crops.shape


def test_crops_in_memory_are_those_of_workers(tmp_path):
    rng, images = np.random.default_rng(0), []
    for _ in range(40):
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        images.append(smooth.resize((54, 54), Image.Resampling.BICUBIC))  # 48 / 0.875
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 20}, features=features)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "squares")
    (streamed, _), (memory, _) = (crops_of(source_of(tmp_path / "squares", memory_limit=limit)) for limit in (0, 4))
    difference = (streamed.float() - memory.float()).abs().mean((1, 2, 3))
    assert difference.max() < 8, "bilinear, not bicubic; another crop or mirror image differs by some 50"


@pytest.mark.parametrize(("size", "crop_pct", "memory_limit"), [(48, None, 0), (33, 0.95, 4), (64, 0.8, 4)])
def test_evaluation_is_that_of_timm(food, size, crop_pct, memory_limit):
    settings = dict(dataset=str(food), image_size=size, crop="random-resized", crop_pct=crop_pct, limit=202)
    source = DataSource(DataConfig(**settings, memory_limit=memory_limit), 1)
    transform = timm.data.create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=crop_pct or 0.875, normalize=False
    )
    for part, data in ((source.training, source.train()), (source.held_out, source.test())):
        ((found, _),) = data.images.batches([np.arange(60)])
        for row, pixels in zip(part.rows.tolist(), found, strict=False):
            assert torch.equal(transform(part.table[row]["image"]).permute(1, 2, 0), pixels)


def test_the_crop_follows_the_size_unless_it_is_said(food):
    def resized(**settings):
        source = DataSource(DataConfig(dataset=str(food), **settings), 1)
        return source.resized, source.crop_pct

    assert resized(image_size=128) == (True, 0.875)
    assert resized(image_size=127) == resized(image_size=128, crop="pad") == (False, 1.0)
    assert resized(image_size=32, crop="random-resized", crop_pct=1.0) == (True, 1.0)


@pytest.mark.slow
def test_a_shrunk_copy_is_made_once_and_of_training_images_alone(food, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = dict(store_size=60, memory_limit=0)
    first = source_of(food, **settings)
    reader = first.train().images.reader
    sizes = [Image.open(io.BytesIO(value["bytes"])).size for value in reader.values(np.arange(50))]
    originals = [image.size for image in first.training.table[:50]["image"]]
    assert {min(size) for size in sizes} == {60}
    assert sizes == [tuple(60 * side // min(size) for side in size) for size in originals]
    assert first.describe(first.train())["store_size"] == 60
    assert torch.equal(*(next(s.test().images.batches([np.arange(20)]))[0] for s in (first, source_of(food))))

    monkeypatch.setattr(sources_module, "shrink", None)  # would fail if it were needed again
    assert torch.equal(crops_of(source_of(food, **settings))[0], crops_of(first)[0])
    with pytest.raises(InputError, match="store-size 50 is less than the 54 pixels"):
        source_of(food, store_size=50)


def test_an_unreadable_image_is_named_by_its_own_row_though_others_are_shrunk(tmp_path):
    rng = np.random.default_rng(0)
    images = [photo(rng) for _ in range(40)]
    images[17] = {"bytes": b"no image", "path": None}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 20}, features=features)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match="row 17 of split 'train' cannot be read"):
        source = source_of(tmp_path / "set", store_size=60)  # row 17 trains or is held out
        source.train(), source.test()


SEARCH = [
    "--model",
    "resnet10t",
    "--mixed-precision",
    "no",
    "--default-layout",
    "1-2-1",
    "--image-size",
    "32",
    "--crop",
    "random-resized",
]
SEARCH += ["--mixture-size", "1", "--epochs", "2", "--batch-size", "64", "--eval-batch-size", "101", "--seed", "1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_food101_from_search_to_model_streamed_and_in_memory(food, tmp_path):
    def search(name, *settings):
        assert search_module.main(["--dataset", str(food), *SEARCH, *settings, "--output", str(tmp_path / name)]) == 0
        return SearchResult.read(tmp_path / name / "search.json")

    streamed = ["--memory-limit", "0", "--store-size", "40"]
    whole = search("whole", *streamed, "--workers", "1")
    with pytest.MonkeyPatch.context() as patch:
        end_epoch = search_module._Search.end_epoch

        def stopped(self, *more):
            end_epoch(self, *more)
            raise KeyboardInterrupt

        patch.setattr(search_module._Search, "end_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            search("killed", *streamed, "--workers", "0")
    assert search_module.main(["--output", str(tmp_path / "killed"), "--resume", "--workers", "2"]) == 0
    resumed = SearchResult.read(tmp_path / "killed" / "search.json")
    assert resumed.accuracy_matrix == whole.accuracy_matrix, "whatever workers read, and whatever was killed"
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]
    assert (whole.dataset.store_size, whole.dataset.crop_pct, len(whole.layouts)) == (40, 0.875, 3)

    search("memory")
    train = ["--from-search", str(tmp_path / "memory"), "--pick", "default", "--epochs", "1", "--batch-size", "64"]
    assert train_module.main([*train, "--output", str(tmp_path / "train")]) == 0
    metrics = TrainResult.read(tmp_path / "train" / "metrics.json")
    assert (metrics.settings["crop"], metrics.dataset.crop_pct, metrics.test_images) == ("random-resized", 0.875, 101)
    model = timm.create_model(f"local-dir:{tmp_path / 'train' / 'model'}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 32, 32), 0.875, "bicubic")
    assert "shorter side resized to 36 pixels" in (tmp_path / "train" / "model" / "README.md").read_text("utf-8")
