"""The one exception for a user's mistake, which the commands print as a single line."""

from typing import Any


class InputError(ValueError):
    """Bad input from a user: the message names the value, the rule and the fix, in one line."""


def brief(value: Any) -> str:
    """A value for a message: one short line, whatever it is."""
    try:
        return repr(value)[:40]
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in lists in lists
        return "a huge number" if isinstance(value, int) else "a deep value"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or what kind it is, to quote in one of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
