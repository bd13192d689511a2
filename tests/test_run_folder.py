import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from small_runs import COMMON
from timm.optim import create_optimizer_v2

import bmsn_zoo.run_folder
import bmsn_zoo.searching
import bmsn_zoo.training
from bmsn_zoo import InputError
from bmsn_zoo.config import SearchConfig, TrainConfig
from bmsn_zoo.files import read_json, write_json, write_text
from bmsn_zoo.run_folder import (
    RunFolder,
    find_latest_search,
    last_precision,
    load_tensors,
    load_training_state,
    open_run,
    run_name,
    save_tensors,
    save_training_state,
)

SEGMENT = dict(
    processes=1,
    threads=2,
    precision="fp32",
    device="cpu",
    hardware="a CPU",
    versions={"torch": "2"},
    commit="c",
    command=["search.py"],
)
DATA = {"fingerprint": "f", "label_names": ["a", "b"], "image_size": 8, "images": 5}
CONFIG = SearchConfig(epochs=3)


@pytest.fixture
def run(tmp_path):
    """Opens the folder of a search, one epoch of which is a checkpoint of the weights `epoch`."""

    def open_and_run(*epochs, resume=False, data=DATA, config=CONFIG):
        with open_run("search", tmp_path / "run", resume) as folder:
            folder.begin(config, SEGMENT, data)
            for epoch in epochs:
                folder.log({"epoch": epoch})
                (folder.new_checkpoint(epoch) / "weights").write_text(f"weights of {epoch}")
                folder.complete_checkpoint(epoch, no_scaler())
        return folder

    return open_and_run


def no_scaler():
    return SimpleNamespace(scaler=None)


# files


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_json(file, {"old": 1})
    with pytest.raises(ValueError):
        write_json(file, {"accuracy": float("nan")})
    with pytest.raises(TypeError):
        write_json(file, {"path": file})
    assert read_json(file) == {"old": 1}

    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(file.read_text()), replace(a, b)))
    write_text(file, "new")
    assert seen == [json.dumps({"old": 1}, indent=1) + "\n"], "the old content was gone before the new was whole"
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["result.json"]


def test_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_json(file, {"old": 1})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"new": 2})
    assert read_json(file) == {"old": 1}


@pytest.mark.parametrize("content", [None, "", "{", b"\xff\x00"])
def test_damaged_json_is_the_users_to_know(tmp_path, content):
    file = tmp_path / "search.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"search\.json cannot be read"):
        read_json(file)


def test_latest_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no finished search under runs/.*--from-search"):
        find_latest_search()
    for age, name in enumerate(["newest", "middle", "oldest"]):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        write_json(folder / "search.json", {})
        os.utime(folder / "search.json", (1000 - age, 1000 - age))
    (tmp_path / "runs" / "unfinished").mkdir()
    assert find_latest_search().name == "newest"


# taking a folder


def test_new_runs_are_named_after_what_they_are_and_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config, name in (
        (SearchConfig(dataset="me/my photos/", mixture_size=4), "search-my-photos-m4-s0"),
        (SearchConfig(dataset="x", dataset_id="uoft-cs/cifar10", strategy="darts", seed=3), "search-cifar10-darts-s3"),
        (SearchConfig(dataset="."), f"search-{tmp_path.name}-s0"),
        (TrainConfig(dataset="photos", layout="4-3-3", seed=1), "train-photos-4-3-3-s1"),
        (TrainConfig(), "train-digits-default-s0"),
    ):
        assert run_name(config) == name
        with open_run("search", None, False, name) as first, open_run("search", None, False, name) as second:
            assert [folder.path for folder in (first, second)] == [Path("runs") / name, Path("runs") / f"{name}-2"]
        assert not (tmp_path / "runs").exists(), "neither has begun"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
def test_a_folder_is_taken_by_one_run(tmp_path, run):
    with open_run("search", tmp_path / "run", False):
        with pytest.raises(InputError, match="in use by another run"):
            run()
        assert (tmp_path / "run" / ".lock").exists()
    run(1)
    taken, told = os.pipe()
    if not (other := os.fork()):
        try:
            with open_run("search", tmp_path / "run", True):
                os.write(told, b"taken")
                time.sleep(600)
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(taken, 5)
        with pytest.raises(InputError, match="in use by another run"):
            run(resume=True)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert run(resume=True).epoch == 1, "the lock ends with its process"


def test_places_where_nothing_can_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300), Path("/proc/run"),
                  tmp_path / "new" / ("x" * 300)):  # fmt: skip
        with pytest.raises(InputError, match="output") as caught, open_run("search", place, False):
            pass
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_start_leaves_is_no_run(tmp_path, run):
    folder = tmp_path / "run"
    folder.mkdir()
    for leftover in (".lock", ".config.yaml.partial", "config.yaml", ".run.json.partial"):
        (folder / leftover).write_text("epochs: 3\nle")
    with pytest.raises(InputError, match="holds no search to resume"):
        run(resume=True)
    run(1)
    for leftover in ("notes.txt", "config.yaml"):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / leftover).write_text("somebody's own")
        with pytest.raises(InputError, match="already holds files"):
            run()
        assert os.listdir(folder) == [leftover]


# the run folder


def test_segments_record_what_every_part_of_a_run_computed_on(tmp_path, caplog):
    with open_run("search", tmp_path / "deep" / "run", False) as folder:
        folder.begin(CONFIG, SEGMENT, DATA)
        folder.touch()
    assert not caplog.records
    assert last_precision(folder.path) == "no"
    with open_run("search", folder.path, True) as again:
        changed = {**SEGMENT, "threads": 1, "precision": "bf16"}
        again.begin(CONFIG, changed, DATA)
    assert "threads 1, before 2" in caplog.text
    assert "precision bf16, before fp32" in caplog.text
    assert last_precision(folder.path) == "bf16"
    assert [segment["threads"] for segment in read_json(folder.path / "run.json")["segments"]] == [2, 1]
    seconds = sum(segment.seconds for segment in again.segments)
    assert again.summary()["duration_seconds"] == pytest.approx(seconds, abs=0.1)


def test_files_have_one_mode_and_equal_runs_equal_bytes(tmp_path, run):
    folder = run(1, 2)
    save_tensors(folder.path / "weights.safetensors", {"a": torch.zeros(3)})
    files = [file for file in folder.path.rglob("*") if file.is_file()]
    assert len({file.stat().st_mode for file in files}) == 1
    first = {file.name: file.read_bytes() for file in files if file.name not in ("run.json", "weights.safetensors")}
    shutil.rmtree(folder.path)
    assert {file.name: file.read_bytes() for file in run(1, 2).path.rglob("*") if file.name in first} == first


@pytest.mark.parametrize("end", ["", '{"epoch": 3, "lo', '{"epoch": 3}\n{"epoch": 4}\n', "\n\n", "\0"])
def test_metrics_of_epochs_that_run_again_are_dropped(run, end):
    folder = run(1, 2)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(end)
    run(3, resume=True)
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_metrics_are_numbers(tmp_path):
    with pytest.raises(ValueError):
        RunFolder(tmp_path).log({"epoch": 1, "loss": float("nan")})


CHANGES = [{"fingerprint": "g"}, {"label_names": ["b", "a"]}, {"image_size": 9}, {"images": 6}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_run_goes_on_with_the_same_data_alone(run, change):
    folder = run(1)
    before = {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=f"{next(iter(change))} .*now"):
        run(2, resume=True, data={**DATA, **change})
    with pytest.raises(InputError, match=r"epochs 3 \(now 4\)"):
        run(2, resume=True, config=SearchConfig(epochs=4))
    assert {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()} == before


# checkpoints


def test_only_whole_checkpoints_count(run):
    folder = run(9)
    (folder.new_checkpoint(10) / "weights").write_text("half of te")
    assert run(resume=True).epoch == 9
    assert list(folder.new_checkpoint(10).iterdir()) == [], "what an interrupted run left there is gone"
    folder = run(10, 11, resume=True)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-10", "checkpoint-11"], "by number, and two"
    assert run(resume=True).epoch == 11


def damage_weights(folder):
    (folder.path / "checkpoint-2" / "weights").write_text("weights oF 2")


def damage_record(folder):
    file = folder.path / "checkpoint-2" / "complete.json"
    file.write_text(file.read_text().replace("a", "b", 1))


def remove_weights(folder):
    (folder.path / "checkpoint-2" / "weights").unlink()


@pytest.mark.parametrize("damage", [damage_weights, damage_record, remove_weights])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, damage, caplog):
    folder = run(1, 2)
    damage(folder)
    assert run(resume=True).epoch == 1
    assert "checkpoint-2 is damaged: it is not used" in caplog.text
    (folder.path / "checkpoint-1" / "weights").unlink()
    with pytest.raises(InputError, match="no checkpoint that is not damaged"):
        run(resume=True)


@pytest.mark.parametrize("content", ["", '{"epoch": 1}\n', '{"epoch": 1}\n{"epoch": 9}\n', None])
def test_metrics_that_were_changed_are_noticed_and_put_back(run, content, caplog):
    file = run(1, 2).path / "metrics.jsonl"
    before = file.read_text()
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    assert run(resume=True).epoch == 2
    assert file.read_text() == before
    assert "metrics.jsonl was changed since epoch 2" in caplog.text


def test_gradient_scaler_is_restored(run):
    folder = run()
    folder.log({"epoch": 1})
    folder.new_checkpoint(1)
    folder.complete_checkpoint(1, SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=8.0)))
    scaler = torch.amp.GradScaler("cpu")
    run(resume=True).restore_scaler(SimpleNamespace(scaler=scaler))
    assert scaler.state_dict()["scale"] == 8.0


def test_a_finished_run_cannot_be_resumed_but_one_that_wrote_its_result_can(tmp_path, run):
    folder = run(1, 2, 3)
    write_json(folder.path / "search.json", {})
    folder = run(resume=True)
    assert folder.epoch == 3
    folder.finish()
    assert not folder.checkpoints()
    with pytest.raises(InputError, match="finished run"):
        run(resume=True)


# training state


def network(opt, layout="1-1-8", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model("bmsn_resnet20", layout=layout, num_classes=4, **kwargs).to(
        memory_format=torch.channels_last
    )
    return model, create_optimizer_v2(model, opt=opt, lr=1e-3, momentum=0.9, weight_decay=1e-4)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(model, optimizer):
    state = optimizer.state_dict()["state"]
    found = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
    return {**model.state_dict(), **{name: torch.as_tensor(value) for name, value in found.items()}}


@pytest.mark.parametrize(
    ("opt", "searchable"),
    [
        ("sgd", True),
        ("sgd", False),
        ("adamw", False),
        ("lamb", True),
        ("adabelief", True),
    ],  # some count in plain numbers
)
def test_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, opt, searchable):
    model, optimizer = network(opt, searchable=searchable)
    train(model, optimizer, range(3))
    file = tmp_path / "state.safetensors"
    save_training_state(file, model, optimizer)
    again, again_optimizer = network(opt, searchable=searchable)
    load_training_state(file, again, again_optimizer)

    before, after = tensors(model, optimizer), tensors(again, again_optimizer)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
        assert value.dtype == after[name].dtype, name
        formats = [v.ndim == 4 and v.is_contiguous(memory_format=torch.channels_last) for v in (value, after[name])]
        assert formats[0] == formats[1], f"{name} lost its memory format"

    train(model, optimizer, range(3, 6))
    train(again, again_optimizer, range(3, 6))
    for name, value in tensors(model, optimizer).items():
        assert torch.equal(value, tensors(again, again_optimizer)[name]), name


def test_state_of_weights_alone(tmp_path):
    model, optimizer = network("sgd", layout="5-3-2")
    train(model, optimizer, range(2))
    save_training_state(tmp_path / "weights", model)
    again, _ = network("sgd", layout="5-3-2")
    load_training_state(tmp_path / "weights", again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="belong to layout 5-3-2"):
        load_training_state(tmp_path / "weights", network("sgd", layout="4-3-3")[0])


def test_state_before_the_first_step(tmp_path):
    model, optimizer = network("sgd")
    save_training_state(tmp_path / "state", model, optimizer)
    again, again_optimizer = network("sgd")
    load_training_state(tmp_path / "state", again, again_optimizer)
    train(model, optimizer, range(2))
    train(again, again_optimizer, range(2))
    assert torch.equal(model.conv1.weight, again.conv1.weight)


def test_weights_that_are_not_finite_or_of_another_type_are_refused(tmp_path):
    model, optimizer = network("sgd")
    train(model, optimizer, range(1))
    file = tmp_path / "state.safetensors"
    for change, message in (
        (lambda weight: weight.fill_(float("nan")), "conv1.weight holds numbers that are not finite"),
        (lambda weight: weight.fill_(float("inf")), "conv1.weight holds numbers that are not finite"),
        (lambda weight: weight.zero_(), None),
    ):
        with torch.no_grad():
            change(model.conv1.weight)
        save_training_state(file, model, optimizer)
        if message is None:
            load_training_state(file, *network("sgd"))
            continue
        with pytest.raises(InputError, match=message):
            load_training_state(file, *network("sgd"))
    save_training_state(file, model.half())
    with pytest.raises(InputError, match=r"is torch.float16, not torch.float32"):
        load_training_state(file, network("sgd")[0])


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_cut_tensors_are_one_line(tmp_path, size):
    model, optimizer = network("sgd")
    file = tmp_path / "state.safetensors"
    save_training_state(file, model, optimizer)
    file.write_bytes(file.read_bytes()[:size])
    for read in (lambda: load_training_state(file, model, optimizer), lambda: load_tensors(file)):
        with pytest.raises(InputError, match=r"state.safetensors is damaged") as caught:
            read()
        assert "\n" not in str(caught.value)


# what a kill cuts off at the end


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """Does a run of a kind once; returns its settings and its folder."""
    home, done = tmp_path_factory.mktemp("whole"), set()
    settings = ["--dataset", str(image_folder), *COMMON, "--image-size", "8"]
    more = {"search": ["--mixture-size", "1", "--default-layout", "5-5"], "train": ["--layout", "5-3-2"]}

    def of_kind(kind):
        if kind not in done:
            done.add(kind)
            assert MODULES[kind].main([*settings, *more[kind], "--output", str(home / kind)]) == 0
        return [*settings, *more[kind]], home / kind

    return of_kind


MODULES = {"search": bmsn_zoo.searching, "train": bmsn_zoo.training}


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("search", "bmsn_zoo.searching.report.draw_search"),
        ("search", "bmsn_zoo.run_folder.RunFolder.drop_checkpoints"),
        ("train", "bmsn_zoo.training.save_model"),
        ("train", "bmsn_zoo.training.report.draw_training"),
    ],
)
def test_a_run_killed_as_it_wrote_its_results_is_completed(kind, where, whole, tmp_path, monkeypatch, capsys):
    module, (settings, whole) = MODULES[kind], whole(kind)

    def end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, end)
        with pytest.raises(KeyboardInterrupt):
            module.main([*settings, "--output", str(tmp_path / "cut")])
    again = module.main(["--output", str(tmp_path / "cut"), "--resume"])
    if "drop_checkpoints" in where:  # all that the run makes was there
        assert again == 2 and "finished run" in capsys.readouterr().err
    else:
        assert again == 0
    assert not list((tmp_path / "cut").glob("checkpoint-*"))
    names = {str(file.relative_to(whole)) for file in whole.rglob("*")}
    assert {str(file.relative_to(tmp_path / "cut")) for file in (tmp_path / "cut").rglob("*")} == names
    modes = {file.stat().st_mode for file in (tmp_path / "cut").rglob("*") if file.is_file()}
    assert len(modes) == 1, "safetensors writes files that nobody else may read"
    same = {name for name in names if name.endswith(("tensors", "config.yaml", "config.json", "curves.png"))}
    assert len(same) >= 3
    for name in same:
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_place_where_nothing_can_be_written_is_noticed_before_images_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bmsn_zoo.data.sources.load_splits", lambda config: pytest.fail("the data set was read"))
    for place in (tmp_path / ("x" * 300), tmp_path / "file" / "run", "/proc/run"):
        (tmp_path / "file").write_text("")
        for module, more in ((bmsn_zoo.searching, []), (bmsn_zoo.training, ["--layout", "5-3-2"])):
            assert module.main(["--output", str(place), "--mixed-precision", "no", *more]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "cannot be used" in error
