"""C++ compiler that ``torch.compile`` needs on the host."""

from __future__ import annotations

import os
import shlex
import shutil

import torch

from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job

REMEDY = "install one (apt-get install g++), or name it in CXX"


def cpp_compiler() -> str | None:
    """Return the path of the compiler that inductor would start; None if it is missing."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return shutil.which(words[0])


def compiler_is_here(job: Job) -> None:
    """Check that a C++ compiler is installed if inductor compiles for the host."""
    on_host = torch.accelerator.current_accelerator(check_available=True) is None
    compiled = job.config.compile.enable and job.config.compile.backend == "inductor"
    if compiled and on_host and cpp_compiler() is None:
        raise JobError(
            f"compile.enable needs a C++ compiler on the host, and none is here: {REMEDY}"
        )
