"""The one exception that a user's own mistake raises, and the remedy of a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JobError(ValueError):
    """A job that cannot run as written.

    The message is one line that names the setting and the remedy; the entry
    points print it without a traceback and exit with status 2.
    """


_MOST_LISTED = 40


def near(name: str, valid: Iterable[str]) -> str:
    """What follows a list of the valid names: the nearest one, if one is near."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy of a misspelt name: the nearest valid one, or all of them if they are few."""
    valid = list(valid)
    if guess := near(name, valid):
        return guess.removeprefix("; ")
    if not valid:
        return "there is none"
    return f"valid: {', '.join(sorted(valid))}" if len(valid) <= _MOST_LISTED else "see --help"
