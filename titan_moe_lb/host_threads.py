"""Wait policy of the OpenMP threads of a process on the host.

torch's OpenMP (libgomp, which comes with it) spins by default. On a busy machine, the spinning
threads take the cores from those that they wait for. Medians of a step, with torch 2.14.1 on two
cores at a load of about ten (``python -m benchmarks.host_threads 12``):

    torch's default        1.60 s  1.52 CPU s
    passive                0.81 s  0.68 CPU s
    GOMP_SPINCOUNT=10000   0.90 s  0.81 CPU s
    one thread             1.10 s  0.66 CPU s
"""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Set OMP_WAIT_POLICY to passive, unless it is set.

    Call this before torch is imported: libgomp reads the variable once, when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
