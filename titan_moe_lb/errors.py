"""Exception for a user's mistake, and suggestions for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JobError(ValueError):
    """Error of a job that cannot run as written.

    The message is one line that names the setting and the remedy. The entry points print it
    without a traceback and exit with status 2.
    """


_MOST_LISTED = 40


def near(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the nearest valid name, or "" if none is near."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Suggest the nearest valid name; if none is near, all valid names or ``--help``."""
    valid = list(valid)
    if guess := near(name, valid):
        return guess.removeprefix("; ")
    if not valid:
        return "there is none"
    return f"valid: {', '.join(sorted(valid))}" if len(valid) <= _MOST_LISTED else "see --help"
