"""Balance and language-model loss of a small model with each balancing method.

    python -m benchmarks.balance_methods [--methods quantile default] [--folder FOLDER]

Trains the tiny DeepSeek-V3 with each method, one process each, for 200 steps of 16 sequences of 256
tokens. Prints the mean MaxVio, over layers and two windows of steps, and the language-model loss of
the last 20 steps. Finished runs in the folder are reused. ``noise`` is the sampling noise, not a
method: it continues the quantile run's weights of step 140 with learning rate 0, so the router does
not change.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.trace import read_trace

STEPS, EARLY, LATE = 200, (31, 80), (141, 200)


def method(bias: str, losses: str = "[]") -> list[str]:
    """Build the flags of a method from its bias rule and losses."""
    return [f"--model.expert_bias={bias}", f"--model.aux_losses={losses}"]


def sequence_wise(weight: str) -> str:
    """Build the value of ``model.aux_losses`` with one sequence-wise loss."""
    return f"[{{type = 'sequence_wise', weight = {weight}}}]"


QUANTILE, TREND = "{type = 'quantile'}", "{type = 'quantile_trend'}"
METHODS = {
    "none": method("none"),
    "sign": method("{type = 'sign'}"),
    "default": [],
    "global_batch 1e-2": method("none", "[{type = 'global_batch', weight = 1e-2}]"),
    "sequence_wise 1e-2": method("none", sequence_wise("1e-2")),
    "importance 1e-2": method("none", "[{type = 'importance', weight = 1e-2}]"),
    "entropy 1e-2": method("none", "[{type = 'entropy', weight = 1e-2}]"),
    "proportional 8e-3": method("{type = 'proportional', speed = 8e-3}"),
    "momentum": method("{type = 'momentum'}"),
    "quantile": method(QUANTILE),
    "quantile ema 0.5": method("{type = 'quantile', ema = 0.5}"),
    "quantile ema 0.9": method("{type = 'quantile', ema = 0.9}"),
    "quantile 8000 bins": method("{type = 'quantile', num_bins = 8000}"),
    "quantile_trend 0": method("{type = 'quantile_trend', trend_ema = 0.0}"),
    "quantile_trend": method(TREND),
    "quantile_trend 0.9": method("{type = 'quantile_trend', trend_ema = 0.9}"),
    "quantile_trend ema 0.5": method("{type = 'quantile_trend', ema = 0.5}"),
    "quantile + sequence_wise 1e-3": method(QUANTILE, sequence_wise("1e-3")),
    "quantile + sequence_wise 1e-2": method(QUANTILE, sequence_wise("1e-2")),
    "quantile_trend + sequence_wise 1e-3": method(TREND, sequence_wise("1e-3")),
    "quantile_trend + sequence_wise 1e-2": method(TREND, sequence_wise("1e-2")),
    "noise": method("{type = 'quantile', ema = 0.9}"),
}


@dataclass
class Arguments:
    """Flags of the benchmark."""

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Methods to run; default: all."""

    folder: Path = Path(tempfile.gettempdir()) / "balance_methods"
    """Folder of the runs."""

    seed: int = 1


def main() -> None:
    """Run the methods, and print the table."""
    arguments = tyro.cli(Arguments)
    print("| method | steps 31-80 | steps 141-200 | loss, steps 181-200 |\n|---|---|---|---|")
    for name in arguments.methods:
        run = arguments.folder / f"{name.replace(' ', '_')}-seed{arguments.seed}"
        if not (run / "done").exists():
            train(name, run, arguments)
        trace = read_trace(run)
        violation_S = max_violation(trace.counts_SME).mean(axis=1)
        windows = [
            violation_S[(trace.steps >= first) & (trace.steps <= last)].mean()
            for first, last in (EARLY, LATE)
        ]
        loss = np.mean(trace.step_columns["loss"][trace.steps > STEPS - 20])
        print(f"| {name} | {windows[0]:.2f} | {windows[1]:.3f} | {loss:.3f} |", flush=True)


def train(name: str, run: Path, arguments: Arguments) -> None:
    """Train one method in its own process and folder."""
    run.mkdir(parents=True, exist_ok=True)
    flags = ["--module=deepseek_v3", "--config=deepseek_v3_tiny", *METHODS[name]]
    flags += ["--training.seq_len=256", "--training.local_batch_size=16"]
    flags += [f"--training.steps={STEPS}", f"--debug.seed={arguments.seed}", f"--dump_folder={run}"]
    if name == "quantile":
        flags += ["--checkpoint.enable", "--checkpoint.interval=140"]
    if name == "noise":
        start = arguments.folder / f"quantile-seed{arguments.seed}" / "checkpoint" / "step-140"
        flags += ["--checkpoint.enable", "--checkpoint.interval=1000"]
        flags += [f"--checkpoint.initial_load_path={start}"]
        flags += ["--optimizer.param_groups.0.optimizer_kwargs.lr=0.0"]
    with open(run / "log", "w") as log:
        subprocess.run(
            [sys.executable, "-m", "titan_moe_lb.cli", "train", *flags],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    (run / "done").touch()


if __name__ == "__main__":
    main()
