"""Code blocks of README.md, CONTRIBUTING.md and docs/, and their examples as modules.

An example is a fenced python block whose first line is ``# example: NAME``.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from titan_moe_lb.balancing.expert_bias.base import ExpertBias
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.telemetry.metrics import Metric

ROOT = Path(__file__).parents[2]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
# Each maps names to classes.
KINDS = (AuxLoss.kinds, ExpertBias.kinds, ForcedRouting.kinds, Metric.kinds)


@dataclass(frozen=True)
class Block:
    """Fenced block: its page, first line, language and text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def example(self) -> str | None:
        found = re.match(r"# example: (\w+)\n", self.text)
        return found[1] if found else None


def blocks() -> list[Block]:
    """Code blocks of all pages, in order."""
    found = []
    for path in PAGES:
        start: int | None = None
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.lstrip().startswith("```"):
                continue
            if start is None:
                start, language = number, line.strip().removeprefix("```")
            else:
                text = "".join(f"{inner}\n" for inner in lines[start : number - 1])
                found.append(Block(str(path.relative_to(ROOT)), start, language, text))
                start = None
        assert start is None, f"{path}: a block does not end"
    return found


def names() -> list[str]:
    """Names of the examples, in order."""
    return list(_examples())


@contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """Import the example as the module ``name``; remove it afterwards."""
    before = [dict(kinds) for kinds in KINDS]
    spec = importlib.util.spec_from_loader(name, _Loader(), origin=f"docs#{name}")
    assert spec is not None and spec.loader is not None and name not in sys.modules
    spec.has_location = True
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
        for kinds, earlier in zip(KINDS, before, strict=True):
            kinds.clear()
            kinds.update(earlier)


class _Loader(importlib.abc.InspectLoader):
    """Loader with source text, which ``--help`` reads."""

    def get_source(self, fullname: str) -> str:
        return _examples()[fullname]


def _examples() -> dict[str, str]:
    examples = [(block.example, block.text) for block in blocks() if block.example]
    assert len(dict(examples)) == len(examples), "two examples of one name"
    return dict(examples)
