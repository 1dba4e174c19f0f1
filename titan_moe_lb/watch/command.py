"""``titan-moe-lb watch``."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from titan_moe_lb.traces.trace import trace_file
from titan_moe_lb.watch.follower import Follower
from titan_moe_lb.watch.frame import frame

SECONDS_BETWEEN_LOOKS = 0.5
_ROWS_BESIDE_LAYERS = 10


def watch(run_dir: Path, once: bool = False, console: Console | None = None) -> None:
    """Follow a run until interrupted.

    Args:
        run_dir: folder of the run, or its trace; it may not exist yet.
        once: print one frame and return; also done where the output is not a terminal.
        console: to draw on; default: the standard output.

    Raises:
        JobError: what is there is not a trace; with ``once``, also where nothing is there.
    """
    console = console or Console()
    follower = Follower(run_dir)
    if once or not console.is_terminal:
        follower.look(must_exist=True)
        console.print(frame(follower, console.width))
        return
    waiting = Text(f"waiting for {trace_file(run_dir)}")
    with Live(waiting, console=console, auto_refresh=False) as live:
        while True:
            if follower.look():
                rows = max(1, console.height - _ROWS_BESIDE_LAYERS)
                live.update(frame(follower, console.width, most_layers=rows), refresh=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)
