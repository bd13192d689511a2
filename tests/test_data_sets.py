"""Data sets as people have them: classes by name, folders, columns, formats, and files that change."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_runs import COMMON, run
from test_data import CLASS, NAMES, noise, numbered, open_source, png, save, split

from bmsn_zoo import InputError
from bmsn_zoo import training as train_module
from bmsn_zoo.results import TrainResult

TEXT = datasets.Value("string")


def classes(data):
    return [data.label_names[label] for label in data.images.labels]


# classes are matched by name


def named(names):
    return datasets.ClassLabel(names=names)


OTHER_CLASSES = [named(["d", "b", "a", "c"]), named(["d", "b"]), named(["b", "z", "d"])]


@pytest.mark.parametrize(
    ("stored", "kind"),
    [("saved", TEXT), *((stored, kind) for stored in ("saved", "parquet") for kind in OTHER_CLASSES)],
)
def test_test_labels_are_matched_by_name(tmp_path, stored, kind):
    train, test = split(numbered(20), NAMES * 5), split(numbered(4), ["b", "d", "d", "b"], kind)
    if stored == "saved":
        path = save(tmp_path, train, test=test)
    else:
        path = tmp_path
        train.to_parquet(path / "train.parquet")
        test.to_parquet(path / "test.parquet")
    found = open_source(path).test()
    assert found.label_names == NAMES
    assert classes(found) == ["b", "d", "d", "b"]


@pytest.mark.parametrize(
    ("train", "test", "label", "message"),
    [
        (CLASS, named(["a", "z"]), "z", "'z' occurs in no training image"),
        (datasets.Value("int64"), named(["cat", "dog"]), "dog", "'dog' occurs in no training image"),
        (CLASS, datasets.Value("int64"), 1, "'1' occurs in no training image"),
        (CLASS, datasets.Value("float32"), 1.0, "'label' .* split 'test', holds no class labels"),
    ],
    ids=["unknown class", "integers then classes", "classes then integers", "fractions"],
)
def test_test_labels_of_unknown_classes_are_refused(tmp_path, train, test, label, message):
    path = save(tmp_path, split(numbered(20), [0, 1] * 10, train), test=split(numbered(2), [label] * 2, test))
    with pytest.raises(InputError, match=message):
        open_source(path).test()


def test_labels_out_of_range_are_refused(tmp_path):
    table = split(numbered(20), [0, 1, 2, 7] * 5, datasets.Value("int64"))
    features = datasets.Features({**table.features, "label": CLASS})
    raw = table.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    with pytest.raises(InputError, match=r"split 'train' .* has the label 7, but 4 classes"):
        open_source(save(tmp_path, datasets.Dataset(pa.table(raw))))


# what holds the labels


def write_parquet(folder, **columns):
    """Images and columns as other libraries write them: no metadata of Hugging Face."""
    images = [{"bytes": png(Image.fromarray(image)), "path": None} for image in numbered(20)]
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), **columns}), folder / "train.parquet")
    return folder


def test_text_labels_of_any_kind_of_text(tmp_path):
    source = open_source(write_parquet(tmp_path, kind=pa.array(["cat", "dog"] * 10, pa.large_string())))
    assert source.image_column == "image"
    assert set(classes(source.train())) == {"cat", "dog"} == set(source.label_names)


def test_a_choice_among_columns_is_asked_for(tmp_path):
    columns = {"fold": pa.array([0, 1] * 10), "kind": pa.array(["cat", "dog"] * 10, pa.large_string())}
    with pytest.raises(InputError, match="several label columns: choose --label-column fold or kind"):
        open_source(write_parquet(tmp_path, **columns))


def test_what_is_learned_from_what_is_said(tmp_path):
    train = split(numbered(20), NAMES * 5, caption=(["x"] * 20, TEXT))
    summary = open_source(save(tmp_path, train, validation=split(numbered(4), NAMES))).summary()
    assert "4 classes of column 'label', not 'caption' (a, b, c, d)" in summary
    assert "20 training images of split 'train'; 4 test images: split 'validation'" in summary
    assert "4 test images: a fixed fifth of the training images" in open_source(save(tmp_path / "2", train)).summary()


@pytest.mark.parametrize("columns", [None, ["label"]])
@pytest.mark.parametrize("style", ["pandas", "arrow", "numpy", "torch"])
def test_stored_formats_are_reset(tmp_path, style, columns):
    table = split(numbered(20), NAMES * 5)
    plain = open_source(save(tmp_path / "plain", table)).train()
    data = open_source(save(tmp_path, table.with_format(style, columns=columns))).train()
    assert torch.equal(data.images.pixels, plain.images.pixels)
    assert torch.equal(data.images.labels, plain.images.labels)


# folders of images


def write_images(root, names):
    """One image for every name; brightness is its number."""
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), index, dtype=np.uint8)).save(root / name)
    return root


def tree(splits, kinds, count=5, prefix=""):
    return [f"{part}/{kind}/{prefix}{n}.png" for part in splits for kind in kinds for n in range(count)]


def images_of(data):
    """The class of every image by its number."""
    numbers = data.images.pixels[:, 0, 0, 0].tolist()
    return dict(zip(numbers, classes(data), strict=True))


@pytest.mark.parametrize(
    ("names", "test"),
    [
        (tree(["train", "test"], ["car", "train"]), range(10, 20)),
        (tree(["train", "val"], ["a test", "b"]), range(10, 20)),
        (tree(["Train", "Test"], ["cat", "dog"]), range(10, 20)),
        (tree(["TRAINING", "Validation"], ["cat", "dog"]), range(10, 20)),
        (tree(["set-2/train_images", "set-2/test_images"], ["cat", "dog"]), range(10, 20)),
        (tree(["Train", "Test"], ["cat", "dog"], prefix="train_"), range(10, 20)),
        (tree(["train", "test", "extra"], ["cat", "dog"]), range(10, 20)),
        (tree([""], ["cat", "dog"], prefix="train_") + tree([""], ["cat", "dog"], prefix="test_"), range(10, 20)),
        ([f"{kind}/{n}.png" for kind in ("car", "train", "test") for n in range(5)], None),
        ([f"{kind}/{name}_{n}.png" for name in ("train", "other") for kind in ("x", "y") for n in range(5)], None),
    ],
    ids=[
        "class train", "class test", "capitals", "words", "deep", "files train", "extra", "by files", "only classes",
        "some files",
    ],
)  # fmt: skip
def test_images_of_a_folder_are_in_the_split_that_it_shows(tmp_path, names, test):
    names = [name.lstrip("/") for name in names]
    source = open_source(write_images(tmp_path / "set", names))
    train, held = images_of(source.train()), images_of(source.test())
    right = {number: name.split("/")[-2] for number, name in enumerate(names) if not name.startswith("extra")}
    assert {**train, **held} == right
    assert not set(train) & set(held)
    assert test is None or sorted(held) == list(test)
    assert len(held) >= len(right) // 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (tree(["train/test", "train", "test"], ["a", "b"]), "is in two splits, test and train"),
        (["train/1.png", "train/2.png", "test/1.png"], "lie in no class folder"),
        (["train/1.png", "train/2.png"], "lie in no class folder"),
        (["1.png", "2.png"], "no column of labels, it has image: one subfolder for each class makes one"),
        (tree(["train", "test"], ["a", "b"]) + ["test/new/1.png"], "'new' occurs in no training image"),
    ],
    ids=["two splits", "no classes", "one split", "no folders", "new class"],
)
def test_folders_that_show_no_splits_or_classes(tmp_path, names, message):
    with pytest.raises(InputError, match=message) as caught:
        open_source(write_images(tmp_path, names)).test()
    assert "\n" not in str(caught.value)


def test_a_file_in_two_splits_is_refused_under_whichever_name(tmp_path):
    root = write_images(tmp_path, tree(["train", "test"], ["cat", "dog"]))
    (root / "test" / "cat" / "7.png").symlink_to(root / "train" / "cat" / "1.png")
    with pytest.raises(InputError, match="is in two splits, test and train"):
        open_source(root)


def test_a_table_in_two_splits_is_refused(tmp_path):
    split(numbered(20), NAMES * 5).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '*.parquet'\n"
        "  - split: test\n    path: a.parquet\n---\n"
    )
    with pytest.raises(InputError, match=r"a\.parquet is in two splits, train and test"):
        open_source(tmp_path)


def test_links_and_brackets_in_names(tmp_path):
    far = write_images(tmp_path / "far", tree(["x"], ["cat", "dog"]))
    root = tmp_path / "my [old] set"
    (root / "train").mkdir(parents=True)
    for kind in ("cat", "dog"):
        (root / "train" / kind).symlink_to(far / "x" / kind)
    (root / "train" / "cat" / "back").symlink_to(root)  # links that never end
    assert len(open_source(root).train().images) == 8
    split(numbered(20), NAMES * 5).to_parquet(tmp_path / "my [old] set" / "train.parquet")
    with pytest.raises(InputError, match="rename the folder, brackets"):
        open_source(root)


@pytest.mark.parametrize("captions", ["files", "table"])
def test_captions_beside_images_do_not_hide_them(tmp_path, captions):
    names = tree(["train", "test"], ["cat", "dog"])
    write_images(tmp_path, names)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text("a pet", encoding="utf-8")
        (tmp_path / name).with_suffix(".json").write_text("{}", encoding="utf-8")
    if captions == "table":
        rows = "\n".join(f"{name},a pet {name}" for name in names)
        (tmp_path / "metadata.csv").write_text(f"file_name,caption\n{rows}\n", encoding="utf-8")
    source = open_source(tmp_path)
    assert images_of(source.train()) == {n: names[n].split("/")[-2] for n in range(10)}
    assert sorted(images_of(source.test())) == list(range(10, 20))


@pytest.mark.parametrize("style", ["csv", "jsonl", "parquet"])
def test_labels_of_metadata_files(tmp_path, style):
    import pandas

    for part in ("train", "test"):
        names = [f"{n}.png" for n in range(10)]
        write_images(tmp_path / part, names)
        frame = pandas.DataFrame({"file_name": names, "kind": ["cat", "dog"] * 5})
        if style == "csv":
            frame.to_csv(tmp_path / part / "metadata.csv", index=False)
        elif style == "jsonl":
            frame.to_json(tmp_path / part / "metadata.jsonl", orient="records", lines=True)
        else:
            frame.to_parquet(tmp_path / part / "metadata.parquet")
    source = open_source(tmp_path)
    assert source.label_column == "kind"
    assert classes(source.train()) == classes(source.test()) == ["cat", "dog"] * 5
    assert source.test_split == "test"


def test_names_that_mean_something_else(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "digits", tree(["train", "test"], ["cat", "dog"]))
    assert open_source("digits").label_names == list("0123456789")
    assert "./digits" in caplog.text
    assert open_source("./digits").label_names == ["cat", "dog"]
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"'table.csv' is a file: give the folder that it lies in"):
        open_source("table.csv")


def test_the_reason_in_an_errors_cause_is_shown(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\nnothing')
    with pytest.raises(InputError, match="JSON parse error") as caught:
        open_source(tmp_path)
    assert "An error occurred" not in str(caught.value)


def test_where_there_are_several_configurations_the_flag_is_named(tmp_path):
    for name in ("one", "two"):
        split(numbered(20), NAMES * 5).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.parquet\n"
        "- config_name: two\n  data_files: two.parquet\n---\n"
    )
    for given in (None, "three"):
        with pytest.raises(InputError, match="--dataset-config"):
            open_source(tmp_path, dataset_config=given)
    assert len(open_source(tmp_path, dataset_config="two").train().images) == 16


# a test split that cannot be used, a bad image, and where a data set is


@pytest.mark.parametrize("memory_limit", [0.0, 4.0])
def test_bad_test_images_are_found_before_they_are_needed(tmp_path, memory_limit):
    images = numbered(200)
    images[150] = {"bytes": b"nothing", "path": "cat.png"}
    path = save(tmp_path, split(numbered(20), NAMES * 5), test=split(images, NAMES * 50))
    with pytest.raises(InputError, match=r"row 150 of split 'test' \(cat.png\)"):
        open_source(path, memory_limit=memory_limit).test(check=True)


def test_bad_images_are_named_by_their_row_in_the_users_set(tmp_path):
    images = numbered(100)
    images[77] = {"bytes": b"nothing", "path": None}
    path = save(tmp_path, split(images, NAMES * 25))
    with pytest.raises(InputError, match="row 77 of split 'train' cannot be read"):
        for part in ("train", "test"):
            getattr(open_source(path), part)()


def test_bad_images_are_named_by_their_files(tmp_path):
    root = write_images(tmp_path, tree(["train"], ["cat", "dog"]))
    (root / "train" / "dog" / "3.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"dog/3\.png\) cannot be read: cannot identify"):
        for part in ("train", "test"):
            getattr(open_source(root), part)()


def test_identity_is_that_of_the_training_images(tmp_path):
    def identity(name, train, test):
        source = open_source(save(tmp_path / name, train, test=test))
        return source.identity(source.train())

    train, test = split(numbered(20), NAMES * 5), split(numbered(4), NAMES)
    first = identity("first", train, test)
    assert identity("repaired", train, split(numbered(8), NAMES * 2)) == first
    renamed = datasets.ClassLabel(names=["a", "b", "c", "z"])
    for name, other in {
        "renamed": split(numbered(20), [0, 1, 2, 3] * 5, renamed),
        "swapped": split(numbered(20), [1, 0, 2, 3] * 5),
        "more": split(numbered(24), NAMES * 6),
        "size": split(numbered(20, 12), NAMES * 5),
    }.items():
        assert identity(name, other, split(numbered(4), NAMES[:3] + ["a"])) != first


def test_on_hub_is_decided_when_loading(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    source = open_source(image_folder.name)
    data = source.train()
    monkeypatch.chdir(tmp_path)
    assert source.describe(data)["on_hub"] is False
    assert open_source(image_folder, dataset_id="someone/compass").describe(data)["on_hub"] is True


# files that change


def test_a_set_rebuilt_in_the_same_folder_is_read_again(tmp_path):
    images = numbered(20)
    first = open_source(save(tmp_path, split(images, NAMES * 5))).train()
    path = tmp_path / "set"
    state = (path / "train" / "state.json").read_text()
    fresh = split([255 - image for image in images], NAMES * 5)
    save(tmp_path / "other", fresh)
    for file in (tmp_path / "other" / "set" / "train").iterdir():
        (path / "train" / file.name).write_bytes(file.read_bytes())
    (path / "train" / "state.json").write_text(state)  # the same recipe
    second = open_source(path).train()
    assert torch.equal(second.images.pixels, 255 - first.images.pixels)
    assert second.fingerprint != first.fingerprint


def test_an_image_that_is_replaced_is_read_again(tmp_path):
    root = write_images(tmp_path, tree(["train", "test"], ["cat", "dog"]))
    first = open_source(root).train()
    Image.fromarray(noise(8, 8, 3)).save(root / "train" / "cat" / "0.png")
    second = open_source(root).train()
    assert second.fingerprint != first.fingerprint
    assert np.array_equal(second.images.pixels[0].numpy(), noise(8, 8, 3))


def test_test_images_that_cannot_be_used_stop_a_training_first_and_repaired_ones_end_it(
    image_dataset, tmp_path, capfd, monkeypatch
):
    from bmsn_zoo import training as train_module

    def store(test):
        datasets.DatasetDict(train=image_dataset["train"], test=test).save_to_disk(tmp_path / "data")

    good = image_dataset["test"]
    unknown = good.cast_column("label", datasets.ClassLabel(names=["north", "up", "south", "west"]))
    unlabelled = datasets.Dataset.from_dict({**good[:], "label": [-1] * len(good)}, features=good.features)
    arguments = ["--dataset", str(tmp_path / "data"), "--layout", "4-3-3", "--epochs", "2", "--batch-size", "16"]
    arguments += ["--output", str(tmp_path / "run")]

    def whole_epochs():
        return len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())

    faults = [
        (unknown, "'up' occurs in no training image"),
        (unlabelled, "unlabelled images"),
        (good.remove_columns("label"), "split 'test', has no column 'label'"),
        (good.select([]), "it is empty"),
    ]
    for test, message in faults:
        store(test)
        assert train_module.main(arguments) == 2
        error = capfd.readouterr().err
        assert message in error
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    store(good)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", lambda *_: 1 / 0)  # killed after the last epoch
        with pytest.raises(ZeroDivisionError):
            train_module.main(arguments)
    store(good.select(range(20)))
    assert train_module.main(["--resume", "--output", str(tmp_path / "run")]) == 0
    assert whole_epochs() == 2


def test_a_validation_split_is_watched_unless_it_is_the_test(image_dataset, tmp_path, capfd):
    def curve(splits, *flags, name):
        datasets.DatasetDict(splits).save_to_disk(tmp_path / name)
        output = tmp_path / f"{name}-run{'-'.join(flags)}"
        settings = ["--dataset", tmp_path / name, "--layout", "5-5", *COMMON, *flags, "--output", output]
        if run(train_module, *settings):
            return capfd.readouterr().err.splitlines()[-1]
        (row,) = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        return row["holdout_accuracy"], TrainResult.read(output / "metrics.json")

    test = image_dataset["test"]
    easy = {**image_dataset, "validation": test.select([0])}
    watched, result = curve(easy, name="both")
    assert watched in (0.0, 1.0) and result.train_images == 64 and result.test_images == 32
    ignored, alike = curve(easy, "--validation-split", "none", name="both")
    assert ignored is None and alike.test_loss == result.test_loss, "watching changes nothing"
    held, _ = curve(easy, "--holdout", "0.25", "--validation-split", "validation", name="both")
    assert (16 * held).is_integer(), "what is held out is watched"
    unlabelled = test.remove_columns("label")
    assert curve({**image_dataset, "validation": unlabelled}, name="unlabelled")[0] is None
    alone = {"train": image_dataset["train"], "validation": test}
    watched, result = curve(alone, name="alone")
    assert watched is None and result.test_images == 32
    for other, expected in (("test", "is the training or the test split"), ("other", "has no split 'other'")):
        assert expected in curve(easy, "--validation-split", other, name="both")
