"""The command ``titan-moe-lb watch``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from titan_moe_lb.commands.watch.follower import Follower, in_words
from titan_moe_lb.commands.watch.frame import MOST_FINDINGS, frame
from titan_moe_lb.commands.watch.glyphs import glyphs_of
from titan_moe_lb.commands.watch.keyboard import keyboard
from titan_moe_lb.traces.trace import trace_file

SECONDS_BETWEEN_LOOKS = 0.5
_ROWS_BESIDE_LAYERS = 11 + MOST_FINDINGS


def watch(run_dir: Path, once: bool = False, console: Console | None = None) -> None:
    """Follow a run until ``q`` is pressed, or until interrupted.

    The run may not exist yet. ``once`` prints one frame; a console that is no terminal, or a dumb
    one, implies it.

    Raises:
        JobError: the file is no trace; or, with ``once``, there is no trace or no whole step.
    """
    console = console or Console()
    follower, glyphs = Follower(run_dir), glyphs_of(console)
    if once or not console.is_terminal or console.is_dumb_terminal:
        follower.look(must_exist=True)
        console.print(frame(follower, console.width, glyphs=glyphs))
        return
    waiting = Text(glyphs.inert(f"waiting for {trace_file(run_dir)}"))
    shown: object = None
    with keyboard() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        hint = Text("q quits" if keys.is_there else "Ctrl-C quits", style="dim")
        started = False
        while True:
            started |= follower.look()
            # Draw again for a new step, another size of the terminal, or another age of the step.
            now = (
                console.size,
                started and (follower.written, follower.ended, in_words(follower.age())),
            )
            if now != shown:
                shown = now
                rows = max(1, console.height - _ROWS_BESIDE_LAYERS)
                picture = frame(follower, console.width, rows, glyphs) if started else waiting
                live.update(Group(picture, hint), refresh=True)
            if "q" in keys.pressed(SECONDS_BETWEEN_LOOKS):
                return
