"""What the ranks of the host have imported before they start.

Importing torch and torchtitan takes seconds. One process does it and each rank is forked
from it. No thread of torch's runs here yet and no device is in use.
"""

import gc
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")

from titan_moe_lb.upstream import cpu

cpu.use_host()

import torch  # noqa: E402

import tests.parity.gradients  # noqa: E402
import tests.train_jobs  # noqa: E402, F401

torch.set_num_threads(1)
# What the imports made stays, and need not be looked through by each rank.
gc.freeze()
