"""Text, CSV, JSON and YAML files, in UTF-8 whatever the locale: written whole or not at all, read without trust."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from .errors import InputError


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file whole: readers see the old content or the new, never a part; with `sync` after a power cut too.

    Its folder is made if needed.

    Raises:
        OSError: if the disk is full, or nothing may be written there; it names the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write text whole, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any, sync: bool = True) -> None:
    """Write JSON whole; not-a-number is an error."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(), sync)


@contextmanager
def one_line(shown: object, problem: str) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one `InputError`: there is no end to what it may be."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # KeyError for "!!bool x" in YAML, say
        said = getattr(error, "strerror", None) or str(error)  # an OSError's own text names the path once more
        reason = " ".join(str(said).split())[:300] or type(error).__name__
        raise InputError(f"{shown} {problem}: {reason}") from None


def read_bytes(path: Path, shown: str = "", most: int = 256 << 20) -> bytes:
    """What a file holds; messages call it `shown`, or by its path.

    Raises:
        InputError: if it is missing, cannot be read, or is larger than `most` bytes, which no file of ours is.
    """
    with one_line(shown or path, "cannot be read"):
        if path.stat().st_size > most:
            raise InputError(f"{shown or path} is larger than {most >> 10} KiB: it is no file of ours")
        return path.read_bytes()


def read_text(path: Path) -> str:
    """Read text.

    Raises:
        InputError: if the file cannot be read, or is not UTF-8.
    """
    with one_line(path, "is not UTF-8 text"):
        return read_bytes(path).decode()


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: if the file is missing, damaged, too deep, or holds what JSON has no word for (NaN).
    """
    with one_line(path, "cannot be read"):
        return from_json(read_bytes(path), allow_inf_nan=False)


def read_yaml(path: Path, shown: str) -> Any:
    """Read YAML, which messages call `shown`, without what lets a small file take long: deep nesting, and aliases.

    Raises:
        InputError: if the file is missing, or no such YAML.
    """
    text, level = read_bytes(path, shown, 64 << 10), 0
    with one_line(shown, "is not valid YAML"):
        for event in yaml.parse(text.decode(), yaml.SafeLoader):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > 16 or isinstance(event, yaml.AliasEvent):
                raise ValueError("it nests deeply, or has aliases")
        return yaml.safe_load(text.decode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table whole or not at all; its columns are those of the first row."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
