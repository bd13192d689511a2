"""The stand-in Hub against the unmodified client, in this process and in fresh ones."""

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NET = "alice/net"
WEIGHTS = bytes(range(256)) * 400
ROUND_TRIP = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api, folder = HfApi(), Path(sys.argv[1])
api.create_repo("alice/net", private=True)
first = api.upload_folder(repo_id="alice/net", folder_path=folder)
second = api.upload_folder(repo_id="alice/net", folder_path=folder)
api.create_branch("alice/net", branch="feature/x")
revisions = ["main", "feature/x", first.oid]
files = [Path(hf_hub_download("alice/net", "model.safetensors", revision=r)) for r in revisions]
weights = (folder / "model.safetensors").read_bytes()
print(json.dumps({
    "user": api.whoami()["name"],
    "same": first.oid == second.oid,
    "equal": [file.read_bytes() == weights for file in files],
    "snapshot": sorted(file.name for file in Path(snapshot_download("alice/net")).iterdir()),
}))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # For its telemetry the client asks the Hub of HF_ENDPOINT, whatever HfApi(endpoint=...) says.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\nA model.\n")
    return folder


def api(hub: HubServer, token: str | bool = "hf_alice") -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def fetch(url: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of a bare GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("lfs", [False, True])
def test_fresh_process(lfs: bool, folder: Path, tmp_path: Path) -> None:
    with HubServer(lfs=lfs) as hub:
        environment = hub.environment(tmp_path / "home", "hf_alice") | ({"HF_HUB_DISABLE_XET": "1"} if lfs else {})
        command = [sys.executable, "-c", ROUND_TRIP, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=25)
        assert done.returncode == 0, done.stderr
        names = [".gitattributes", "README.md", "model.safetensors"]
        assert json.loads(done.stdout) == {"user": "alice", "same": True, "equal": [True] * 3, "snapshot": names}
        assert len(hub.commits(NET)) == 2
        assert hub.files(NET)["model.safetensors"] == WEIGHTS
        assert any(path.startswith("/lfs/") for _, path in hub.requests) == lfs


def test_branch_pull_request_and_delete(hub: HubServer, folder: Path) -> None:
    alice = api(hub)
    alice.create_repo(NET)
    alice.create_branch(NET, branch="trial")
    alice.upload_folder(repo_id=NET, folder_path=folder, revision="trial")
    by_folder = alice.upload_folder(repo_id=NET, folder_path=folder, create_pr=True)
    by_file = api(hub, "hf_bob").upload_file(repo_id=NET, path_or_fileobj=b"1", path_in_repo="a/1", create_pr=True)
    assert (by_folder.pr_revision, by_file.pr_revision) == ("refs/pr/1", "refs/pr/2")
    assert [sorted(hub.files(NET, revision)) for revision in ("main", "refs/pr/1", "refs/pr/2")] == [
        [".gitattributes"],
        [".gitattributes", "README.md", "model.safetensors"],
        [".gitattributes", "a/1"],
    ]
    alice.delete_file("README.md", NET, revision="trial")
    assert alice.list_repo_files(NET, revision="trial") == [".gitattributes", "model.safetensors"]
    refs = alice.list_repo_refs(NET, include_pull_requests=True)
    assert [ref.name for ref in refs.branches + (refs.pull_requests or [])] == ["main", "trial", "1", "2"]
    assert [c.commit_id for c in alice.list_repo_commits(NET, revision="trial")] == [
        c.sha for c in hub.commits(NET, "trial")
    ]


def test_private(hub: HubServer, tmp_path: Path) -> None:
    hub.put(NET, {"config.json": b"{}"}, private=True)
    assert api(hub).model_info(NET).private
    for token, status in ((False, 401), ("hf_bob", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api(hub, token).hf_hub_download(NET, "config.json", cache_dir=tmp_path)
        assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        api(hub, "hf_wrong").model_info(NET)
    assert type(refused.value) is HfHubHTTPError


def test_missing(hub: HubServer, tmp_path: Path) -> None:
    hub.put(NET, {"config.json": b"{}"})
    with pytest.raises(EntryNotFoundError):
        api(hub).hf_hub_download(NET, "nothing.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api(hub).hf_hub_download(NET, "config.json", revision="nowhere", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api(hub).hf_hub_download("alice/nobody", "config.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api(hub).upload_file(repo_id=NET, path_or_fileobj=b"", path_in_repo="a", revision="nowhere")
    assert not api(hub, False).file_exists(NET, "nothing.json")


def test_permissions(hub: HubServer, folder: Path) -> None:
    hub.orgs = {"zoo": ["alice"]}
    api(hub).create_repo("zoo/net")
    api(hub).upload_folder(repo_id="zoo/net", folder_path=folder)
    for token, status in ((False, 401), ("hf_bob", 403)):
        with pytest.raises(HfHubHTTPError) as caught:
            api(hub, token).create_repo("zoo/other")
        assert caught.value.response.status_code == status
        with pytest.raises(HfHubHTTPError) as caught:
            api(hub, token).upload_file(repo_id="zoo/net", path_or_fileobj=b"", path_in_repo="a")
        assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as caught:
        api(hub).create_repo("zoo/net")
    assert caught.value.response.status_code == 409
    assert api(hub).create_repo("zoo/net", exist_ok=True).repo_id == "zoo/net"
    with pytest.raises(ValueError, match="Invalid metadata"):
        card = b"---\nlicense: [\n---\n"
        api(hub).upload_file(repo_id="zoo/net", path_or_fileobj=card, path_in_repo="README.md")
    assert len(hub.commits("zoo/net")) == 2


def test_ranges_and_resumed_download(hub: HubServer, tmp_path: Path) -> None:
    hub.put(NET, {"w": WEIGHTS})
    url = f"{hub.endpoint}/{NET}/resolve/main/w"
    for asked, expected in (("5-", WEIGHTS[5:]), ("5-9", WEIGHTS[5:10]), ("-3", WEIGHTS[-3:])):
        assert fetch(url, Range=f"bytes={asked}") == (206, expected)
    assert fetch(url, Range=f"bytes={len(WEIGHTS)}-")[0] == 416
    hub.requests.clear()
    hub.fail("GET", "/resolve/main/w", truncate=True)
    assert Path(api(hub).hf_hub_download(NET, "w", cache_dir=tmp_path)).read_bytes() == WEIGHTS
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET"]


def test_status_faults(hub: HubServer, tmp_path: Path) -> None:
    hub.put(NET, {"w": WEIGHTS})
    hub.fail("HEAD", "/w", status=429, headers={"Retry-After": "60"})  # asked again at once, then it works
    hub.fail("GET", "/w", status=429, headers={"Retry-After": "0"})  # the client waits a second
    assert Path(api(hub).hf_hub_download(NET, "w", cache_dir=tmp_path)).read_bytes() == WEIGHTS
    assert [method for method, _ in hub.requests] == ["HEAD", "HEAD", "GET", "GET"]
    hub.fail("GET", "^/api/models/", status=429, headers={"Retry-After": "60"}, times=math.inf)
    with pytest.raises(HfHubHTTPError) as caught:
        api(hub).model_info(NET)
    assert caught.value.response.headers["Retry-After"] == "60"
    hub.faults.clear()
    for status in (403, 409, 500):
        hub.fail("POST", "/create", status=status)
        with pytest.raises(HfHubHTTPError, match=f"injected error {status}"):
            api(hub).create_repo("alice/other")
    hub.fail("GET", "^/api/models/", status=401)  # what the Hub says of a repository it hides
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info(NET)
    assert api(hub).model_info(NET).id == NET


def test_hang_and_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.put(NET, {"w": WEIGHTS})
    hub.fail("GET", "^/api/models/", hang=60)
    start = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        api(hub).model_info(NET, timeout=0.2)
    hub.close()
    with pytest.raises(LocalEntryNotFoundError, match="refused"):
        snapshot_download(NET, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert time.monotonic() - start < 10


def test_client_killed_before_the_commit(folder: Path, tmp_path: Path) -> None:
    with HubServer(lfs=True) as hub:
        hub.put(NET, {"config.json": b"{}"})
        hub.fail("POST", "/commit/", hang=60)
        code = "import sys, huggingface_hub as h; h.upload_folder(repo_id='alice/net', folder_path=sys.argv[1])"
        environment = hub.environment(tmp_path / "home", "hf_alice") | {"HF_HUB_DISABLE_XET": "1"}
        with subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment) as client:
            while not any("/commit/" in path for _, path in hub.requests):
                assert client.poll() is None
                time.sleep(0.02)
            client.kill()
        assert sum(method == "PUT" for method, _ in hub.requests) == 1  # the weights had arrived
        assert sorted(hub.files(NET)) == [".gitattributes", "config.json"]


def test_half_a_request_changes_nothing(hub: HubServer) -> None:
    hub.put(NET, {"config.json": b"{}"})
    body = '\r\n{"key": "header", "value": {"summary": "half"}}\n'
    lines = f"POST /api/models/{NET}/commit/main HTTP/1.1", "Authorization: Bearer hf_alice", "Content-Length: 999"
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as client:
        client.sendall("\r\n".join((*lines, "", body)).encode())
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert len(hub.commits(NET)) == 2


def test_lfs_object_must_match_its_id(hub: HubServer) -> None:
    hub.put(NET, {})
    url = f"{hub.endpoint}/lfs/{NET}/{'0' * 64}/3"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, data=b"abc", method="PUT"))


def test_put_takes_hostile_names(hub: HubServer) -> None:
    sha = hub.put(NET, {f"..{os.sep}evil": b"x"}, revision="bad")
    assert api(hub).list_repo_files(NET, revision=sha) == [".gitattributes", "../evil"]
    assert list(hub.files(NET)) == [".gitattributes"]
