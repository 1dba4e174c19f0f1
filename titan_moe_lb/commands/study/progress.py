"""Progress of a running study: a bar on a terminal, and a line for each cell that ends."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from titan_moe_lb.commands.study.cell import CellFolder, Record


class Display:
    """Progress display of one start of a study."""

    def __init__(self, total: int) -> None:
        """Start the display of a study with so many cells."""
        self._total = total
        self._known = self._ended = 0
        self._running: list[str] = []
        console = Console()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            # A cell takes minutes, so estimate the speed from all ended cells.
            speed_estimate_period=1e9,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def close(self) -> None:
        """Stop the bar."""
        self._bar.stop()

    def known(self) -> None:
        """Count a cell that ended in an earlier start."""
        self._known += 1
        self._show()

    def began(self, folder: CellFolder) -> None:
        """Show a cell as running."""
        if self._known and not self._ended and not self._running:
            self._bar.console.print(f"{self._known} of {self._total} cells have been run before")
        self._running.append(folder.cell.name)
        self._show()

    def ended(self, folder: CellFolder, record: Record) -> None:
        """Count a cell as ended and print its outcome."""
        self._ended += 1
        self._running.remove(folder.cell.name)
        self._show()
        outcome = {
            "done": f"{record.seconds:.0f} s",
            "diverged": "its loss is not a number",
            "failed": f"failed: {record.error} ({folder.log})",
        }[record.status]
        line = f"{self._known + self._ended}/{self._total} {folder.cell.name}: {outcome}"
        self._bar.console.print(line, markup=False, highlight=False)

    def _show(self) -> None:
        self._bar.update(
            self._task,
            description=", ".join(self._running) or "all have ended",
            completed=self._ended,
            total=self._total - self._known,
        )
