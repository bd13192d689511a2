"""A local stand-in for the Hugging Face Hub: real HTTP for the unmodified client, and faults on request.

Models only. Repositories live in memory; requests are carried out one at a time, so a commit is all or nothing.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".onnx", ".png")
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
Json = dict[str, Any]
Reply = tuple[int, Mapping[str, str], bytes]


class HubError(Exception):
    """An error answer, in the form from which the client picks its exception class."""

    def __init__(self, status: int, text: str, code: str = "", headers: Mapping[str, str] | None = None, **body: Any):
        super().__init__(text)
        named = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.reply: Reply = (status, named, json.dumps({"error": text, **body}).encode())


@dataclass
class Fault:
    """How to spoil the requests that match."""

    method: str  # regular expression for the whole method, such as "GET|HEAD"
    path: str  # regular expression searched for in the decoded path with its query
    status: int = 0  # answer with this, the request is not carried out; on a repository 401 and 404 say RepoNotFound
    headers: Mapping[str, str] = field(default_factory=dict)  # added to that answer, such as {"Retry-After": "1"}
    times: float = 1  # how many requests; math.inf for all
    truncate: bool = False  # carry the request out, but send half of the answer under the full Content-Length
    hang: float = 0  # wait this many seconds, then hang up; the request is not carried out

    def reply(self, path: str) -> Reply | None:
        """The answer that takes the place of the real one, if any."""
        code = "RepoNotFound" if self.status in (401, 404) and re.search("^/api/models/|/resolve/", path) else ""
        return HubError(self.status, f"injected error {self.status}", code, self.headers).reply if self.status else None


@dataclass(frozen=True)
class Request:
    """What the routes read of a request; `user` is None without a token."""

    user: str | None
    query: Mapping[str, str]
    headers: Message
    body: bytes


@dataclass(frozen=True)
class Blob:
    """A file's bytes, kept by LFS or not."""

    data: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        """What the client compares with its own file: sha256 of an LFS file, git object id of any other."""
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_id(self.data)

    def listing(self, path: str) -> Json:
        """The file's line in a tree listing."""
        size, pointer = len(self.data), LFS_POINTER.format(self.etag, len(self.data)).encode()
        lfs = {"lfs": {"oid": self.etag, "size": size, "pointerSize": len(pointer)}} if self.lfs else {}
        return {"type": "file", "path": path, "oid": git_id(pointer if self.lfs else self.data), "size": size, **lfs}


@dataclass(frozen=True)
class Commit:
    """One commit with its whole tree; `parent` is a sha."""

    sha: str
    parent: str | None
    title: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """One model repository; `refs` maps full names such as refs/heads/main to a sha, `lfs` sha256 to bytes."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def ref(self, revision: str) -> str:
        """Full name of a branch or pull request."""
        for name in (revision, f"refs/heads/{revision}"):
            if name in self.refs:
                return name
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def at(self, revision: str) -> Commit:
        """Commit of a branch, pull request or full commit sha."""
        return self.commits.get(revision) or self.commits[self.refs[self.ref(revision)]]

    def add_commit(self, ref: str, title: str, author: str, files: dict[str, Blob]) -> Commit:
        """Append a commit to a full ref name."""
        parent, date = self.refs.get(ref), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        tree = [(path, blob.etag) for path, blob in sorted(files.items())]
        sha = hashlib.sha1(repr((parent, title, author, date, tree)).encode()).hexdigest()
        self.refs[ref], self.commits[sha] = sha, Commit(sha, parent, title, author, date, files)
        return self.commits[sha]

    def open_pull_request(self) -> int:
        """Start refs/pr/N at main and return N."""
        number = 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)
        self.refs[f"refs/pr/{number}"] = self.refs["refs/heads/main"]
        return number


def git_id(data: bytes) -> str:
    """The id git gives to a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The server, at `endpoint` from its creation until `close` or the end of its `with` block.

    Args:
        tokens: User name of each token; by default hf_alice is alice's and hf_bob is bob's.
        orgs: Members of each organisation; all may write there.
        lfs: Ask for safetensors, ONNX and PNG files by LFS (sha256 ETags), as the real Hub does. A client that has
            hf_xet then needs HF_HUB_DISABLE_XET=1. By default every file is a regular one.

    `requests` lists (method, decoded path with query) of all requests; `faults` those planned by `fail`.
    """

    def __init__(
        self, tokens: Mapping[str, str] | None = None, orgs: Mapping[str, list[str]] | None = None, lfs: bool = False
    ) -> None:
        self.tokens = tokens or {"hf_alice": "alice", "hf_bob": "bob"}
        self.orgs, self.lfs = orgs or {}, lfs
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._repos: dict[str, Repo] = {}
        self._lock, self._closing = threading.RLock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; from now on connections are refused."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: os.PathLike[str] | str, token: str | None = None) -> dict[str, str]:
        """Environment of a fresh process whose client knows only this server and keeps its cache in `home`."""
        theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": os.fspath(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **ours, "NO_PROXY": "127.0.0.1", **({"HF_TOKEN": token} if token else {})}

    def fail(self, method: str, path: str, **how: Any) -> None:
        """Plan a `Fault`; of several that match a request the oldest goes first."""
        self.faults.append(Fault(method, path, **how))

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Commits of a revision, newest first; the last one is the Hub's own "initial commit"."""
        commits = [self._repos[repo].at(revision)]
        while commits[-1].parent:
            commits.append(self._repos[repo].commits[commits[-1].parent])
        return commits

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a revision, with the .gitattributes that the Hub puts into every new repository."""
        return {path: blob.data for path, blob in self._repos[repo].at(revision).files.items()}

    def put(self, repo: str, files: Mapping[str, bytes], revision: str = "main", private: bool = False) -> str:
        """Commit files past the client's own checks (hostile names too), creating what is missing; returns the sha."""
        with self._lock:
            found = self._repos.get(repo) or self._create(repo, private)
            ref = revision if revision in found.refs else f"refs/heads/{revision}"
            found.refs.setdefault(ref, found.refs["refs/heads/main"])
            blobs = {path: Blob(data, self._is_lfs(path, len(data))) for path, data in files.items()}
            return found.add_commit(ref, "put", repo.split("/")[0], {**found.at(ref).files, **blobs}).sha

    def _take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times >= 1 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _answer(self, method: str, target: str, headers: Message, body: bytes) -> Reply:
        path, token = urlsplit(target).path, headers.get("Authorization", "").removeprefix("Bearer ")
        query = {key: values[-1] for key, values in parse_qs(urlsplit(target).query).items()}
        try:
            if token and token not in self.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            for verbs, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and re.fullmatch(verbs, method):
                    parts = {key: unquote(value) for key, value in match.groupdict(default="").items()}
                    with self._lock:
                        reply = function(self, Request(self.tokens.get(token), query, headers, body), **parts)
                    return reply if isinstance(reply, tuple) else (200, {}, json.dumps(reply).encode())
            raise HubError(404, f"the stand-in Hub does not know {method} {path}")
        except HubError as error:
            return error.reply

    def _is_lfs(self, path: str, size: int) -> bool:
        return self.lfs and size > 0 and path.endswith(LFS_SUFFIXES)

    def _owns(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or user in self.orgs.get(namespace, ()))

    def _create(self, name: str, private: bool) -> Repo:
        repo = self._repos[name] = Repo(private)
        lines = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": Blob(lines.encode())}
        repo.add_commit("refs/heads/main", "initial commit", name.split("/")[0], files)
        return repo

    def _open(self, user: str | None, name: str, access: str = "read") -> Repo:
        """The repository, if the user may "read" it, "propose" a pull request to it or "write" it."""
        repo, owner = self._repos.get(name), self._owns(user, name.split("/")[0])
        hidden = repo is None or (repo.private and not owner)
        if user is None and (hidden or access != "read"):  # the Hub does not tell missing from private
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if access == "write" and not owner:
            raise HubError(403, f"You don't have the rights to write to {name}")
        return repo

    def _whoami(self, request: Request) -> Json:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org} for org in self.orgs if self._owns(request.user, org)]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": request.user, "fullname": request.user, "orgs": orgs, "auth": auth}

    def _validate_yaml(self, request: Request) -> Json:
        match = re.match(r"---\n(.*?)\n---", json.loads(request.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid YAML", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    def _create_repo(self, request: Request) -> Json:
        wanted = json.loads(request.body)
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = wanted.get("organization") or request.user
        if not self._owns(request.user, namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        name = f"{namespace}/{wanted['name']}"
        if name in self._repos:
            raise HubError(409, "You already created this model repo", url=f"{self.endpoint}/{name}")
        self._create(name, bool(wanted.get("private")) or wanted.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{name}"}

    def _info(self, request: Request, repo: str, rev: str) -> Json:
        found = self._open(request.user, repo)
        commit = found.at(rev or "main")
        about = {"author": repo.split("/")[0], "private": found.private, "lastModified": commit.date}
        return {"id": repo, "sha": commit.sha, "siblings": [{"rfilename": path} for path in commit.files], **about}

    def _tree(self, request: Request, repo: str, rev: str) -> list[Json]:
        return [blob.listing(path) for path, blob in self._open(request.user, repo).at(rev).files.items()]

    def _list_commits(self, request: Request, repo: str, rev: str) -> list[Json]:
        self._open(request.user, repo)
        return [
            {"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": [{"user": c.author}]}
            for c in self.commits(repo, rev)
        ]

    def _refs(self, request: Request, repo: str) -> Json:
        refs: Json = {"branches": [], "pullRequests": [], "tags": [], "converts": []}
        for ref, sha in self._open(request.user, repo).refs.items():
            kind = "branches" if ref.startswith("refs/heads/") else "pullRequests"
            refs[kind].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha})
        return refs

    def _new_branch(self, request: Request, repo: str, branch: str) -> Json:
        found, ref = self._open(request.user, repo, "write"), f"refs/heads/{branch}"
        if ref in found.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        found.refs[ref] = found.at(json.loads(request.body).get("startingPoint", "main")).sha
        return {}

    def _new_discussion(self, request: Request, repo: str) -> Json:
        return {"num": self._open(request.user, repo, "propose").open_pull_request()}

    def _discussion(self, request: Request, repo: str, number: str) -> Json:
        commit = self._open(request.user, repo).at(f"refs/pr/{number}")
        merge = {"isPullRequest": True, "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": []}
        about = {"title": commit.title, "status": "draft", "createdAt": commit.date}
        return {"num": int(number), "repo": {"name": repo, "type": "model"}, **merge, **about}

    def _preupload(self, request: Request, repo: str, rev: str) -> Json:
        access = "propose" if "create_pr" in request.query else "write"
        present, answers = self._open(request.user, repo, access).at(rev).files, []
        for wanted in json.loads(request.body)["files"]:
            mode = "lfs" if self._is_lfs(wanted["path"], wanted["size"]) else "regular"
            oid = {"oid": present[wanted["path"]].etag} if wanted["path"] in present else {}
            answers.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": answers}

    def _commit(self, request: Request, repo: str, rev: str) -> Json:
        propose, url = "create_pr" in request.query, f"{self.endpoint}/{repo}"
        found = self._open(request.user, repo, "propose" if propose or rev.startswith("refs/pr/") else "write")
        header, *operations = [json.loads(line) for line in request.body.split(b"\n") if line]
        base = found.at(found.ref(rev))
        if header["value"].get("parentCommit", base.sha) != base.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for operation in operations:
            self._apply(files, found.lfs, operation["key"], operation["value"])
        number = found.open_pull_request() if propose else 0
        ref = f"refs/pr/{number}" if number else found.ref(rev)
        sha = found.add_commit(ref, header["value"]["summary"], str(request.user), files).sha
        pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if number else {}
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **pull_request}

    @staticmethod
    def _apply(files: dict[str, Blob], objects: Mapping[str, bytes], key: str, value: Json) -> None:
        """Carry out one line of a commit on `files`, in place."""
        path = value["path"]
        gone = [name for name in files if name == path or f"{name}/".startswith(f"{path.rstrip('/')}/")]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in objects:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob(objects[value["oid"]], lfs=True)
        elif not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            for name in gone:
                del files[name]

    def _lfs_batch(self, request: Request, repo: str) -> Json:
        present, answers = self._open(request.user, repo, "propose").lfs, []
        for wanted in json.loads(request.body)["objects"]:
            href = {"href": f"{self.endpoint}/lfs/{repo}/{wanted['oid']}/{wanted['size']}"}
            actions = {} if wanted["oid"] in present else {"actions": {"upload": href, "verify": href}}
            answers.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        return {"transfer": "basic", "objects": answers}

    def _lfs_object(self, request: Request, repo: str, oid: str, size: str) -> Json:
        verify = request.headers.get("Content-Type") == "application/json"  # else it is the upload, sent without token
        data = self._repos[repo].lfs.get(oid, b"") if verify else request.body
        if hashlib.sha256(data).hexdigest() != oid or len(data) != int(size):
            raise HubError(400, "the uploaded object does not have the announced sha256 and size")
        self._repos[repo].lfs[oid] = data
        return {}

    def _resolve(self, request: Request, repo: str, rev: str, path: str) -> Reply:
        commit = self._open(request.user, repo).at(rev)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        data, headers["ETag"] = commit.files[path].data, f'"{commit.files[path].etag}"'
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if not span or span[0] == "bytes=-":
            return 200, headers, data
        start = int(span[1]) if span[1] else max(0, len(data) - int(span[2]))
        end = min(int(span[2]), len(data) - 1) if span[1] and span[2] else len(data) - 1
        if start > end:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1]


class _Handler(BaseHTTPRequestHandler):
    """Moves bytes between a socket and the hub, one request per connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        self.close_connection = True
        size, path = int(self.headers.get("Content-Length") or 0), unquote(self.path)
        body = self.rfile.read(size)
        if len(body) < size:
            return  # the client died while it sent the request
        fault = self.hub._take_fault(self.command, path)
        if fault and fault.hang:
            self.hub._closing.wait(fault.hang)
            return
        reply = (fault and fault.reply(path)) or self.hub._answer(self.command, self.path, self.headers, body)
        status, headers, body = reply
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Connection": "close", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault and fault.truncate else body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def handle(self) -> None:
        """Answer one request; a client that goes away is no error."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


REPO, REV = "(?P<repo>[^/]+/[^/]+)", "(?P<rev>[^/]+)"
API = f"/api/models/{REPO}"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [  # HTTP method and encoded path, both regular expressions
    ("GET", "/api/whoami-v2", HubServer._whoami),
    ("POST", "/api/validate-yaml", HubServer._validate_yaml),
    ("POST", "/api/repos/create", HubServer._create_repo),
    ("GET", f"{API}(?:/revision/{REV})?", HubServer._info),
    ("GET", f"{API}/tree/{REV}", HubServer._tree),
    ("GET", f"{API}/commits/{REV}", HubServer._list_commits),
    ("GET", f"{API}/refs", HubServer._refs),
    ("POST", f"{API}/branch/(?P<branch>[^/]+)", HubServer._new_branch),
    ("POST", f"{API}/discussions", HubServer._new_discussion),
    ("GET", f"{API}/discussions/(?P<number>[0-9]+)", HubServer._discussion),
    ("POST", f"{API}/preupload/{REV}", HubServer._preupload),
    ("POST", f"{API}/commit/{REV}", HubServer._commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", HubServer._lfs_batch),
    ("PUT|POST", f"/lfs/{REPO}/(?P<oid>[0-9a-f]+)/(?P<size>[0-9]+)", HubServer._lfs_object),
    ("GET|HEAD", f"/{REPO}/resolve/{REV}/(?P<path>.+)", HubServer._resolve),
]
