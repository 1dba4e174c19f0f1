"""Two domains of text that come with Python, English and code, each with a held-out part.

English is Python's reference (``pydoc_data.topics``) and the docstrings of the standard library.
Code is every third module of the standard library, without docstrings. A checksum of the names
holds out one sixteenth of the topics and modules for validation. So a module's docstrings and code
are on the same side. Documents are cut at line ends into pieces of about 2,000 characters. The
order of the pieces is fixed and mixes the domains.

Compare results of one version of Python only, because each version contains other texts. Python
3.11.7 has 1.25 million characters of English and 1.16 million of code to train on.
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
    """Return the name of a domain's validation dataset."""
    return f"python_{domain}_held_out"


def pieces(domain: str, *, validation: bool) -> list[str]:
    """Return the texts of a domain, of about 2,000 characters each, in the order of documents."""
    return [
        piece
        for name, kind, text in _documents()
        if kind == domain and (zlib.crc32(name.encode()) % 16 == 0) == validation
        for piece in _cut(text)
    ]


@functools.cache
def _documents() -> tuple[tuple[str, str, str], ...]:
    """Return name, domain and text of every document."""
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
    # A shuffle by checksums: it does not depend on the version of a random number generator.
    return sorted(texts, key=lambda text: zlib.crc32(text.encode()))


register(MIXED, _mixed)
for _domain in DOMAINS:
    register(held_out(_domain), functools.partial(pieces, _domain, validation=True))
