"""The examples of docs/extending.md as modules.

An example is a fenced python block whose first line is ``# example: NAME``.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from titan_moe_lb.expert_bias.base import ExpertBias
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses import AuxLoss
from titan_moe_lb.telemetry.metric import Metric

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
# Where a class with a name of its own enters itself.
KINDS = (AuxLoss.kinds, ExpertBias.kinds, ForcedRouting.kinds, Metric.kinds)


def names() -> list[str]:
    """Every example of the page, in order."""
    return list(_examples())


@contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """The example as the module ``name``, as if it were a file; gone again afterwards."""
    before = [dict(kinds) for kinds in KINDS]
    spec = importlib.util.spec_from_loader(name, _Loader(), origin=f"{PAGE.name}#{name}")
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
    """Gives the text too, for what ``--help`` reads of a class."""

    def get_source(self, fullname: str) -> str:
        return _examples()[fullname]


def _examples() -> dict[str, str]:
    blocks = re.findall(
        r"^```python\n# example: (\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(dict(blocks)) == len(blocks), "two examples of one name"
    return dict(blocks)
