"""Text, JSON and YAML files, in UTF-8 whatever the locale: written whole or not at all, read without trust."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from .errors import InputError, first_line

_MOST_BYTES, _MOST_YAML = 256 << 20, 64 << 10  # no file of ours comes near
_MOST_LEVELS = 16


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole, down to the disk: readers see the old content or the new, never a part.

    Raises:
        OSError: if the disk is full, or nothing may be written there; it names the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":  # the name too
            home = os.open(path.parent, os.O_RDONLY)
            os.fsync(home)
            os.close(home)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write text whole, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole; not-a-number is an error."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_bytes(path: Path, shown: str = "", most: int = _MOST_BYTES) -> bytes:
    """What a file holds.

    Args:
        path: the file.
        shown: what messages call it; its path if empty.
        most: bytes that it may have.

    Raises:
        InputError: if it is missing, cannot be read, or is larger than anything of ours.
    """
    try:
        if path.stat().st_size > most:
            raise InputError(f"{shown or path} is larger than {most >> 10} KiB: it is no file of ours")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{shown or path} cannot be read: {first_line(error)}") from None


def read_text(path: Path) -> str:
    """Read text.

    Raises:
        InputError: if the file cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {first_line(error)}") from None


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: if the file is missing, damaged, too deep, or holds what JSON has no word for (NaN).
    """
    try:
        return from_json(read_bytes(path), allow_inf_nan=False)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def read_yaml(path: Path, shown: str) -> Any:
    """Read YAML, without the features that let a small file take long: deep nesting, and aliases of aliases.

    Args:
        path: the file.
        shown: what messages call it.

    Raises:
        InputError: if the file is missing, or no such YAML.
    """
    content, level = read_bytes(path, shown, _MOST_YAML), 0
    try:
        text = content.decode()
        for event in yaml.parse(text, yaml.SafeLoader):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > _MOST_LEVELS or isinstance(event, yaml.AliasEvent):
                raise ValueError("it nests deeply, or has aliases")
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets others through too, such as KeyError for "!!bool x"
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{shown} is not valid YAML: {reason or type(error).__name__}") from None
