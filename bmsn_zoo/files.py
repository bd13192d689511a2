"""Text, JSON and YAML files, in UTF-8 whatever the locale: written whole or not at all, read without trust."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from .errors import InputError, first_line

_MOST_BYTES = 256 << 20  # no file of ours comes near


def write_text(path: Path, text: str) -> None:
    """Write a file whole: readers see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole; not-a-number is an error."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_bytes(path: Path, shown: str = "") -> bytes:
    """What a file holds.

    Args:
        path: the file.
        shown: what messages call it; its path if empty.

    Raises:
        InputError: if it is missing, cannot be read, or is larger than anything of ours.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{shown or path} is larger than {_MOST_BYTES >> 20} MiB: it is no file of ours")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{shown or path} cannot be read: {first_line(error)}") from None


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
