"""All GPU measurements and tests of this package, in one command.

    python -m benchmarks.gpu [--quick] [--output gpu]

Writes ``gpu.json`` and ``gpu.html``, within eight minutes. Without a GPU, some parts run on the host and
the others are reported as skipped. The first part needs torch alone; without torchtitan the others are
skipped, too. If a part fails, the others still run, and the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
import tyro

LAYOUTS = (
    "ac=full",
    "accumulate=2,compile=true",
    "dp_shard=2,ep=2",
    "pp=2,schedule=ZBVZeroBubble",
    "tp=2,ep=2",
    "cp=2",
    "dp_shard=4,ep=4",
    "pp=2,schedule=Interleaved1F1B,dp_shard=2,accumulate=2,ac=full",
    "dp_shard=8,ep=8",
)
"""Layouts of the parity tests over NCCL. A layout with more ranks than GPUs is skipped."""
LIMIT_SECONDS = 460.0
"""Time of all parts together, which leaves some of the eight minutes to start and to write."""
_SHOWN = 4000
"""Most characters of a part's output that the page shows."""


@dataclass
class Arguments:
    """Flags of the benchmark."""

    output: Path = Path("gpu")
    """Path of both files, without suffix."""
    quick: bool = False
    """Use few repeats, to check that every part runs."""


@dataclass
class Part:
    """One measurement or test, in its own process."""

    name: str
    command: list[str]
    needs_gpus: int = 0
    needs_torchtitan: bool = True
    outcome: str = ""
    """"passed", "failed", "stopped", or the reason why it was skipped."""
    seconds: float = 0.0
    results: list[Any] = field(default_factory=list)
    """Parsed lines of JSON from its output."""
    said: str = ""
    """End of its other output."""

    def run(self, gpus: int, seconds_left: float) -> None:
        """Run the part and store its results; skip it if something that it needs is missing.

        It is stopped after ``seconds_left``.
        """
        if gpus < self.needs_gpus:
            self.outcome = f"skipped: needs {self.needs_gpus} GPU(s), {gpus} are here"
            return
        if self.needs_torchtitan and importlib.util.find_spec("torchtitan") is None:
            self.outcome = "skipped: torchtitan is not installed"
            return
        if seconds_left <= 0:
            self.outcome = "skipped: no time is left"
            return
        begun = time.monotonic()
        try:
            ended = subprocess.run(
                [sys.executable, "-m", *self.command],
                capture_output=True,
                text=True,
                timeout=seconds_left,
            )
        except subprocess.TimeoutExpired:
            self.seconds = time.monotonic() - begun
            self.outcome = f"stopped after {self.seconds:.0f} s"
            return
        self.seconds = time.monotonic() - begun
        self.outcome = "failed" if ended.returncode else "passed"
        rest = []
        for line in ended.stdout.splitlines():
            try:
                self.results.append(json.loads(line if line.startswith("{") else ""))
            except json.JSONDecodeError:
                rest.append(line)
        errors = ended.stderr.splitlines() if ended.returncode else []
        self.said = "\n".join([*rest, *errors])[-_SHOWN:]


def parts(quick: bool, gpus: int) -> list[Part]:
    """List all parts, including those that this machine cannot run."""
    device = "cuda" if gpus else "cpu"
    few = quick or not gpus
    graph = "tests/telemetry/test_telemetry.py::test_a_cuda_graph_records_in_every_replay"
    repeats, steps = ("2", "2") if few else ("50", "30")
    tiny = ["--tokens", "256", "--experts", "16", "--top-k", "2", "--layers", "4"]
    return [
        Part(
            "loss, record, step end and graph replay, torch alone",
            ["benchmarks.torch_alone", "--device", device, "--repeats", repeats]
            + (tiny if few else []),
            needs_torchtitan=False,
        ),
        Part("a CUDA graph records in every replay", ["pytest", "--device=cuda", graph], 1),
        Part(
            "cost of a loss, and its share of the bandwidth bound",
            ["benchmarks.aux_loss", "--device", device, "--repeats", repeats]
            + (["--dim", "64"] if few else []),
        ),
        Part(
            "operators and host time of a router",
            ["benchmarks.router_cost", "--repeats", "20" if few else "2000"],
        ),
        *(
            Part(
                f"cost of the {of} in a step",
                ["benchmarks.step_overhead", "--of", of, "--steps", steps]
                + (["--config", "deepseek_v3_tiny"] if few else []),
            )
            for of in ("losses", "telemetry")
        ),
        *(
            Part(
                f"gradient over NCCL: {layout}",
                [
                    "tests.parity",
                    "--layout",
                    layout,
                    "--device",
                    "cuda",
                    "--loss",
                    "sequence_wise,z_loss",
                ],
                _ranks(layout),
            )
            for layout in LAYOUTS
        ),
    ]


def _ranks(layout: str) -> int:
    degrees = dict(word.split("=") for word in layout.split(","))
    ranks = 1
    for name in ("pp", "dp_shard", "dp_replicate", "tp", "cp"):
        ranks *= int(degrees.get(name, 1))
    return ranks


def machine() -> dict[str, Any]:
    """Describe the machine of the measurements."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


_PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>titan_moe_lb on a GPU</title>
<style>body {font: 15px/1.5 system-ui; max-width: 60em; margin: 2em auto; padding: 0 1em}
pre {overflow-x: auto; background: #8881; padding: .5em} td {padding-right: 2em}</style>
<h1>titan_moe_lb on {{ machine.gpus | join(", ") or "the host: no GPU is here" }}</h1>
<p>torch {{ machine.torch }}, CUDA {{ machine.cuda or "none" }}</p>
<table>{% for part in parts %}
<tr><td>{{ part.name }}</td><td>{{ part.outcome }}</td></tr>{% endfor %}
</table>
{% for part in parts if part.results or part.said %}
<h2>{{ part.name }}</h2>
<p>{{ part.command | join(" ") }}: {{ part.outcome }} in {{ "%.0f" | format(part.seconds) }} s</p>
{% for result in part.results %}<pre>{{ result | tojson(indent=1) }}</pre>{% endfor %}
{% if part.said %}<pre>{{ part.said }}</pre>{% endif %}{% endfor %}
</html>
""",
    autoescape=True,
)


def main() -> None:
    """Run all parts, and write both files."""
    arguments = tyro.cli(Arguments)
    here = machine()
    tried = parts(arguments.quick, len(here["gpus"]))
    end = time.monotonic() + LIMIT_SECONDS
    for part in tried:
        part.run(len(here["gpus"]), end - time.monotonic())
        print(f"{part.outcome:44} {part.name}", flush=True)
    tables = [dataclasses.asdict(part) for part in tried]
    json_file, page = (arguments.output.with_suffix(end) for end in (".json", ".html"))
    json_file.write_text(json.dumps({"machine": here, "parts": tables}, indent=2) + "\n")
    page.write_text(_PAGE.render(machine=here, parts=tables), encoding="utf-8")
    print(f"{json_file} and {page}")
    sys.exit(any(part.outcome == "failed" for part in tried))


if __name__ == "__main__":
    main()
