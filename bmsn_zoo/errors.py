"""The one exception for a user's mistake, which the commands print as a single line."""


class InputError(ValueError):
    """Bad input from a user: the message names the value, the rule and the fix, in one line."""
