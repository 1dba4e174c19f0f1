"""Contents of TensorBoard's event file and of W&B's offline log: metric to step to value."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    (events,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {
        name: {event.step: event.value for event in accumulator.Scalars(name)}
        for name in accumulator.Tags()["scalars"]
    }


def wandb(folder: Path) -> dict[str, dict[int, float]]:
    (path,) = folder.rglob("run-*.wandb")
    found: dict[str, dict[int, float]] = {}
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, {})[record.history.step.num] = json.loads(item.value_json)
    return found


def _records(log: bytes) -> Iterator[bytes]:
    """Read the records of an offline run: seven bytes, then LevelDB's log format in blocks of 32
    KiB."""
    block, header, last_pieces = 32768, struct.Struct("<IHB"), (1, 4)
    position, record = 7, b""
    while position + header.size <= len(log):
        left = block - position % block
        if left < header.size:
            position += left
            continue
        _checksum, length, kind = header.unpack_from(log, position)
        position += header.size
        record += log[position : position + length]
        position += length
        if kind in last_pieces:
            yield record
            record = b""
