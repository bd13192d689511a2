"""The Hub's own client, kept from waiting long and from saying more than one line when something fails."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from .errors import InputError

_TRIES = 3  # of one request; the client alone would try seven times
_LONGEST_WAIT = 5  # seconds that a Hub which is asked too often may make us wait
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextlib.contextmanager
def asking_hub(name: str) -> Iterator[None]:
    """Use the Hub's client inside this block: it gives up in time, and its errors become one line.

    Requests wait no longer than HF_HUB_DOWNLOAD_TIMEOUT seconds (10 by default), those that write six times as long;
    the client itself sets no limit to most of them.

    Args:
        name: what is read or written, for the message.

    Raises:
        InputError: for every failure of the Hub, the network or the cache: what, why, and what to do.
    """
    tries: Counter[tuple[str, str]] = Counter()
    answered: list[Any] = []  # the response to the last request, if any

    def before(request: Any) -> None:
        limit = constants.HF_HUB_DOWNLOAD_TIMEOUT * (1 if request.method in ("GET", "HEAD") else 6)
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: min(given.get(kind) or limit, limit) for kind in ("connect", "read", "write", "pool")
        }
        key = request.method, str(request.url)
        tries[key] += 1
        if tries[key] > _TRIES:
            answer = "broke off its answers" if answered else "did not answer"
            raise InputError(f"{name}: the Hub {answer}, {_TRIES} times in a row: try again later")
        answered.clear()

    def after(response: Any) -> None:
        answered.append(response)
        last = tries[response.request.method, str(response.request.url)] == _TRIES
        busy = response.status_code == 429 and _seconds_to_wait(response) > _LONGEST_WAIT
        if busy or (last and response.status_code in (429, *range(500, 600))):
            raise InputError(_explain_status(name, response))

    # on the client at hand, which may be the user's own with a proxy or certificates
    hooks, bars, level = get_session().event_hooks, are_progress_bars_disabled(), logging.get_verbosity()
    hooks["request"].append(before)
    hooks["response"].append(after)
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except (HTTPError, EntryNotFoundError, OSError, ValueError) as error:
        raise InputError(_explain(name, error)) from error
    finally:
        hooks["request"].remove(before)
        hooks["response"].remove(after)
        logging.set_verbosity(level)
        if not bars:
            enable_progress_bars()


def _explain(name: str, error: BaseException) -> str:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    classes = {kind.__name__ for kind in type(error).__mro__}  # of the HTTP library, which is not always the same
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return f"{name}: not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub: unset it"
    if isinstance(error, RevisionNotFoundError):
        return f"{name}: the repository has no such revision, or the branch was never pushed: check its name"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name}: no model repository that you may read: check the name, and if it is private, {_LOG_IN}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{name}: not in the cache, and the Hub cannot be asked ({said}): try again when it can"
    if isinstance(error, EntryNotFoundError):
        return f"{name}: the repository lacks a file that is needed: check that it holds what you expect"
    if getattr(error, "response", None) is not None:
        return _explain_status(name, error.response)  # type: ignore[attr-defined]
    if "TimeoutException" in classes:
        return f"{name}: the Hub did not answer in time: try again, or set HF_HUB_DOWNLOAD_TIMEOUT (seconds) higher"
    if "ConnectError" in classes:
        return f"{name}: the Hub cannot be reached ({said}): check the network and HF_ENDPOINT"
    if isinstance(error, HTTPError) or "Consistency check" in said:
        return f"{name}: the transfer broke off ({said}): try again"
    return f"{name}: {said}: correct it and try again"


def _explain_status(name: str, response: Any) -> str:
    status = response.status_code
    if status == 401:
        return f"{name}: the Hub does not accept your token, or got none (401): {_LOG_IN}"
    if status == 403:
        return f"{name}: you may not do this (403): use a token that may write there, or a name of your own"
    if status in (409, 412):
        return f"{name}: somebody changed the repository at the same time ({status}): look at it and try again"
    if status == 429:
        wait = _seconds_to_wait(response)
        return f"{name}: the Hub was asked too often (429): try again {f'in {wait} seconds' if wait else 'later'}"
    if status >= 500:
        return f"{name}: the Hub has a problem of its own ({status}): try again later"
    said = response.headers.get("X-Error-Message") or response.reason_phrase
    return f"{name}: the Hub refused ({status} {said}): check the name and the files"


def _seconds_to_wait(response: Any) -> int:
    """What a Hub that was asked too often says of when to come back; 0 if nothing."""
    after = response.headers.get("Retry-After", "")
    window = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    return int(after) if after.isdigit() else int(window[1]) if window else 0
