"""A CRC-32 in every message of a trace, in metadata that other readers of Arrow ignore.

A message (the schema, a batch) is written with zeros in place of the digits, and they
are filled in after.
"""

from __future__ import annotations

import zlib

_PREFIX = b"crc32:"
KEY = b"checksum"
METADATA = {KEY: _PREFIX + b"00000000"}
"""Custom metadata to write a message with."""


def stamp(message: bytearray) -> None:
    """Fill in the digits of one encapsulated message."""
    digits = message.index(METADATA[KEY]) + len(_PREFIX)
    message[digits : digits + 8] = b"%08x" % zlib.crc32(message)


def is_intact(message: memoryview) -> bool:
    """The message is, byte for byte, what was stamped."""
    end_of_metadata = 8 + int.from_bytes(message[4:8], "little")
    head = bytearray(message[:end_of_metadata])
    digits = head.find(_PREFIX) + len(_PREFIX)
    carried = bytes(head[digits : digits + 8])
    head[digits : digits + 8] = b"0" * 8
    return carried == b"%08x" % zlib.crc32(message[end_of_metadata:], zlib.crc32(head))
