"""A wrong command line in one line: tyro answers it with a box of many."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from titan_moe_lb.errors import JobError, near, nearest

_KINDS = {
    "INT": "an integer",
    "FLOAT": "a number",
    "FLOAT|INT": "a number",
    "{None}|INT": "an integer or None",
    "{None}|FLOAT": "a number or None",
    "[INT [INT ...]]": "integers",
    "[FLOAT [FLOAT ...]]": "numbers",
}


@contextlib.contextmanager
def in_one_line(
    arguments: Sequence[str],
    valid: Callable[[], Iterable[str]],
    elsewhere: Callable[[str], str | None] = lambda flag: None,
) -> Iterator[None]:
    """While tyro reads a command line: what it refuses is a ``JobError``.

    Args:
        arguments: the command line.
        valid: every flag and name that may stand in it.
        elsewhere: where an unknown flag belongs, if that is known.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        raise JobError(
            _sentence(_in_box(said.getvalue()), list(arguments), list(valid()), elsewhere)
        ) from None
    sys.stderr.write(said.getvalue())


def _in_box(said: str) -> list[str]:
    """The lines in tyro's box: drawn in colour on a terminal, and without Unicode as a title
    over dashes."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", said).splitlines()
    lines = iter([line.strip("│ ") for line in plain])
    for line in lines:
        if line.startswith("╭") or (line and not line.strip("-")):
            break
    return list(lines)


def _sentence(box: list[str], arguments: list[str], valid: list[str], elsewhere) -> str:
    """The lines in the box, as one that names what the user typed."""
    lines = list(itertools.takewhile(lambda line: line.strip("─-"), box))
    text = " ".join(lines)
    if found := re.match(r"Unrecognized options: ([^\s,]+)", text):
        return _unknown(found[1], arguments, valid, elsewhere)
    names = {_plain(name) for name in valid}
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
        if argument.startswith("--") and _plain(argument) not in names:
            return _unknown(argument, arguments, valid, elsewhere)
    if text.startswith("Missing from "):
        return (
            f"{lines[1].split()[0]} is missing: {' '.join(lines[2:]).removesuffix(' (required)')}"
        )
    if text.startswith("Expected one of "):
        return f"a command is missing; {nearest('', valid)}"
    if found := re.match(r"Missing value for argument '(.*?)'", text):
        return f"{_as_typed(found[1], arguments)} needs a value"
    if found := re.match(r"invalid choice '(.*?)' for argument '(.*?)'.*?\((.*?),?\)", text):
        value, flag, choices = found.groups()
        guess = near(value, re.findall(r"'(.*?)'", choices))
        return f"{_as_typed(flag, arguments)} is {value!r}; it must be one of {choices}{guess}"
    if found := re.match(r"Error parsing (--\S+): (.*)", text):
        flag, reason = found.groups()
        value = " ".join(re.findall(r"'([^']*)'", reason))
        kinds = [line[len(flag) :].strip() for line in box[1:] if line.startswith(f"{flag} ")]
        kind = "".join(kinds[:1])
        return f"{_as_typed(flag, arguments)} is {value!r}; it must be {_KINDS.get(kind, kind)}"
    return text.removeprefix("Error parsing ").removeprefix("Config: ")


def _unknown(token: str, arguments: list[str], valid: list[str], elsewhere) -> str:
    flag = token.partition("=")[0]
    if flag.startswith("-"):
        return f"there is no flag {flag}; {elsewhere(flag) or nearest(flag, valid)}"
    names = {_plain(name) for name in valid}
    for before, argument in itertools.pairwise(["", *arguments]):
        switch = argument.removesuffix(f"={token}") if argument != token else before
        if switch != argument and _plain(_no(switch)) in names:
            return f"{switch} takes no value, not even {token!r}: its opposite is {_no(switch)}"
    words = [name for name in valid if not name.startswith("-")]
    remedy = nearest(token, words) if words == valid or ":" in token else "a flag begins with --"
    return f"{token!r} is not expected here; {remedy}"


def _no(switch: str) -> str:
    """The flag that turns a switch off: --a.no-b of --a.b."""
    section, dot, name = switch.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{name}"


def _plain(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def _as_typed(flag: str, arguments: list[str]) -> str:
    """In the user's own spelling, _ or -."""
    typed = (argument.partition("=")[0] for argument in arguments)
    return next((name for name in typed if _plain(name) == flag), flag)
