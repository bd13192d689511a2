import json
import os
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import bmsn_zoo.records
from bmsn_zoo import InputError
from bmsn_zoo.config import SearchConfig
from bmsn_zoo.files import read_json, write_json, write_text
from bmsn_zoo.records import (
    RunFolder,
    find_latest_search,
    load_training_state,
    open_run,
    save_training_state,
)

SEGMENT = dict(
    processes=1,
    epoch=0,
    threads=2,
    precision="fp32",
    device="cpu",
    hardware="a CPU",
    versions={"torch": "2"},
    commit="c",
)


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


def test_new_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bmsn_zoo.records.time, "strftime", lambda _: "20300101-120000")
    first = open_run("search", None).path
    first.mkdir(parents=True)
    assert open_run("search", None).path != first
    assert first.name == "search-20300101-120000"


# the run folder


def test_segments_record_what_every_part_of_a_run_computed_on(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    assert folder.last_precision is None
    assert folder.begin(SearchConfig(epochs=3), SEGMENT) == []
    folder.touch()

    again = RunFolder(folder.path)
    assert again.last_precision == "no"
    (threads, precision) = again.begin(SearchConfig(epochs=3), {**SEGMENT, "threads": 1, "precision": "bf16"})
    assert "threads 1, before 2" in threads
    assert "precision bf16, before fp32" in precision
    assert RunFolder(folder.path).last_precision == "bf16"
    assert [segment["threads"] for segment in read_json(folder.path / "segments.json")] == [2, 1]
    assert again.seconds == pytest.approx(sum(segment["seconds"] for segment in again.segments), abs=0.1)


def test_resume_keeps_the_metrics_of_whole_epochs(tmp_path):
    folder = RunFolder(tmp_path)
    folder.keep_epochs(2)
    rows = [{"epoch": epoch, "loss": 1 / epoch, "usage": {"0": 0.5}} for epoch in (1, 2, 3)]
    for row in rows:
        folder.log(row)
    folder.keep_epochs(3)
    assert folder.metrics() == rows
    folder.keep_epochs(2)
    assert folder.metrics() == rows[:2]
    folder.log(rows[2])
    assert folder.metrics() == rows


@pytest.mark.parametrize("end", ['{"epoch": 3, "lo', '{"epoch": 3, "usage": {"0": 0.5}', "{", '{"epoch": 3}'])
def test_metrics_line_cut_short_by_a_kill_is_dropped(tmp_path, end):
    folder = RunFolder(tmp_path)
    for epoch in (1, 2):
        folder.log({"epoch": epoch})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(end)
    folder.keep_epochs(2)
    folder.log({"epoch": 3})
    assert [row["epoch"] for row in folder.metrics()] == [1, 2, 3]


def test_metrics_are_numbers(tmp_path):
    with pytest.raises(ValueError):
        RunFolder(tmp_path).log({"epoch": 1, "loss": float("nan")})


# checkpoints


def test_only_whole_checkpoints_count(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.resume_epoch("search.json", no_scaler()) == 0
    (folder.new_checkpoint(9) / "weights").write_text("nine")
    assert folder.checkpoints() == []
    folder.complete_checkpoint(9, no_scaler())
    (folder.new_checkpoint(10) / "weights").write_text("half of te")
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-9"]
    assert folder.resume_epoch("search.json", no_scaler()) == 9

    assert list(folder.new_checkpoint(10).iterdir()) == [], "what an interrupted run left there is gone"
    folder.complete_checkpoint(10, no_scaler())
    assert folder.resume_epoch("search.json", no_scaler()) == 10
    assert not (tmp_path / "checkpoint-9").exists(), "older ones are dropped"


def test_checkpoints_are_ordered_by_number(tmp_path):
    folder = RunFolder(tmp_path)
    for epoch in (2, 10):  # both whole, as when a run is killed before the older one is dropped
        write_json(folder.new_checkpoint(epoch) / "complete.json", {"epoch": epoch, "scaler": None})
    assert folder.resume_epoch("search.json", no_scaler()) == 10


def test_gradient_scaler_is_restored(tmp_path):
    folder = RunFolder(tmp_path)
    folder.new_checkpoint(1)
    folder.complete_checkpoint(1, SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=8.0)))
    scaler = torch.amp.GradScaler("cpu")
    assert folder.resume_epoch("search.json", SimpleNamespace(scaler=scaler)) == 1
    assert scaler.state_dict()["scale"] == 8.0


def test_finished_run_cannot_be_resumed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.new_checkpoint(1)
    folder.complete_checkpoint(1, no_scaler())
    write_json(tmp_path / "search.json", {})
    with pytest.raises(InputError, match="finished run"):
        folder.resume_epoch("search.json", no_scaler())
    folder.drop_checkpoints()
    assert os.listdir(tmp_path) == ["search.json"]


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
