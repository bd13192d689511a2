"""Models and searches to the Hub and from it."""

import json
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor

from . import __version__
from .card import PICTURE, SOME_NAME, portable, relicense, search_card
from .client import asking_hub
from .command import run_command
from .config import DataConfig, shipped_folder
from .errors import InputError, first_line
from .files import read_text
from .model_folder import MODEL_FILES, add, load_model, model_folder, what_is_wrong
from .results import SearchResult, TrainResult
from .run_folder import load_tensors
from .usage import parser_of

_log = logging.getLogger(__name__)
# all of a search that is ever pushed
SEARCH_FILES = (
    "README.md",
    "config.yaml",
    "metrics.jsonl",
    "pictures/accuracy_macs.png",
    "pictures/assignment.png",
    "pictures/curves.png",
    "search.json",
    "supernets.safetensors",
)
_HUB_NAME = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@(.+))?")
# pull


def fetch(name: str, *files: str, what: str = "finished search") -> list[Path]:
    """Files of a run folder, a model folder or a Hub repository; from the Hub they come into its client's cache.

    Args:
        name: a folder, a model of the zoo, or USER/REPO[@revision] on the Hub.
        files: their names; all come from one commit.
        what: they are together, for messages.

    Raises:
        InputError: if one is missing, or the Hub cannot be read.
    """
    on_hub = _HUB_NAME.fullmatch(name)
    folder = Path(name) if (Path(name) / files[0]).is_file() else model_folder(name)
    if folder.is_dir() or not on_hub:
        for file in files:
            if not (folder / file).is_file():
                raise InputError(what_is_wrong(name, folder, what, file))
        return [folder / file for file in files]
    repo_id, revision = on_hub.groups()
    paths: list[Path] = []
    failure: Exception | None = None
    with asking_hub(f"{name} is no folder here, and on the Hub"):
        try:  # the client would ask for files many times before it says why it cannot have them
            HfApi().model_info(repo_id, revision=revision)
        except (HTTPError, OfflineModeIsEnabled) as error:
            failure = error
        for file in files:
            try:
                found = hf_hub_download(repo_id, file, revision=revision, local_files_only=bool(failure))
            except LocalEntryNotFoundError:
                if failure is None:
                    raise
                raise failure from None
            except EntryNotFoundError:
                raise InputError(f"{name} holds no {what}: {file} is missing") from None
            paths.append(Path(found))
            revision = paths[0].parent.name  # the commit
    return paths


def pin(name: str) -> str:
    """Where a search is found again: its folder, or USER/REPO with its present commit, since it may change there."""
    (path,) = fetch(name, "search.json")
    if path == Path(name) / "search.json":
        return name
    on_hub = _HUB_NAME.fullmatch(name)
    return f"{on_hub[1]}@{path.parent.name}" if on_hub and not Path(name).is_dir() else str(path.parent)


def load_search(name: str) -> SearchResult:
    """The result of a finished search.

    Args:
        name: run folder of the search, folder of a model that it found, or USER/REPO[@revision] of one on the Hub.

    Raises:
        InputError: if there is none, it is of another kind or version, or the Hub cannot be read.
    """
    return SearchResult.read(fetch(name, "search.json")[0], f"{name}: search.json")


def load_supernets(name: str) -> tuple[SearchResult, dict[str, Tensor]]:
    """The result of a finished search and the weights of its supernets, as `Mixture.state_dict` names them.

    Args:
        name: as in `load_search`.

    Raises:
        InputError: if there are none.
    """
    path, weights = fetch(name, "search.json", "supernets.safetensors")
    result = SearchResult.read(path, f"{name}: search.json")
    return result, load_tensors(weights, f"{name}: supernets.safetensors")


# push


def check_target(
    repo_id: str, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> dict[str, Any]:
    """The arguments as `push` takes them.

    Raises:
        InputError: if the name is no USER/REPO, or a pull request is to go to a branch.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name of a Hub repository: {first_line(error)}") from None
    if repo_id.count("/") != 1:
        raise InputError(f"{repo_id!r} is no name of a Hub repository: write it as USER/REPO")
    if revision and create_pr:
        raise InputError("revision and create-pr are both given: a pull request is made to the main branch")
    return {"repo_id": repo_id, "private": private, "revision": revision, "create_pr": create_pr}


def take_target(given: dict[str, Any]) -> dict[str, Any] | None:
    """Take the flags of a push out of the flags of a run; returns the arguments of `push`, None if it is not asked for.

    Raises:
        InputError: if they do not fit together.
    """
    repo_id = given.pop("push_to_hub", None)
    rest = {key: given.pop(key) for key in ("private", "revision", "create_pr") if key in given}
    if repo_id is None and rest:
        raise InputError(f"{next(iter(rest)).replace('_', '-')} says how to push: give --push-to-hub USER/REPO too")
    return None if repo_id is None else check_target(repo_id, **rest)


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> str:
    """Push a model folder or a finished search to the Hub, in one commit; none if nothing changed.

    Only `MODEL_FILES` or `SEARCH_FILES` are pushed, and those of them that the folder lacks are deleted there. The
    folder is not changed.

    Args:
        folder: a model folder, the run folder of a training (its model/ is pushed), or that of a search.
        repo_id: USER/REPO; made if it does not exist.
        private: make a new repository private, and refuse one that is public.
        revision: branch to push to; made if it does not exist.
        create_pr: open a pull request instead of committing.
        license: what the card and the record are to name instead of their own, as the Hub writes it.

    Returns:
        where to see it: the address of the repository, branch or pull request.

    Raises:
        InputError: if the folder is not whole, or the Hub cannot be written; the message says how to push again.
    """
    check_target(repo_id, private, revision, create_pr)
    DataConfig(license=license)  # refuses what is none
    folder = Path(folder)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    title, allowed, files = _contents(folder, repo_id, license)
    api = HfApi(library_name="bmsn_zoo", library_version=__version__)
    try:
        with asking_hub(repo_id):
            info = _prepare(api, repo_id, private, revision)
            present = {sibling.rfilename for sibling in info.siblings or ()}
            stale = sorted(present & set(allowed) - set(files))
            commit = api.create_commit(
                repo_id,
                [*(CommitOperationAdd(name, content) for name, content in files.items()),
                 *(CommitOperationDelete(name) for name in stale)],
                commit_message=f"Upload {title}",
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha,
            )  # fmt: skip
    except InputError as error:
        options = [*(["--private"] if private else []), *(["--revision", revision] if revision else []),
                   *(["--create-pr"] if create_pr else []), *(["--license", license] if license else [])]  # fmt: skip
        again = shlex.join(["python", "-m", "bmsn_zoo.hub", "push", str(folder), repo_id, *options])
        raise InputError(f"{error}; {folder} is whole, push it again with: {again}") from error
    if commit.oid == info.sha:
        _log.info("%s holds exactly this already: nothing was committed", repo_id)
    if commit.pr_url:
        return commit.pr_url
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def _contents(
    folder: Path, repo_id: str, license: str | None = None
) -> tuple[str, tuple[str, ...], dict[str, bytes | Path]]:
    """What to call a folder's push, the files that it may hold, and those it holds with their content."""
    named = {"license": license} if license else {}
    if (folder / "config.json").is_file():
        model = load_model(folder)
        files: dict[str, bytes | Path] = {name: folder / name for name in MODEL_FILES if (folder / name).is_file()}
        card = read_text(folder / "README.md").replace(SOME_NAME, repo_id)
        if f"]({PICTURE})" in card and PICTURE not in files:
            raise InputError(f"{folder}: README.md shows {PICTURE}, which is missing: restore it")
        files["README.md"] = (relicense(card, license) if license else card).encode()
        if license:
            record = TrainResult.read(folder / "metrics.json").model_copy(update=named)
            files["metrics.json"] = (json.dumps(record.content(), indent=1) + "\n").encode()
        return f"{model.pretrained_cfg['architecture']} {model.layout}", MODEL_FILES, files  # type: ignore[index]
    if not (folder / "search.json").is_file():
        raise InputError(f"{folder} holds neither a model (config.json) nor a finished search (search.json)")
    searched = load_search(str(folder))
    result = portable(searched if "trials" in searched.details else load_supernets(str(folder))[0])
    result = result.model_copy(update=named)
    files = {name: folder / name for name in SEARCH_FILES if (folder / name).is_file()}
    files["README.md"] = search_card(result, repo_id).encode()
    files["config.yaml"] = yaml.safe_dump(result.settings, sort_keys=False).encode()
    files["search.json"] = (json.dumps(result.content(), indent=1) + "\n").encode()
    choice = "no winner" if result.undecided else f"first choice {result.pick('best').layout}"
    return f"search of {result.model}, {choice}", SEARCH_FILES, files


def _prepare(api: HfApi, repo_id: str, private: bool, revision: str | None) -> Any:
    """Make the repository and the branch if they are missing; returns what the Hub says of them."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)  # else as the organisation has it
        info = api.model_info(repo_id)
    if private and not info.private:
        raise InputError(f"{repo_id} exists and is public: make it private on the Hub, or choose another name")
    if revision:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision)
            info = api.model_info(repo_id, revision=revision)
    return info


def push_all(org: str, *, zoo: Path | None = None, **options: Any) -> list[str]:
    """Push every model of the zoo to a repository of its name.

    Args:
        org: user or organisation.
        zoo: folder of model folders; hub_configs/ if None.
        options: as in `push`.

    Returns:
        their addresses.
    """
    folders = sorted(file.parent for file in (zoo or shipped_folder("hub_configs")).glob("*/config.json"))
    if not folders:
        raise InputError(f"{zoo or shipped_folder('hub_configs')} holds no model")
    return [push(folder, f"{org}/{folder.name}", **options) for folder in folders]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("hub")

    def run() -> None:
        given = vars(parser.parse_args(argv))
        command = given.pop("command")
        if command == "push-all":
            lines = push_all(**given)
        else:
            lines = [push(**given) if command == "push" else str(add(**given))]
        sys.stdout.write("".join(f"{line}\n" for line in lines))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
