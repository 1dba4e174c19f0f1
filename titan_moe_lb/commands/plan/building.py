"""This process while it builds models that nobody runs."""

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
    """Ready for torchtitan, silent about the ranks that are built, and all put back after."""
    from titan_moe_lb.upstream import cpu

    cpu.prepare()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # Copying pipeline stages makes millions of objects and no garbage: a quarter of the time.
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
    """A line now and then on standard error while it lasts."""
    return Heartbeat(
        lambda line: print(line, file=sys.stderr), lambda seconds: f"{doing}: {seconds} s so far"
    )
