"""Result of a self-test, as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from titan_moe_lb.balancing.self_test.faults import Fault
from titan_moe_lb.balancing.self_test.measured import LayerMeasured, ModelMeasured

WIDTH = 130


@dataclass(frozen=True)
class SelfTest:
    """Measurements and faults of a model; ``print()`` shows the table."""

    measured: ModelMeasured
    faults: list[Fault]

    @property
    def acts(self) -> bool:
        """True if every loss and every bias acts."""
        return not self.faults

    def __str__(self) -> str:
        out = Console(width=WIDTH, file=io.StringIO(), no_color=True)
        self.show(out)
        return out.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def show(self, console: Console) -> None:
        """Print the table, and a line for each fault."""
        console.print(self._table())
        alike: dict[tuple[str, str, str], list[str]] = {}
        for fault in self.faults:
            layers = alike.setdefault((fault.part, fault.what, fault.remedy), [])
            layers += [] if fault.layer is None else [str(fault.layer)]
        for (part, what, remedy), layers in alike.items():
            where = f"layer {', '.join(layers)}, " if layers else ""
            line = f"{where}{part}: {what}; {remedy}"
            console.print(line, style="red", soft_wrap=True, highlight=False, markup=False)
        if self.acts:
            frozen = any(layer.frozen for layer in self.measured.layers)
            line = "every loss reaches its gate, and every bias acts"
            console.print(line + ", except what is frozen" * frozen, highlight=False)

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE)
        for name in ("layer", "part"):
            table.add_column(name)
        for name in ("gradient at the gate", "of the model's", "moved by", "read"):
            table.add_column(name, justify="right")
        table.add_column("verdict")
        for layer in self.measured.layers:
            self._add(table, layer)
            table.add_section()
        return table

    def _add(self, table: Table, layer: LayerMeasured) -> None:
        number = str(layer.layer)
        off = "losses" in layer.frozen
        state = "frozen" if "gate" in layer.frozen else ""
        gate = self._verdict(layer, "gate") or state or "acts"
        table.add_row(number, "gate, the model", f"{layer.main_norm:.2e}", "", "", "", gate)
        for loss in layer.losses:
            verdict = self._verdict(layer, loss.name) or ("off" if off else "acts")
            numbers = ("", "") if off else (f"{loss.norm:.2e}", f"{loss.share:.1e}")
            table.add_row(number, f"{loss.name} {loss.weight:g}", *numbers, "", "", verdict)
        bias = layer.bias
        if bias is not None or layer.wrong_dtypes:
            verdict = self._verdict(layer, "bias") or ("acts" if bias and bias.moves else "frozen")
            name = f"bias, {bias.rule}" if bias else "bias"
            moved = f"{bias.delta:.1e}" if bias else ""
            read = ("yes" if bias.reads else "no") if bias else ""
            table.add_row(number, name, "", "", moved, read, verdict)

    def _verdict(self, layer: LayerMeasured, part: str) -> str:
        """Return the kinds of the faults of a part, in words."""
        kinds = [one.kind for one in self.faults if (one.layer, one.part) == (layer.layer, part)]
        return ", ".join(kind.replace("_", " ") for kind in kinds)
