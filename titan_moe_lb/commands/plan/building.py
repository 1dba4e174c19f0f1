"""Setup of this process while it builds models on the meta device."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from titan_moe_lb.terminal.heartbeat import Heartbeat


@contextmanager
def silent_build() -> Iterator[None]:
    """Prepare torchtitan, silence its logs and warnings, and restore both afterwards."""
    from titan_moe_lb.upstream import cpu

    cpu.prepare()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # Copies of pipeline stages are millions of objects without garbage; collecting them would
    # take a quarter of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collecting:
            gc.enable()
        logging.disable(level)


def heartbeat(doing: str) -> Heartbeat:
    """Return a context that prints progress lines to standard error."""
    return Heartbeat(
        lambda line: print(line, file=sys.stderr), lambda seconds: f"{doing}: {seconds} s so far"
    )
