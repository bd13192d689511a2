"""Cards, written from a run's records: what they say, and what they must not say."""

import copy
import json
import shlex
import shutil

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from small_runs import DEFAULT, FOUND

from bmsn_zoo import InputError, Layout, card, hub
from bmsn_zoo.card import SOME_NAME, interval, portable, ranked_rows, search_card, write_card
from bmsn_zoo.config import TrainConfig, build_config, load_recipe, over_recipe, shipped_folder
from bmsn_zoo.data import normalise
from bmsn_zoo.data.pixels import to_pixels
from bmsn_zoo.model_folder import load_model, save_model
from bmsn_zoo.ranking import standard_error
from bmsn_zoo.report import PICTURE, search_table
from bmsn_zoo.results import SearchResult, TrainResult
from bmsn_zoo.usage import build_parser

ZOO = shipped_folder("hub_configs")
SHIPPED = sorted(file.parent.name for file in ZOO.glob("*/config.json"))
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def record(runs):
    return json.loads((runs.found / "metrics.json").read_text())


def table(text, title):
    """Rows of the first table under a title, without its head."""
    lines = text.split(f"## {title}\n", 1)[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_metadata(runs):
    data = ModelCard.load(runs.zoo / FOUND / "README.md").data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.license is None, "of own images, unless one is named"
    assert {"timm", "bmsn_zoo", "image-classification"} <= set(data.tags)
    assert data.metrics == ["accuracy"]
    assert data.model_name == FOUND
    assert data.datasets is None, "the images are a local folder"
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("compass", "test")


def test_results_compare_with_the_default(runs):
    text = (runs.zoo / FOUND / "README.md").read_text()
    found, default = (json.loads((runs.zoo / name / "metrics.json").read_text()) for name in (FOUND, DEFAULT))
    rows = table(text, "Results")
    assert [row[0] for row in rows] == ["4-3-3 (default)", found["layout"]]
    assert [row[3] for row in rows] == [f"{100 * m['test_accuracy']:.2f} %" for m in (default, found)]
    assert [row[2] for row in rows] == [f"{m['macs'] / 1e6:.1f} M" for m in (default, found)]
    points = 100 * (found["test_accuracy"] - default["test_accuracy"])
    assert f"{points:+.2f} points at {found['macs'] / default['macs']:.2f} times" in text
    assert "n = 1" in text
    assert len(table((runs.zoo / DEFAULT / "README.md").read_text(), "Results")) == 1


def test_the_layout_is_drawn(runs):
    text = (runs.zoo / FOUND / "README.md").read_text()
    layout = json.loads((runs.found / "metrics.json").read_text())["layout"]
    rows = table(text, "Layout")
    assert [row[2] for row in rows] == [f"{side}x{side}" for side in Layout.parse(layout).resolutions(16)]
    assert [row[3] for row in rows] == [f"{side}x{side}" for side in Layout.parse("4-3-3").resolutions(16)]
    assert [row[1] for row in rows] == ["16"] * 4 + ["32"] * 3 + ["64"] * 3


def test_origin_and_training_are_told(runs):
    text = (runs.zoo / FOUND / "README.md").read_text()
    metrics, search = (json.loads((runs.zoo / FOUND / name).read_text()) for name in ("metrics.json", "search.json"))
    assert "Ranked 1 of 36 by a balanced mixture of 2 supernets (1 epoch in all, seed 0, n = 1 search)" in text
    best = search["best"]["accuracy"]
    error = 100 * standard_error(best, 32)
    assert f"{100 * best:.2f} % (standard error {error:.2f} points) in the search on 32 training images" in text
    assert f"accelerate launch train.py --from-search bmsn-zoo/{FOUND}\n" in text
    low, high = (f"{100 * end:.2f} %" for end in interval(metrics["test_accuracy"], 32))
    assert f"leaves a 95 % interval of {low} to {high} (Wilson)" in text
    assert "`pip install timm path/to/bmsn_zoo`" in text and "`pip install onnxruntime pillow`" in text
    assert "1 epoch, seed 0, 64 training images." in text
    assert metrics["hardware"] in text
    assert f"torch {metrics['versions']['torch']}" in text
    assert metrics["commit"] in text
    assert "from_search: search.json" in text
    assert "arXiv:2306.11982" in text
    plain = (runs.zoo / DEFAULT / "README.md").read_text()
    assert "It is the layout of the original network" in plain
    assert "accelerate launch train.py --layout 4-3-3 --dataset compass\n" in plain


def test_a_card_shows_a_picture_if_its_folder_has_one(runs, tmp_path):
    for folder in (runs.found / "model", *(ZOO / name for name in SHIPPED), runs.zoo / FOUND, runs.zoo / DEFAULT):
        with Image.open(folder / PICTURE) as picture:
            wide = picture.width > 1.5 * picture.height
        assert wide == (folder / "search.json").exists(), "where its search saw it lies beside where it downsamples"
        assert 5_000 < (folder / PICTURE).stat().st_size < 100_000
        assert f"]({PICTURE})\n" in (folder / "README.md").read_text(encoding="utf-8")
        assert hub._contents(folder, "me/net")[2][PICTURE] == folder / PICTURE
    older = shutil.copytree(folder, tmp_path / "model")
    (older / PICTURE).unlink()
    with pytest.raises(InputError, match=r"README\.md shows layout\.png, which is missing"):
        hub._contents(older, "me/net")
    write_card(older)
    assert PICTURE not in (older / "README.md").read_text(encoding="utf-8")
    assert PICTURE not in hub._contents(older, "me/net")[2], "what was written before there were pictures is whole"


def test_a_search_is_published_under_the_licence_that_is_named(runs, tmp_path):
    def told(folder, *named):
        files = hub._contents(folder, "me/search", *named)[2]
        record = SearchResult.model_validate_json(files["search.json"])
        return record.license, ModelCard(files["README.md"].decode()).data.license

    assert told(runs.search) == (None, None)
    assert told(runs.search, "mit") == ("mit", "mit")
    own = shutil.copytree(runs.search, tmp_path / "search")
    SearchResult.read(own / "search.json").model_copy(update={"license": "cc0-1.0"}).write(own / "search.json")
    assert told(own) == ("cc0-1.0", "cc0-1.0")
    assert told(own, "mit") == ("mit", "mit")


def test_usage_without_a_zoo_name(runs):
    text = (runs.found / "model" / "README.md").read_text()
    assert 'timm.create_model("hf-hub:YOUR_NAME/THIS_REPOSITORY", pretrained=True)' in text
    assert text.count("```python") == 2
    assert (runs.default / "model" / "README.md").read_text().count("```python") == 1, "it has no model.onnx"
    zoo = (runs.zoo / FOUND / "README.md").read_text()
    assert f'timm.create_model("{FOUND}", pretrained=True)' in zoo
    assert zoo.index("```python") < zoo.index("## Results")


@pytest.mark.parametrize(
    ("dataset", "dataset_id", "shown", "listed", "said"),
    [
        ("uoft-cs/cifar100", None, "uoft-cs/cifar100", True, "published without a licence"),
        ("../shared/cifar10", "uoft-cs/cifar10", "uoft-cs/cifar10", True, "published without a licence"),
        ("ethz/food101", None, "ethz/food101", True, "https://huggingface.co/datasets/ethz/food101"),
        ("/home/me/photos", None, "photos", False, "may have a licence of their own"),
        ("./photos", None, "photos", False, "may have a licence of their own"),
        ("digits", None, "digits", False, "may have a licence of their own"),
    ],
)
def test_data_sets_are_named_by_the_hub(dataset, dataset_id, shown, listed, said, record, runs, tmp_path):
    record["settings"].update(dataset=dataset, dataset_id=dataset_id)
    record["dataset"].update(id=dataset_id or dataset, on_hub=listed)
    record["segments"][0]["command"] = ["train.py", "--dataset", dataset, "--lr", "0.2", "--dataset-id=x"]
    record["settings"]["from_search"] = None
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text((runs.zoo / FOUND / "config.json").read_text())
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ([shown] if listed else None)
    assert card.data.eval_results[0].dataset_type == shown
    assert said in card.text
    assert f"accelerate launch train.py --lr 0.2 --dataset {shown}\n" in card.text
    assert dataset in shown or dataset not in card.content


def test_the_command_of_a_card_gives_its_settings_whatever_became_of_the_recipe():
    """The zoo's, too, however old: flags say what its recipe says otherwise today."""
    for home in sorted(shipped_folder("hub_configs").glob("*/metrics.json")):
        result = TrainResult.read(home)
        told = result.model_copy(update={"settings": {**result.settings, "lr": 0.123, "flip": False}})
        for each in (result, told):
            program, *words = shlex.split(card._command(each, "me/net"))[2:]
            assert program == "train.py"
            given = vars(build_parser(TrainConfig, "").parse_args(words))
            settings = build_config(TrainConfig, over_recipe(load_recipe(result.recipe, TrainConfig), given)).settings()
            for key in ("lr", "epochs", "batch_size", "weight_decay", "opt", "warmup_epochs"):
                assert settings[key] == each.settings[key]


def test_portable_records_name_no_folder_and_stay_as_they_are(record, runs):
    before = copy.deepcopy(record)

    def treated(**changed):
        return portable(TrainResult(**{**record, **changed})).content()

    record["segments"][0]["command"] = [
        "/home/me/bmsn_zoo/training.py",
        *("--output", "/home/me/runs/x", "--resume", "--lr=0.1", "--from-search=/home/me/s", "--no-flip"),
        *("--recipe", "/home/me/mine.yaml", "--recipe=digits-resnet20"),
        *("--push-to-hub", "me/net", "--private", "--revision", "trial", "--create-pr", "--dataset", "/home/me/photos"),
    ]
    once = treated()
    assert portable(TrainResult(**once)).content() == once
    assert once["segments"][0]["command"] == [
        *("bmsn_zoo/training.py", "--lr=0.1", "--no-flip", "--recipe", "mine.yaml", "--recipe", "digits-resnet20")
    ]
    assert once["settings"]["from_search"] == "search.json"
    assert once["settings"]["dataset"] == once["dataset"]["id"] == "compass"
    assert {key: once[key] for key in once if key not in ("segments", "settings", "dataset")} == {
        key: before[key] for key in before if key not in ("segments", "settings", "dataset")
    }
    assert treated(recipe="/home/me/mine.yaml")["recipe"] == "mine.yaml"
    record["settings"]["from_search"] = f"me/found@{SHA}"
    assert treated()["settings"]["from_search"] == f"me/found@{SHA}"
    search = SearchResult.read(runs.search / "search.json")
    for given, kept in (("/home/me/runs/old", "old"), (f"me/found@{SHA}", f"me/found@{SHA}")):
        started = search.model_copy(update={"settings": {**search.settings, "init_from": given}})
        assert portable(started).settings["init_from"] == kept
    for command in ([], ["-c"], ["/usr/lib/ipykernel_launcher.py", "-f", "/home/me/k.json"]):
        record["segments"][0]["command"] = command
        assert "/home" not in json.dumps(treated()["segments"][0]["command"])


def test_search_card(runs):
    result = portable(SearchResult.read(runs.search / "search.json"))
    text = search_card(result, "me/search")
    card = ModelCard(text)
    assert card.data.library_name == "bmsn_zoo"
    assert "neural-architecture-search" in card.data.tags
    rows = table(text, "Ranking")
    expected = [entry.layout for entry in result.ranking]
    assert [row[1].split(" ")[0] for row in rows[:10]] == expected[:10]
    assert (
        sum("(default" in row[1] for row in rows)
        == sum("best within the default's MACs" in row[1] for row in rows)
        == 1
    )
    assert "accelerate launch -m bmsn_zoo.training --from-search me/search " in text
    assert "accelerate launch -m bmsn_zoo.searching --lr 0.05 --dataset compass\n" in text
    assert str(runs.base) not in text
    for picture in ("accuracy_macs", "assignment", "curves"):
        assert f"pictures/{picture}.png" in text
        assert (runs.search / "pictures" / f"{picture}.png").exists()


def test_timms_transform_prepares_upright_opaque_images_to_the_pixel_as_training_does():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(1, 90, 2)
        size, chans = int(rng.integers(4, 40)), int(rng.choice([1, 3]))
        if max(width, height) > 16 * min(width, height):
            continue
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(
            {1: "L", 3: "RGB"}[chans]
        )
        transform = timm.data.create_transform(
            (chans, size, size), interpolation="bicubic", crop_pct=1.0, normalize=False
        )
        expected = transform(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(to_pixels(image, size, chans), expected, f"{width}x{height} to {size}")
    assert to_pixels(Image.new("RGB", (3, 60_000)), 200, 3).shape == (200, 200, 3), "a strip takes no memory"


# the snippets of all cards, as text, on images that only the one rule treats well


def jpeg_turned(image, path):
    """Lies on its side; EXIF data says so."""
    exif = Image.Exif()
    exif[274] = 6
    image.convert("RGB").save(path, "JPEG", exif=exif)


def png_transparent(image, path):
    """Half of it is half transparent, above black."""
    image.convert("RGBA").save(path, "PNG")


def palette_transparent(image, path):
    image.convert("RGB").quantize(16).save(path, "PNG", transparency=3)


def cmyk_wide(image, path):
    image.convert("RGB").convert("CMYK").save(path, "JPEG")


def gray_tall(image, path):
    image.convert("RGB").convert("L").transpose(Image.Transpose.ROTATE_90).save(path, "PNG")


@pytest.fixture(scope="module")
def gray_folder(runs, tmp_path_factory):
    """A model of gray images of another size, as a training leaves it."""
    result = TrainResult.read(runs.default / "metrics.json")
    data = result.dataset.model_copy(update={"in_chans": 1, "image_size": 12, "mean": [0.4], "std": [0.2]})
    cfg = {"input_size": (1, 12, 12), "pool_size": (3, 3), "mean": (0.4,), "std": (0.2,), "num_classes": 4}
    model = timm.create_model("bmsn_resnet20", in_chans=1, num_classes=4, pretrained_cfg_overlay=cfg).eval()
    folder = tmp_path_factory.mktemp("gray") / "model"
    count = sum(p.numel() for p in model.parameters())
    save_model(
        folder, model, data.label_names, result.model_copy(update={"dataset": data, "parameters": count}), None, True
    )
    return folder


@pytest.mark.parametrize(
    "name",
    [
        SHIPPED[0],
        "own",
        "gray",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*SHIPPED[1:], FOUND, DEFAULT)),
    ],
)
def test_every_snippet_gives_the_logits_of_evaluate(name, request, runs, tmp_path, monkeypatch):
    if name == "gray":
        folder = request.getfixturevalue("gray_folder")
    else:
        folder = runs.found / "model" if name == "own" else (ZOO if name in SHIPPED else runs.zoo) / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    snippets = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    assert len(snippets) == 2
    shutil.copy(folder / "model.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load_model(folder)
    cfg = model.pretrained_cfg
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (45, 70, 4)).astype(np.uint8)
    pixels[..., 3] = np.where(np.arange(70) < 35, 128, 255)
    for save in (jpeg_turned, png_transparent, palette_transparent, cmyk_wide, gray_tall):
        save(Image.fromarray(pixels), "image.png")
        with Image.open("image.png") as image:
            prepared = to_pixels(image, cfg["input_size"][-1], cfg["input_size"][0])
        inputs = normalise(torch.from_numpy(prepared.copy())[None], cfg["mean"], cfg["std"])
        expected = model(inputs).detach().numpy()
        for snippet in snippets:
            names = {}
            exec(snippet.replace(f"hf-hub:{SOME_NAME}", f"local-dir:{folder}"), names)
            found = np.asarray(names["logits"].detach() if torch.is_tensor(names["logits"]) else names["logits"])
            np.testing.assert_allclose(
                found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=save.__name__
            )


def test_onnx_of_gray_images(gray_folder):
    session = onnxruntime.InferenceSession(gray_folder / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 12, 12, 1]
    assert "gray" in session.get_modelmeta().custom_metadata_map["images"]


def test_the_snippet_of_a_search_runs(runs):
    text = search_card(portable(SearchResult.read(runs.search / "search.json")), str(runs.search))
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert len(names["result"].ranking) == 36


# what a card must not say


def told(runs, tmp_path, layout, pick):
    """The card of a training whose layout was picked so from the search."""
    folder = shutil.copytree(runs.zoo / FOUND, tmp_path / "model")
    result = TrainResult.read(folder / "metrics.json")
    settings = {**result.settings, "pick": pick, "layout": layout}
    result.model_copy(update={"layout": layout, "settings": settings}).write(folder / "metrics.json")
    write_card(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_layout_taken_by_hand_was_not_found(runs, tmp_path):
    search = SearchResult.read(runs.search / "search.json")
    last = search.ranking[-1].layout
    for layout, pick, expected in (
        ("4-3-3", "4-3-3", "It is the layout of the original network, to compare others with. A search ranked it "),
        ("4-3-3", "default", "It is the layout of the original network, to compare others with. A search ranked it "),
        (last, last, "It was chosen by hand, not by a search. A search ranked it 36 of 36 by a balanced mixture"),
        (search.best.layout, "best", "\n\nRanked 1 of 36 by"),
    ):
        text = told(runs, tmp_path / layout / pick, layout, pick)
        assert expected in text
        assert ("\n\nRanked" in text) == expected.startswith("\n")
    within = search.best_within_default_macs.layout
    text = told(runs, tmp_path / "within", within, "best_within_default_macs")
    assert (", the first that costs no more than the default" in text) == (within != search.best.layout)


def test_a_search_without_a_winner_names_none(runs, tmp_path):
    search = SearchResult.read(runs.search / "search.json").model_copy(update={"undecided": "all are alike"})
    text = search_card(portable(search), "me/search")
    assert "No winner: all are alike.\n" in text
    assert "# trains 4-3-3\n" in text
    assert "First choice" not in text
    other = search.model_copy(update={"assignment_matrix": None, "settings": {**search.settings, "strategy": "mcts"}})
    assert "ranked by the strategy mcts with 2 supernets. No" in (text := search_card(portable(other), "me/search"))
    assert "accuracy_macs.png" in text and "assignment.png" not in text
    alone = portable(search.model_copy(update={"default": None, "best_within_default_macs": None}))
    assert "(default" not in search_card(alone, "me/search")
    folder = shutil.copytree(runs.zoo / FOUND, tmp_path / "model")
    search.write(folder / "search.json")
    write_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "The search named no winner: all are alike." in text
    assert "\n\nRanked" not in text


def test_the_spread_that_a_card_names_is_that_of_its_test_set():
    assert standard_error(0.9, 10_000) == pytest.approx(0.003, rel=1e-3)
    assert standard_error(0.9, 100) == pytest.approx(0.03, rel=0.06)
    assert 0 < standard_error(1.0, 16) < 0.07
    assert 0 < standard_error(0.0, 16) < 0.07


def test_a_card_says_nothing_of_the_hub_before_a_push(runs):
    for folder in (runs.zoo / FOUND, runs.found / "model", *(ZOO / name for name in SHIPPED)):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "is the same, from the Hub" not in text
        assert "tenths of a point" not in text


def test_every_layout_is_listed_once_and_labelled(runs):
    search = SearchResult.read(runs.search / "search.json")
    order = [entry.layout for entry in search.ranking]
    for default, within in ((0, 0), (0, 3), (2, 1), (30, 20), (8, 8)):
        changed = search.model_copy(
            update={"default": search.ranking[default], "best_within_default_macs": search.ranking[within]}
        )
        rows = list(ranked_rows(changed, 5))
        assert [entry.layout for _, entry, _ in rows] == [order[i] for i in sorted({*range(5), default, within})]
        assert [place for place, _, note in rows if "default" in note.split(", ")] == [default + 1]
        assert [place for place, _, note in rows if "best within the default's MACs" in note] == [within + 1]
        assert search_table(changed).split("Pareto")[0].count("\n") == 1 + len(rows)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_card_is_what_its_records_give(name, tmp_path):
    """No number in it was typed: writing it again from metrics.json and search.json gives the same bytes."""
    folder = shutil.copytree(ZOO / name, tmp_path / name)
    default = ZOO / f"{name}_default"
    compared = TrainResult.read(default / "metrics.json") if default.is_dir() else None
    write_card(folder, f"bmsn-zoo/{name}", compared, name)
    assert (folder / "README.md").read_bytes() == (ZOO / name / "README.md").read_bytes()


def test_a_search_of_one_supernet_is_not_called_a_mixture():
    records = shipped_folder("results") / "searches"
    text = search_card(SearchResult.read(records / "recommended-s0.json"), "me/search")
    assert "ranked by one supernet. Confirmed by" in text and "mixture" not in text.split("## ")[0]
