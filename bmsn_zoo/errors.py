"""The one exception for a user's mistake, which the commands print as a single line."""


class InputError(ValueError):
    """Bad input from a user: the message names the value, the rule and the fix, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to quote in one of ours."""
    return next(iter(str(error).strip().splitlines()), "")[:200]
