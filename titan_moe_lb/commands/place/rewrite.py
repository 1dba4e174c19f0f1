"""Copy of a checkpoint with moved tensors, compared with its source."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from titan_moe_lb.checkpoints import placement_file
from titan_moe_lb.commands.place.checkpoint_files import CheckpointFiles, Moves
from titan_moe_lb.errors import JobError


def rewrite(
    source: CheckpointFiles, folder: Path, moves: Moves, advance: Callable[[int], None]
) -> None:
    """Write a checkpoint with moved tensors, copy its other files, and compare the result.

    Args:
        source: checkpoint to copy.
        folder: an empty folder to write to.
        moves: source of each tensor that moves.
        advance: called with numbers of bytes; their sum is three times the size of the source.

    Raises:
        JobError: the copy differs from its source.
    """
    for path in source.folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name not in {*source.data_files, placement_file.FILE_NAME}:
            shutil.copy2(path, folder)
    source.write(folder, moves, advance)
    _compare(source, type(source)(folder), moves, advance)


def _compare(
    source: CheckpointFiles,
    target: CheckpointFiles,
    moves: Moves,
    advance: Callable[[int], None],
) -> None:
    """Compare every tensor of the target, row by row, with its source in ``moves``.

    Raises:
        JobError: a tensor or object differs.
    """
    same = target.tensors == source.tensors and target.objects == source.objects
    for name in (*source.tensors, *source.objects):
        other, order = moves.get(name, (name, None))
        if order is None:
            pairs: Iterable[tuple[bytes, bytes]] = [
                (_digest(target.whole(name), advance), _digest(source.whole(other), advance))
            ]
        else:
            pairs = (
                (
                    _digest([target.row(name, place)], advance),
                    _digest([source.row(other, expert)], advance),
                )
                for place, expert in enumerate(map(int, order))
            )
        same = same and all(mine == theirs for mine, theirs in pairs)
        if not same:
            raise JobError(
                f"{name} reads back otherwise than it was written: the disk or the memory of this "
                "machine is faulty; nothing of it is left"
            )


def _digest(pieces: Iterable, advance: Callable[[int], None]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
        advance(len(piece))
    return digest.digest()
