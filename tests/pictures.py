"""Pictures take longer than the small runs of tests: their figures are made, but drawn only within `drawn()`."""

import contextlib

import pytest

from bmsn_zoo import report

_draw = report._save


def _leave_empty(figure, path):
    path.parent.mkdir(exist_ok=True)
    path.touch()


report._save = _leave_empty


@contextlib.contextmanager
def drawn():
    """Here pictures are what users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_save", _draw)
        yield
