"""Push and pull between this package, timm and a Hub: the unmodified client against a server of our own."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, get_session
from safetensors.torch import load_file, save_file
from small_runs import COMMON, DEFAULT, FOUND, run

from bmsn_zoo import InputError, SearchSpace, hub, one_shot
from bmsn_zoo import searching as search_module
from bmsn_zoo import training as train_module
from bmsn_zoo.card import SOME_NAME
from bmsn_zoo.supernet import Mixture

ROOT = Path(__file__).parents[1]
NET, SEARCH = "alice/net", "alice/search"


def process(code, environment, *arguments):
    """Run Python code in a fresh process; returns what it printed as JSON."""
    environment = environment | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def content(folder):
    return {file: file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}


# in fresh processes

PUSH = """
import io, json, sys, contextlib
from bmsn_zoo import hub

def command(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = hub.main(words)
    return [code, out.getvalue().split()]

found, search, trained = sys.argv[1:]
print(json.dumps([
    command("push", found, "alice/net", "--private"),
    command("push", found, "alice/net", "--private"),
    command("push", found, "alice/net", "--revision", "trial/one"),
    command("push", trained, "alice/net", "--create-pr"),
    command("push", search, "alice/search"),
    command("push", search, "alice/search"),
    command("push", trained, "alice/open"),
]))
"""

PULL = """
import contextlib, io, json, os, shutil, sys
import torch, timm, bmsn_zoo
from bmsn_zoo import hub
from huggingface_hub import hf_hub_download
from bmsn_zoo.models.found import register_folder
from pathlib import Path
from safetensors.torch import load_file, save_file

zoo, names, sha, inputs, output = json.loads(sys.argv[1])
token = os.environ.pop("HF_TOKEN", None)
x, said = load_file(inputs)["x"], {}
create = lambda name, **kwargs: timm.create_model(name, pretrained=True, **kwargs).eval()
if token:
    try:
        create("hf-hub:alice/net")
    except Exception as error:
        said["without token"] = type(error).__name__
    os.environ["HF_TOKEN"] = token
out = {
    "name": create("hf-hub:alice/net")(x),
    "branch": create("hf-hub:alice/net@trial/one")(x),
    "commit": create("hf-hub:alice/net@" + sha)(x),
    "headless": create("hf-hub:alice/net", num_classes=0)(x),
    "gray": create("hf-hub:alice/net", num_classes=0, in_chans=1)(x.mean(1, keepdim=True)),
    "features": create("hf-hub:alice/net", features_only=True)(x)[-1],
    "classes": create("hf-hub:alice/net", num_classes=9)(x),
}
for name in names:
    register_folder(Path(zoo) / name)
os.environ["BMSN_ZOO_HUB_ORG"] = "zoo"
found = create(names[0])
out["organisation"] = found(x)
said["organisation"] = found.pretrained_cfg["hf_hub_id"]
del os.environ["BMSN_ZOO_HUB_ORG"]
out["argument"] = create(names[0], hub_org="zoo")(x)
said["search"] = hub.load_search("alice/search").best.layout
said["search in a model"] = hub.load_search("alice/net@trial/one").best.layout
said["pin"] = hub.pin("hf-hub:alice/search")
save_file({key: value.detach().contiguous() for key, value in out.items()}, output)

# the card's own snippets
shutil.copy(hf_hub_download("zoo/" + names[0], "model.onnx"), "model.onnx")
snippets = []
for block in Path(hf_hub_download("alice/net", "README.md")).read_text().split("```python\\n")[1:]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block.split("```")[0], {})
    snippets.append(printed.getvalue().strip())
said["snippets"] = snippets
print(json.dumps(said))
"""


@pytest.mark.slow
def test_push_and_pull_in_fresh_processes(runs, tmp_path):
    with HubServer(orgs={"zoo": ["alice"]}) as server:
        before = content(runs.base)
        arguments = runs.found, runs.search, runs.default
        pushed = process(PUSH, server.environment(tmp_path / "home", "hf_alice"), *arguments)
        net, open_, search = (f"{server.endpoint}/{name}" for name in (NET, "alice/open", SEARCH))
        assert pushed == [
            [0, [net]],
            [0, [net]],
            [0, [f"{net}/tree/trial/one"]],
            [0, [f"{net}/discussions/1"]],
            [0, [search]],
            [0, [search]],
            [0, [open_]],
        ]
        assert content(runs.base) == before
        # one commit each, beside the Hub's own first
        assert [len(server.commits(name)) for name in (NET, SEARCH, "alice/open")] == [2, 2, 2]
        assert len(server.commits(NET, "trial/one")) == 2, "the branch started with what was to be pushed"
        files = server.files(NET)
        model = runs.found / "model"
        assert set(files) == {".gitattributes", *(file.name for file in model.iterdir())}
        for name in set(files) - {".gitattributes", "README.md"}:
            assert files[name] == (model / name).read_bytes()
        card = (model / "README.md").read_bytes()
        assert files["README.md"] == card.replace(SOME_NAME.encode(), NET.encode())
        proposed = server.files(NET, "refs/pr/1")
        assert "model.onnx" not in proposed, "a file of the model before would be wrong beside the new weights"
        assert "search.json" not in proposed
        stored = server.files(SEARCH)
        assert set(stored) == {".gitattributes", *hub.SEARCH_FILES}
        assert stored["supernets.safetensors"] == (runs.search / "supernets.safetensors").read_bytes()
        assert all(str(runs.base).encode() not in data for data in stored.values())

        for name in (FOUND, DEFAULT):
            server.put(f"zoo/{name}", {file.name: file.read_bytes() for file in (runs.zoo / name).iterdir()})
        sha = server.commits(NET)[0].sha
        x = torch.randn(3, 3, 16, 16)
        save_file({"x": x}, tmp_path / "x.safetensors")
        home, inputs, output = tmp_path / "other", tmp_path / "x.safetensors", tmp_path / "y.safetensors"
        arguments = json.dumps([str(runs.zoo), [FOUND, DEFAULT], sha, str(inputs), str(output)])
        (tmp_path / "work").mkdir()
        from PIL import Image

        Image.new("RGB", (20, 18), (200, 30, 30)).save(tmp_path / "work" / "image.png")
        with contextlib.chdir(tmp_path / "work"):
            said = process(PULL, server.environment(home, "hf_alice"), arguments)
            online = load_file(output)
            output.unlink()
            requests = len(server.requests)
            offline = server.environment(home) | {"HF_HUB_OFFLINE": "1"}
            again = process(PULL, offline, arguments)
            assert len(server.requests) == requests

    local = timm.create_model(f"local-dir:{runs.found / 'model'}", pretrained=True).eval()
    expected = local(x)
    for key in ("name", "branch", "commit", "organisation", "argument"):
        assert torch.equal(online[key], expected), key
    assert torch.equal(online["headless"], local.forward_head(local.forward_features(x), pre_logits=True))
    assert torch.equal(online["features"], local.forward_features(x))
    assert online["classes"].shape == (3, 9)
    assert online["gray"].shape == (3, 64)
    after = load_file(output)
    assert all(torch.equal(after[key], online[key]) for key in online if key != "classes")
    best = json.loads((runs.search / "search.json").read_text())["best"]["layout"]
    assert said.pop("without token") == "RepositoryNotFoundError"
    assert said == again
    assert said["organisation"] == f"zoo/{FOUND}"
    assert said["search"] == said["search in a model"] == best
    assert said["pin"].startswith("alice/search@")
    assert len(said["pin"]) == len("alice/search@") + 40
    assert said["snippets"][0] == said["snippets"][1] in ("north", "east", "south", "west")


@pytest.mark.slow
def test_killed_before_the_commit(runs, tmp_path):
    with HubServer(lfs=True) as server:
        server.put(NET, {"config.json": b"{}"})
        server.fail("POST", "/commit/", hang=60)
        environment = server.environment(tmp_path / "home", "hf_alice") | {"HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "bmsn_zoo.hub", "push", str(runs.found), NET]
        with subprocess.Popen(command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path) as client:
            while not any("/commit/" in path for _, path in server.requests):
                assert client.poll() is None
                time.sleep(0.02)
            client.kill()
        assert server.files(NET).keys() == {".gitattributes", "config.json"}


# in this process


def searched(runs):
    """Files of a search as the Hub has them."""
    return {name: (runs.search / name).read_bytes() for name in ("search.json", "supernets.safetensors")}


def read(runs, tmp_path):
    """A command of ours that reads the Hub."""
    return run(train_module, "--from-search", SEARCH, *COMMON, "--output", tmp_path / "trained")


def write(runs, tmp_path):
    """A command of ours that writes to the Hub."""
    return run(hub, "push", runs.found / "model", NET)


API, FILE = "^/api/models/", "/resolve/"
READING = {
    "401": (dict(status=401), "no model repository that you may read: check the name, and if it is private, log in"),
    "403": (dict(status=403), "you may not do this (403)"),
    "404": (dict(status=404), "no model repository that you may read"),
    "409": (dict(status=409), "somebody changed the repository at the same time (409)"),
    "429": (dict(status=429, headers={"Retry-After": "60"}), "asked too often (429): try again in 60 seconds"),
    "429 at last": (dict(status=429, headers={"Retry-After": "60"}, path=FILE), "try again in 60 seconds"),
    "500": (dict(status=500), "the Hub has a problem of its own (500): try again later"),
    "500 at last": (dict(status=500, path=FILE), "the Hub has a problem of its own (500): try again later"),
    "time-out": (dict(hang=30), "did not answer in time: try again, or set HF_HUB_DOWNLOAD_TIMEOUT (seconds) higher"),
    "time-out at last": (dict(hang=30, path=FILE), "the Hub did not answer"),
    "truncated": (dict(truncate=True), "the transfer broke off"),
    "truncated at last": (dict(truncate=True, path=FILE), "broke off"),
}
WRITING = {
    "401": (dict(status=401, path="/repos/create"), "does not accept your token, or got none (401): log in with"),
    "403": (dict(status=403, path="/commit/"), "you may not do this (403): use a token that may write"),
    "404": (dict(status=404, path="/preupload/"), "no model repository that you may read: check the name"),
    "409": (dict(status=409, path="/repos/create"), "somebody changed the repository at the same time (409)"),
    "412": (dict(status=412, path="/commit/"), "somebody changed the repository at the same time (412)"),
    "429": (dict(status=429, path="/commit/", headers={"Retry-After": "60"}), "try again in 60 seconds"),
    "429 at first": (dict(status=429, path=API, headers={"RateLimit": '"api";r=0;t=55'}), "in 55 seconds"),
    "500": (dict(status=500, path="/preupload/"), "the Hub has a problem of its own (500): try again later"),
    "500 at last": (dict(status=500, path="/commit/"), "the Hub has a problem of its own (500): try again later"),
    "time-out": (dict(hang=30, path=API), "did not answer in time: try again, or set HF_HUB_DOWNLOAD_TIME"),
    "time-out at last": (dict(hang=30, path="/commit/"), "did not answer in time"),
    "truncated": (dict(truncate=True, path="/commit/"), "the transfer broke off"),
}


def one_line(capfd):
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def fails_in_time(call, runs, tmp_path, capfd):
    """Check that a command fails soon and in one line, which is returned."""
    started = time.monotonic()
    capfd.readouterr()
    assert call(runs, tmp_path) == 2
    assert time.monotonic() - started < 15
    return one_line(capfd)


@pytest.mark.parametrize("fault", READING)
def test_reading_fails_in_one_line(fault, server, runs, tmp_path, capfd):
    how, expected = READING[fault]
    server.put(SEARCH, searched(runs))
    server.fail("HEAD|GET", times=math.inf, **{"path": API, **how})
    line = fails_in_time(read, runs, tmp_path, capfd)
    assert line.startswith(f"error: {SEARCH} is no folder here, and on the Hub: ")
    assert expected in line
    assert not (tmp_path / "trained").exists()
    server.faults.clear()
    assert hub.load_search(SEARCH).seed == 0, "the cache was damaged"


@pytest.mark.parametrize("fault", WRITING)
def test_writing_fails_in_one_line_and_works_again(fault, server, runs, tmp_path, capfd):
    how, expected = WRITING[fault]
    before = content(runs.base)
    server.fail("GET|POST", times=math.inf, **how)
    line = fails_in_time(write, runs, tmp_path, capfd)
    assert line.startswith(f"error: {NET}: ")
    assert expected in line
    folder = runs.found / "model"
    assert line.endswith(f"{folder} is whole, push it again with: python -m bmsn_zoo.hub push {folder} {NET}")
    assert content(runs.base) == before
    if fault != "truncated":  # there the commit was made, and only the answer was lost
        assert set(server.files(NET) if NET in server._repos else ()) <= {".gitattributes"}
    server.faults.clear()
    assert write(runs, tmp_path) == 0
    assert len(server.commits(NET)) == 2
    assert "model.safetensors" in server.files(NET)


def test_refused_connections(server, runs, tmp_path, capfd):
    server.close()
    assert read(runs, tmp_path) == 2
    assert "cannot be reached" in one_line(capfd)
    assert write(runs, tmp_path) == 2
    line = one_line(capfd)
    assert "cannot be reached" in line
    assert "check the network and HF_ENDPOINT" in line


def test_offline_and_missing(server, runs, tmp_path, capfd, monkeypatch):
    server.put(SEARCH, {"config.json": b"{}"})
    for name, expected in (
        (SEARCH, f"{SEARCH} holds no finished search: search.json is missing"),
        ("alice/nothing", "no model repository that you may read"),
        (f"{SEARCH}@nowhere", "no such revision"),
    ):
        with pytest.raises(InputError, match=expected):
            hub.load_search(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read(runs, tmp_path) == 2
    assert "not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub" in one_line(capfd)
    assert write(runs, tmp_path) == 2
    assert "HF_HUB_OFFLINE" in one_line(capfd)


def test_the_clients_own_errors_come_through_timm_and_it_works_again(server, runs, monkeypatch):
    server.put(NET, {file.name: file.read_bytes() for file in (runs.found / "model").iterdir()})
    name = f"hf-hub:{NET}"
    for how, expected in (
        (dict(status=401), "RepositoryNotFoundError"),
        (dict(status=403), "LocalEntryNotFoundError"),
        (dict(method="GET", path="safetensors", truncate=True), "RemoteProtocolError"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("time.sleep", lambda seconds: None)
            server.fail(how.pop("method", "HEAD|GET"), how.pop("path", "/resolve/"), times=math.inf, **how)
            with pytest.raises(Exception) as caught:
                timm.create_model(name, pretrained=True)
            server.faults.clear()
        assert type(caught.value).__name__ == expected
        assert not isinstance(caught.value, InputError)
    model = timm.create_model(name, pretrained=True)
    assert torch.equal(model.fc.weight, load_file(runs.found / "model" / "model.safetensors")["fc.weight"])


def test_our_hooks_leave_the_client_as_it_was(server, runs):
    hooks = {kind: list(functions) for kind, functions in get_session().event_hooks.items()}
    for name in (SEARCH, "alice/nothing"):
        with contextlib.suppress(InputError):
            hub.load_search(name)
    assert get_session().event_hooks == hooks


def test_push_checks_before_it_asks(server, runs, tmp_path, capfd):
    for arguments, expected in (
        (("nothing", NET), "holds neither a model"),
        ((runs.found, "net"), "'net' is no name of a Hub repository: write it as USER/REPO"),
        ((runs.found, "alice/-net-"), "'alice/-net-' is no name of a Hub repository"),
        ((runs.found, "a/b/c"), "'a/b/c' is no name"),
        ((runs.found, NET, "--revision", "x", "--create-pr"), "revision and create-pr are both given"),
        ((runs.found,), "USER/REPO"),
        ((runs.found, NET, "--nothing"), "--nothing"),
    ):
        assert run(hub, "push", *arguments) == 2
        assert expected in one_line(capfd)
    damaged = tmp_path / "model"
    shutil.copytree(runs.found / "model", damaged)
    (damaged / "model.safetensors").write_bytes(b"\x80\x04.")
    assert run(hub, "push", damaged, NET) == 2
    assert "model.safetensors is damaged" in one_line(capfd)
    assert server.requests == []
    server.put(NET, {})
    assert run(hub, "push", runs.found, NET, "--private") == 2
    assert "exists and is public" in one_line(capfd)


def test_push_takes_no_file_that_it_does_not_know(server, runs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(runs.found / "model", folder)
    (folder / "secret.env").write_text("TOKEN=1")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    server.put(NET, {"NOTES.md": b"mine", "search.json": b"{}"})
    hub.push(folder, NET)
    assert {"secret.env", "pytorch_model.bin"}.isdisjoint(server.files(NET))
    assert server.files(NET)["NOTES.md"] == b"mine"
    assert server.files(NET)["search.json"] == (folder / "search.json").read_bytes()


@pytest.mark.parametrize("lfs", [False, True])
def test_push_all_is_repeatable(lfs, server, runs, monkeypatch):
    server.lfs = lfs
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    addresses = hub.push_all("zoo", zoo=runs.zoo)
    assert addresses == [f"{server.endpoint}/zoo/{name}" for name in sorted((FOUND, DEFAULT))]
    for name in (FOUND, DEFAULT):
        files = server.files(f"zoo/{name}")
        files.pop(".gitattributes")
        assert files == {file.name: file.read_bytes() for file in (runs.zoo / name).iterdir()}, "byte for byte"
    hub.push_all("zoo", zoo=runs.zoo)
    assert lfs == any(path.startswith("/lfs/") for _, path in server.requests)
    assert [len(server.commits(f"zoo/{name}")) for name in (FOUND, DEFAULT)] == [2, 2]


# the scripts


def test_train_pushes_and_a_failure_costs_nothing(server, runs, image_folder, tmp_path, capfd):
    arguments = ["--dataset", image_folder, "--layout", "2-4-4", *COMMON]
    capfd.readouterr()
    for flags, expected in (
        (["--push-to-hub", "net"], "'net' is no name of a Hub repository"),
        (["--private"], "private says how to push: give --push-to-hub USER/REPO too"),
    ):
        assert run(train_module, *arguments, "--output", tmp_path / "run", *flags) == 2
        assert expected in one_line(capfd)
        assert not (tmp_path / "run").exists()
    server.fail("POST", "/commit/", status=500)
    flags = ["--push-to-hub", NET, "--private", "--revision", "trial"]
    assert run(train_module, *arguments, "--output", tmp_path / "run", *flags) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    again = error.split("push it again with: python -m bmsn_zoo.hub ")[1].split()
    assert again == ["push", str(tmp_path / "run" / "model"), NET, "--private", "--revision", "trial"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["layout"] == "2-4-4"
    assert run(hub, *again) == 0
    assert server._repos[NET].private
    assert "model.safetensors" not in server.files(NET)
    assert "model.safetensors" in server.files(NET, "trial")


def test_train_from_a_search_on_the_hub(server, runs, tmp_path):
    hub.push(runs.search, SEARCH)
    # its data are a folder of another machine, so they are given again
    data = json.loads((runs.search / "search.json").read_text())["settings"]["dataset"]
    arguments = ["--from-search", f"{SEARCH}@main", "--dataset", data, *COMMON, "--pick", "best_within_default_macs"]
    assert run(train_module, *arguments, "--output", tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["layout"] == hub.load_search(str(runs.search)).best_within_default_macs.layout
    assert metrics["settings"]["from_search"] == f"{SEARCH}@{server.commits(SEARCH)[0].sha}"
    model = tmp_path / "run" / "model"
    assert (model / "search.json").read_bytes() == server.files(SEARCH)["search.json"]
    assert f"from_search: {SEARCH}@" in (model / "README.md").read_text()


def test_a_search_that_goes_away_does_not_cost_a_training(server, runs, tmp_path, monkeypatch):
    server.put(SEARCH, searched(runs))
    evaluate = train_module.evaluate

    def lose_everything(*arguments):
        server.close()
        shutil.rmtree(constants.HF_HUB_CACHE)
        return evaluate(*arguments)

    monkeypatch.setattr(train_module, "evaluate", lose_everything)
    data = json.loads((runs.search / "search.json").read_text())["settings"]["dataset"]
    arguments = ["--from-search", SEARCH, "--dataset", data, *COMMON, "--output", tmp_path / "run"]
    assert run(train_module, *arguments) == 0
    assert "Ranked 1 of 36" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_layout_that_the_search_did_not_rank(runs, image_folder, tmp_path):
    config = train_module.TrainConfig(dataset=str(image_folder), layout="5-5", from_search=str(runs.search))
    with pytest.raises(InputError, match="layout 5-5 is none of those that the search"):
        train_module.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_search_starts_from_another(server, runs, image_folder, tmp_path):
    server.put(SEARCH, searched(runs))
    arguments = ["--dataset", image_folder, *COMMON, "--mixture-size", 2, "--lr", 0, "--min-lr", 0]
    for name, source in (("hub", SEARCH), ("folder", runs.search)):
        assert run(search_module, *arguments, "--init-from", source, "--output", tmp_path / name) == 0
        before, after = (load_file(f / "supernets.safetensors") for f in (runs.search, tmp_path / name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), "the rate was 0"
    settings = json.loads((tmp_path / "hub" / "search.json").read_text())["settings"]
    assert settings["init_from"] == f"{SEARCH}@{server.commits(SEARCH)[0].sha}"


def test_init_from_refuses_what_does_not_fit(runs, image_folder, tmp_path, capfd):
    base = ["--dataset", image_folder, *COMMON, "--init-from", runs.search, "--output", tmp_path / "run"]
    capfd.readouterr()
    for flags, expected in (
        (["--mixture-size", 3], "was searched with mixture-size 2, not 3: give --mixture-size 2"),
        (["--mixture-size", 2, "--in-chans", 1], "in-chans 3, not 1"),
        (["--init-from", tmp_path], "holds no finished search"),
    ):
        assert run(search_module, *base, *flags) == 2
        assert expected in one_line(capfd)
        assert not (tmp_path / "run").exists()


def test_another_number_of_classes_keeps_fresh_classifiers(runs):
    from bmsn_zoo.config import SearchConfig

    mixture = Mixture(SearchSpace("bmsn_resnet20"), 2, 7, 3, seed=1)
    fresh = mixture.state_dict()
    one_shot.start_mixture_from(str(runs.search), mixture, SearchConfig(mixture_size=2))
    stored, now = load_file(runs.search / "supernets.safetensors"), mixture.state_dict()
    for key in now:
        assert torch.equal(now[key], (fresh if ".fc." in key else stored)[key]), key


def test_a_folder_that_looks_like_a_hub_id_is_not_published_as_one(server, runs, image_folder, tmp_path, monkeypatch):
    """Trained from a relative path, pushed from another folder, where that path leads nowhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    shutil.copytree(image_folder, home / "private" / "patients")
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    data = ["--dataset", "private/patients", *COMMON]
    assert run(search_module, *data, "--mixture-size", 1, "--output", "search") == 0
    assert run(train_module, *data, "--layout", "4-3-3", "--output", "run") == 0
    monkeypatch.chdir(elsewhere)
    hub.push(home / "run", NET)
    hub.push(home / "search", SEARCH)
    for repo in (NET, SEARCH):
        files = server.files(repo)
        assert not any(b"private/" in content for content in files.values())
        card = ModelCard(files["README.md"].decode())
        assert card.data.datasets is None
        assert "huggingface.co/datasets" not in card.text


# what strangers may have put on the Hub

PWNED = "pwned"


class Evil:
    """Unpickling this writes a file."""

    def __reduce__(self):
        return os.system, (f"touch {PWNED}",)


LAYOUTS = [
    [-4, 7, 7],
    [4, 3, 4],
    [10**9, 3, 3],
    [4] * 100_000,
    [[4], 3, 3],
    [4.5, 3, 2.5],
    [True, 6, 3],
    {"4": 3},
    "4-3-3; import os",
    "__import__('os').system('touch pwned')",
    "9" * 10_000,
    7,
    [None],
    [],
]


def test_hostile_repositories_are_refused(server, runs, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    files = {file.name: file.read_bytes() for file in (runs.found / "model").iterdir()}
    config = json.loads(files["config.json"])

    def refused(**changed: bytes):
        server.put(NET, {**files, **{name.replace("__", "."): data for name, data in changed.items()}})
        before = set(tmp_path.rglob("*"))
        with pytest.raises(Exception) as caught:
            timm.create_model(f"hf-hub:{NET}", pretrained=True)
        new = {path for path in set(tmp_path.rglob("*")) - before if tmp_path / "cache" not in path.parents}
        assert new <= {tmp_path / "cache"}, new
        return caught.value

    for layout in LAYOUTS:
        error = refused(config__json=json.dumps({**config, "model_args": {"layout": layout}}).encode())
        assert isinstance(error, InputError), (str(layout)[:50], error)
        assert len(str(error)) < 500
    # another layout than that of the weights
    assert "belong to layout" in str(
        refused(config__json=json.dumps({**config, "model_args": {"layout": "9-1"}}).encode())
    )
    # file names that leave the folder, and pickles
    for name in ("../../../../evil.safetensors", "/etc/passwd", "..\\..\\evil.safetensors", "evil.bin"):
        hostile = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "hf_hub_filename": name}}
        server.put(NET, {name: pickle.dumps(Evil())})
        refused(config__json=json.dumps(hostile).encode())
    refused(model__safetensors=pickle.dumps(Evil()))
    refused(model__safetensors=b"")
    for part, changed in (
        ("pretrained_cfg", {"surprise": 1}),
        ("pretrained_cfg", {"hf_hub_filename": "model.safetensors", "custom_load": "hf"}),
        ("model_args", {"in_chans": 10**12}),
        ("model_args", {"num_classes": "many"}),
        ("model_args", {"checkpoint_path": "evil.bin"}),
        ("model_args", {"act_layer": "os.system"}),
    ):
        refused(config__json=json.dumps({**config, part: {**config[part], **changed}}).encode())
    refused(config__json=b"[" * 20_000)
    # only a pickle: timm looks for safetensors first, and never runs what a pickle says
    server.put("alice/pickle", {"config.json": files["config.json"], "pytorch_model.bin": pickle.dumps(Evil())})
    with pytest.raises(Exception) as caught:
        timm.create_model("hf-hub:alice/pickle", pretrained=True)
    assert "weights_only" in str(caught.value) or "safetensors" in str(caught.value)
    # fields that nobody knows are ignored
    extra = {**config, "surprise": {"a": [1]}, "auto_map": {"AutoModel": "evil.Model"}}
    server.put(NET, {**files, "config.json": json.dumps(extra).encode(), "evil.py": b"open('pwned', 'w')"})
    model = timm.create_model(f"hf-hub:{NET}", pretrained=True)
    assert model.layout == config["model_args"]["layout"]
    assert not (tmp_path / PWNED).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 1},
        {"settings": []},
        {"settings": {"dataset": 3}},
        {"dataset": {"id": "x"}},
        {"model": "resnet18"},
        {"model": None},
        {"recipe": ["a"]},
        {"best": {"layout": "4-3-3"}},
        {"best": {"layout": "5-3-3", "accuracy": 0.5, "macs": 1, "supernet": 0}},
        {"default": {"layout": "-1", "accuracy": 0.5, "macs": 1, "supernet": 0}},
        {"ranking": []},
        {"ranking": [{"layout": 4}]},
        {"segments": [{}]},
        {"mixture_size": "2"},
        {"seed": True},
    ],
)
def test_hostile_search_results_are_refused(change, runs, tmp_path):
    result = json.loads((runs.search / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps({**result, **change}))
    with pytest.raises(InputError) as caught:
        hub.load_search(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '"' + "x" * 100_000, "1" * 5000])
def test_damaged_search_results_are_refused(content, tmp_path):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(InputError):
        hub.load_search(str(tmp_path))


def test_a_pickle_is_no_supernet(runs, tmp_path):
    import pickle

    shutil.copy(runs.search / "search.json", tmp_path)
    (tmp_path / "supernets.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"supernets.* is damaged"):
        hub.load_supernets(str(tmp_path))
