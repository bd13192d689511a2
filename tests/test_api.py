"""Searches and trainings from Python: what they take, what they give, and that it is what the commands do."""

import logging
import sys
from pathlib import Path

import datasets
import pytest
from pictures import drawn

import bmsn_zoo
from bmsn_zoo import InputError, report

QUICK = {"epochs": 1, "batch_size": 16, "mixed_precision": "no"}


def bytes_of(figure, home):
    report._save(figure, home / "drawn.png")
    return (home / "drawn.png").read_bytes()


@pytest.fixture(scope="module")
@drawn()
def found(image_dataset, tmp_path_factory):
    """A search of a data set in memory."""
    home = tmp_path_factory.mktemp("api")
    return bmsn_zoo.search(
        image_dataset, home / "search", mixture_size=2, default_layout=bmsn_zoo.Layout((5, 5)), **QUICK
    )


def test_a_search_is_what_the_command_finds(found, image_folder, tmp_path):
    again = bmsn_zoo.search(
        dataset=image_folder, output=tmp_path / "run", mixture_size=2, default_layout="5-5", **QUICK
    )
    assert again.record.accuracy_matrix == found.record.accuracy_matrix
    assert again.ranking.equals(found.ranking)
    assert bmsn_zoo.SearchResult.load(tmp_path / "run").record == again.record


def test_who_types_is_told_how_far_it_is_and_a_script_as_it_asked(monkeypatch, capsys):
    log, root = logging.getLogger("bmsn_zoo"), logging.getLogger()
    before = log.level
    monkeypatch.setattr(root, "handlers", [])
    log.setLevel(logging.NOTSET)
    for prompt in (False, True):
        if prompt:
            monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        with bmsn_zoo.api._told():
            log.info("epoch 1")
        log.info("epoch 2")
        assert capsys.readouterr().err == "epoch 1\n" * prompt
    assert log.level == logging.NOTSET and root.handlers == []
    log.setLevel(before)


def test_a_ranking_is_a_frame_of_every_layout(found):
    frame, record = found.ranking, found.record
    assert list(frame.index) == [1 + place for place in range(9)] and frame.index.name == "rank"
    assert frame.loc[frame["layout"] == found.best.layout, "macs"].item() == found.best.macs
    assert list(frame["accuracy"]) == sorted(frame["accuracy"], reverse=True)
    assert set(frame["layout"][frame["pareto_front"]]) == {entry.layout for entry in record.pareto_front}
    assert found.confirmed is None
    assert found.best == record.default, "32 images show nothing"


@drawn()
def test_plots_are_the_pictures_of_the_folder(found, tmp_path):
    for name in ("accuracy_macs", "assignment", "curves"):
        picture = Path(found) / "pictures" / f"{name}.png"
        assert bytes_of(getattr(found, f"plot_{name}")(), tmp_path) == picture.read_bytes()


@drawn()
def test_a_result_is_trained_and_predicts(found, image_dataset, tmp_path):
    trained = bmsn_zoo.train(from_search=found, output=tmp_path / "run", **QUICK)
    assert trained.record.layout == found.best.layout and 0 <= trained.accuracy <= 1
    assert bytes_of(trained.plot_curves(), tmp_path) == (tmp_path / "run" / "pictures" / "curves.png").read_bytes()
    image_dataset["test"][1]["image"].save(tmp_path / "photo.png")
    ((file, labels),) = trained.predict(tmp_path / "photo.png", top=4).items()
    assert file.name == "photo.png" and sum(share for _, share in labels) == pytest.approx(1)
    assert {label for label, _ in labels} == set(image_dataset["train"].features["label"].names)
    with pytest.raises(InputError, match="nothing is left to resume"):
        bmsn_zoo.train(output=trained, resume=True)
    trial = bmsn_zoo.train(image_dataset, tmp_path / "trial", layout="5-5", measure="holdout", holdout=0.5, **QUICK)
    assert trial.accuracy == trial.record.holdout_accuracy


def test_an_object_is_saved_once_and_again_if_it_changes(image_dataset, found, tmp_path):
    home = Path(datasets.config.HF_DATASETS_CACHE) / "bmsn_zoo_objects"
    before = set(home.iterdir())
    settings = {"layout": "4-3-3", "measure": "holdout", "holdout": 0.5, **QUICK}
    bmsn_zoo.train(image_dataset, tmp_path / "same", **settings)
    assert set(home.iterdir()) == before
    alone = bmsn_zoo.train(image_dataset["train"].select(range(48)), tmp_path / "part", **settings)
    assert len(set(home.iterdir()) - before) == 1 and alone.record.train_images + alone.record.holdout_images == 38


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bmsn_zoo.search(epohs=3), "unknown setting 'epohs': did you mean epochs?"),
        (lambda: bmsn_zoo.train(layuot=3), "unknown setting 'layuot': did you mean layout?"),
        (lambda: bmsn_zoo.train(mixture_size=3), "unknown setting 'mixture_size': it belongs under search"),
        (lambda: bmsn_zoo.search(epochs=0), "epochs 0 is too small: it must be at least 1"),
        (lambda: bmsn_zoo.search(dataset=[1, 2]), r"dataset \[1, 2\] is of the type list: give a Hub id, a folder"),
        (lambda: bmsn_zoo.SearchResult.load("nowhere"), "nowhere is neither a folder here nor a model of the zoo"),
        (lambda: bmsn_zoo.TrainResult.load("nowhere"), "nowhere is neither a folder here nor a model of the zoo"),
        (lambda: bmsn_zoo.SearchResult.load("bmsn_resnet20_cifar10").plot_curves(), "without its search's curves"),
    ],
)
def test_mistakes_are_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as caught:
        call()
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_zoo_says_what_its_searches_found(image_dataset):
    found = bmsn_zoo.SearchResult.load("bmsn_resnet20_cifar10")
    trained = bmsn_zoo.TrainResult.load("bmsn_resnet20_cifar10")
    assert len(found.ranking) == 36 and found.best.layout == trained.record.layout
    assert trained.accuracy == trained.record.test_accuracy > 0.88
    with pytest.raises(InputError, match="assigned no layouts"):
        without = found.record.model_copy(update={"assignment_matrix": None})
        bmsn_zoo.SearchResult(found.source, without).plot_assignment()
