"""Labels for images: the classes that evaluation counts, whatever the images' kind, and one line for a mistake."""

import timm
import torch
from PIL import Image
from small_runs import run
from timm.models import save_for_hf

from bmsn_zoo import predict
from bmsn_zoo.config import TrainConfig
from bmsn_zoo.data import DataSource, normalise

ZOO = "bmsn_resnet20_cifar10"


def printed(capsys, *arguments):
    capsys.readouterr()
    assert run(predict, *arguments) == 0
    return [line.split("  ") for line in capsys.readouterr().out.splitlines()]


def test_images_get_the_labels_that_evaluation_counts(runs, image_folder, image_dataset, tmp_path, capsys):
    """By name in the zoo, as folder and as run; one file, and all images of a folder and those below it."""
    (tmp_path / "more").mkdir()
    files = [tmp_path / f"{index}.png" for index in range(3)] + [tmp_path / "more" / "3.PNG"]
    for file, row in zip(files, image_dataset["test"], strict=False):
        row["image"].save(file, "PNG")
    (tmp_path / "notes.txt").write_text("no image")
    test = DataSource(TrainConfig(dataset=str(image_folder)), 1).test()
    model = timm.create_model(f"local-dir:{runs.default / 'model'}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    with torch.no_grad():
        shares = model(normalise(test.images.pixels[:4], cfg["mean"], cfg["std"])).softmax(1)
    for name in (runs.default, runs.default / "model"):
        rows = printed(capsys, name, tmp_path, "--top", 2)
        assert [row[0] for row in rows] == [str(file) for file in files]
        for row, share in zip(rows, shares, strict=True):
            value, index = share.topk(2)
            assert row[1:] == [
                f"{test.label_names[i]} {100 * v:.1f} %" for v, i in zip(value.tolist(), index.tolist(), strict=True)
            ]
    (row,) = printed(capsys, ZOO, files[0])
    assert len(row) == 1 + 5


def test_a_network_of_timm_sees_what_timm_shows_it(tmp_path):
    """Its own cut (`crop_pct`) and classes without names."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    model.pretrained_cfg.update(input_size=(3, 64, 64), crop_pct=0.8, interpolation="bicubic")
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    image = Image.effect_noise((100, 120), 90).convert("RGB")
    image.save(tmp_path / "noise.png")
    config = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        expected = model(timm.data.create_transform(**config)(image)[None]).softmax(1)[0]
    ((_, labels),) = predict.predict(model, [tmp_path / "noise.png"])
    for label, share in labels:
        assert abs(expected[int(label.removeprefix("class "))].item() - share) < 1e-5


def test_a_prediction_keeps_nothing_for_gradients(runs, tmp_path):
    """Or large networks would fill the memory; the caller's own settings stay as they are between predictions."""
    model, file = predict.load_any(str(runs.default)), tmp_path / "noise.png"
    Image.effect_noise((20, 30), 90).save(file)
    seen = []
    model.register_forward_hook(lambda module, args, logits: seen.append(logits.requires_grad))
    for _ in predict.predict(model, [file]):
        assert torch.is_grad_enabled()
    assert seen == [False]


def test_images_that_cannot_be_read_are_told_after_the_others(tmp_path, capsys, caplog):
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(b"no image")
    Image.effect_noise((20, 30), 90).save(tmp_path / "b.png")
    for name in ("photo.HEIC", "raw.dng", "notes.txt"):
        (tmp_path / name).touch()
    assert run(predict, ZOO, tmp_path) == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path / 'b.png'}  ") and said.out.count("\n") == 1
    assert said.err.startswith(f"error: {tmp_path / 'a.png'} cannot be read as an image: ")
    assert said.err.endswith("; 2 of 3 cannot: remove or repair them\n")
    assert f"{tmp_path / 'photo.HEIC'} and 1 other photos are of a format that cannot be read: left out" in caplog.text


def test_mistakes_end_in_one_line(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    for arguments, said in (
        (["bmsn_nothing", tmp_path / "broken.png"], "bmsn_nothing is neither a folder here nor a model of the zoo"),
        ([runs.search, tmp_path / "broken.png"], "is a search, whose supernets are no trained model"),
        ([ZOO, tmp_path / "nothing.png"], "nothing.png does not exist"),
        ([ZOO, tmp_path / "empty"], "empty holds no images"),
        ([ZOO, tmp_path / "broken.png"], "broken.png cannot be read as an image: "),
        ([ZOO, tmp_path, "--top", 0], "top 0 is too small"),
    ):
        assert run(predict, *arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
