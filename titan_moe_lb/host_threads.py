"""How the threads of one process on the host wait for each other.

torch's OpenMP (libgomp, which comes with it) spins by default: beside other work the spinning
threads take the cores from those that they wait for. Measured with torch 2.14.1 on two cores
at a load of about ten (``python -m benchmarks.host_threads 12``), medians of a step: as torch
does 1.60 s and 1.52 CPU s, passive 0.81 s and 0.68 CPU s, GOMP_SPINCOUNT=10000 0.90 s and
0.81 CPU s, one thread 1.10 s and 0.66 CPU s.
"""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Before torch is imported, which reads it once. What the user has set stands."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
