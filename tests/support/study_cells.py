"""Cell of a study that takes a moment: it writes the trace of a run, and imports no torch.

python -m tests.support.study_cells [--seconds S] [--fail] [--nan] FLAGS --dump_folder=FOLDER
"""

from __future__ import annotations

import dataclasses
import sys
import time
import zlib
from pathlib import Path

import numpy as np

from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.traces.domain_trace import DomainLoad, DomainTraceWriter
from titan_moe_lb.traces.trace import TraceWriter

STEPS = 40


def main(arguments: list[str]) -> int:
    folder = Path(arguments[-1].removeprefix("--dump_folder="))
    with open(folder.parent / "starts", "a") as starts:
        starts.write(f"{folder.name}\n")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in arguments)
    time.sleep(float(options.get("seconds", 0)))
    if "fail" in options:
        print("titan_moe_lb: error: it was told to fail")
        return 2
    write(folder, seed=zlib.crc32(" ".join(arguments[:-1]).encode()), nan="nan" in options)
    return 0


def write(folder: Path, seed: int, nan: bool = False, skew: float = 1.0) -> None:
    """Write the files of a run."""
    info = run_info(expert_bias=None)
    trace, domains = TraceWriter(folder, info), DomainTraceWriter(folder, info)
    for step, load in enumerate(step_loads(info, STEPS, seed, skew), start=1):
        if nan and step > STEPS // 2:
            figures = load.step_columns | {"loss": float("nan")}
            load = dataclasses.replace(load, step_columns=figures)
        trace.write(step, load)
    counts_ME = np.full((len(info.layers), info.num_experts), 100)
    loads = {name: DomainLoad(loss=5 + seed % 7 / 10, counts_ME=counts_ME) for name in ("a", "b")}
    domains.write(STEPS, loads)
    trace.close()
    domains.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
