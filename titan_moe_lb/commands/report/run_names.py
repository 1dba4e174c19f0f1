"""Names of the runs of a page: a letter, and the distinct part of the path."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

MARKS = string.ascii_uppercase
"""Letters of the runs of a page, in order."""


def run_names(files: Sequence[Path]) -> list[str]:
    """Return the shortest part of each trace's path that no other path has.

    The names of ``exp1/outputs/moe_load.arrow`` and ``exp2/outputs/moe_load.arrow`` are ``exp1``
    and ``exp2``. A single run, or a run compared with itself, has the name of its folder.
    """
    paths = [file.resolve().parts for file in files]
    if len(set(paths)) == 1:
        return [paths[0][-2]] * len(paths)
    while len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    return [_shortest(path, [other for other in paths if other != path]) for path in paths]


def _shortest(path: tuple[str, ...], others: list[tuple[str, ...]]) -> str:
    tails = (path[-length:] for length in range(1, len(path) + 1))
    alone = next(tail for tail in tails if all(other[-len(tail) :] != tail for other in others))
    return "/".join(alone)
