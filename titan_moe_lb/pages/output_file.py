"""Output file of a page: a new file or an earlier page of titan_moe_lb, never any other file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from titan_moe_lb.errors import JobError

MARK = '<meta name="generator" content="titan_moe_lb">'
"""Tag near the start of every page, which :func:`check` looks for."""

_HEAD_BYTES = 1024


def check(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that a page can be written to a file, before the work starts.

    Args:
        output: the file; a symlink is followed.
        inputs: files that the command reads.

    Raises:
        JobError: the file is an input, a folder, a device, a broken symlink or no page of
            titan_moe_lb; or it cannot be written.
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
    """Write a page atomically, so that a reader never loads a part of it.

    Raises:
        JobError: as for :func:`check`.
    """
    check(output)
    target = _target(output)
    partial = _partial(target)
    try:
        # A path in the page may contain bytes that are not valid UTF-8.
        with open(partial, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(page)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _refusal(output, f"cannot be written ({error.strerror})") from None


def _target(output: Path) -> Path:
    """Follow symlinks, so that their target is replaced and not the link."""
    return Path(os.path.realpath(output))


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


def _is_page(file: Path) -> bool:
    with open(file, "rb") as opened:
        return MARK.encode() in opened.read(_HEAD_BYTES)


def _refusal(output: Path, reason: str) -> JobError:
    return JobError(f"{output} {reason}: name another file with --output")
