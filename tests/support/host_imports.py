"""Imports and caches of the ranks of the host, made once before the ranks are forked.

Importing torch and torchtitan takes seconds, reading the first job half of one. No thread of torch
runs here yet, and no device is in use.
"""

import atexit
import gc
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import tests.parity.gradients
import tests.support.train_jobs  # noqa: F401
from titan_moe_lb.job import job_config
from titan_moe_lb.upstream import cpu

cpu.use_host()
torch.set_num_threads(1)
# torch replaces the thread pool of a forked process at its first use. Two first uses at once, by
# the threads of autograd, end the process with "Invalid thread pool!".
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
job_config.load(["--config=deepseek_v3_tiny"], 1)
gc.collect()
# Not to be traversed by a forked process, which would copy their pages.
gc.freeze()
atexit.register(gc.unfreeze)  # or Triton reports its frozen objects as leaks
