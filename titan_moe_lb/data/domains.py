"""Two domains of text that come with Python, English and code, each with a held-out part.

English is Python's reference (``pydoc_data.topics``) and the docstrings of the standard library;
code is every third of its modules without docstrings. A checksum of the names holds a sixteenth of
the topics and modules out for validation, so that a module's docstrings and code are on the same
side. Documents are cut at line ends into pieces of about 2,000 characters, in a fixed order that
mixes the domains.

Compare numbers of one version of Python alone: another brings other texts. 3.11.7 has 1.25 million
characters of English and 1.16 million of code to train on.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
import re
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

from titan_moe_lb.data.loaders import register

MIXED = "python_mixed"
"""Name of the dataset to train on in ``[dataloader] dataset``."""

DOMAINS = ("english", "code")

_PIECE = 2000
_DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(.*?)"""', re.DOTALL | re.MULTILINE)


def held_out(domain: str) -> str:
    """Name of the validation dataset of a domain."""
    return f"python_{domain}_held_out"


def pieces(domain: str, *, validation: bool) -> list[str]:
    """Texts of a domain of about 2,000 characters, in the order of their documents."""
    return [
        piece
        for name, kind, text in _documents()
        if kind == domain and (zlib.crc32(name.encode()) % 16 == 0) == validation
        for piece in _cut(text)
    ]


@functools.cache
def _documents() -> tuple[tuple[str, str, str], ...]:
    """Name, domain and text of every document."""
    topics = pydoc_data.topics.topics
    found = [(name, "english", topics[name]) for name in sorted(topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        docstrings = [textwrap.dedent(text).strip() for text in _DOCSTRING.findall(source)]
        found.append((path.stem, "english", "\n\n".join(docstrings)))
        if zlib.crc32(path.stem.encode()) % 3 == 0:
            found.append((path.stem, "code", _DOCSTRING.sub("", source)))
    return tuple(found)


def _cut(text: str) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if size:
        yield "".join(piece)


def _mixed() -> list[str]:
    texts = [text for domain in DOMAINS for text in pieces(domain, validation=False)]
    # An order without a random number generator: none of its versions can change it.
    return sorted(texts, key=lambda text: zlib.crc32(text.encode()))


register(MIXED, _mixed)
for _domain in DOMAINS:
    register(held_out(_domain), functools.partial(pieces, _domain, validation=True))
