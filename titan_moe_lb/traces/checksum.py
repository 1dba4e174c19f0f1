"""CRC-32 of every message of a trace, in metadata that other Arrow readers ignore.

The writer writes a message (the schema or a batch) with zeros in place of the
checksum's digits. :func:`stamp` then fills in the digits.
"""

from __future__ import annotations

import zlib

_PREFIX = b"crc32:"
KEY = b"checksum"
METADATA = {KEY: _PREFIX + b"00000000"}
"""Custom metadata of a message before :func:`stamp`."""


def stamp(message: bytearray) -> None:
    """Fill in the digits of one encapsulated Arrow message."""
    digits = message.index(METADATA[KEY]) + len(_PREFIX)
    message[digits : digits + 8] = b"%08x" % zlib.crc32(message)


def is_intact(message: memoryview) -> bool:
    """Return True if no byte of the message has changed since :func:`stamp`."""
    end_of_metadata = 8 + int.from_bytes(message[4:8], "little")
    head = bytearray(message[:end_of_metadata])
    digits = head.find(_PREFIX) + len(_PREFIX)
    carried = bytes(head[digits : digits + 8])
    head[digits : digits + 8] = b"0" * 8
    return carried == b"%08x" % zlib.crc32(message[end_of_metadata:], zlib.crc32(head))
