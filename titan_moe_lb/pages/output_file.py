"""The file that a page is written to: a new one, or an earlier page of ours, never another."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from titan_moe_lb.errors import JobError

MARK = '<meta name="generator" content="titan_moe_lb">'
"""Tag near the beginning of every page, by which :func:`check` recognises it."""

_HEAD_BYTES = 1024


def check(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Check before the long work that a page can be written there.

    Args:
        output: the file; a symlink means what it points to.
        inputs: files that the command reads.

    Raises:
        JobError: it is one of the inputs, a folder, a device, or a file that is not one of our
            pages; or nothing can be written there.
    """
    try:
        target = _target(output)
        if target.is_symlink():
            raise _refusal(output, "is a symlink that ends nowhere")
        if target.exists():
            if any(same.exists() and target.samefile(same) for same in inputs):
                raise _refusal(output, "is an input of this command")
            if target.is_dir():
                raise _refusal(output, "is a folder")
            if not target.is_file():
                raise _refusal(output, "is not a plain file")
            if not _is_page(target):
                raise _refusal(output, "exists and is not a page of titan_moe_lb")
        partial = _partial(target)
        partial.touch(exist_ok=False)
        partial.unlink()
    except OSError as error:
        raise _refusal(output, f"cannot be written ({error.strerror})") from None


def write(page: str, output: Path) -> None:
    """Write a page whole: who reloads it never sees half.

    Raises:
        JobError: as :func:`check`.
    """
    check(output)
    target = _target(output)
    partial = _partial(target)
    try:
        # A path in it may hold bytes that the locale does not know.
        with open(partial, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(page)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _refusal(output, f"cannot be written ({error.strerror})") from None


def _target(output: Path) -> Path:
    """Target of a symlink, which is replaced instead of the link."""
    return Path(os.path.realpath(output))


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


def _is_page(file: Path) -> bool:
    with open(file, "rb") as opened:
        return MARK.encode() in opened.read(_HEAD_BYTES)


def _refusal(output: Path, reason: str) -> JobError:
    return JobError(f"{output} {reason}: name another file with --output")
