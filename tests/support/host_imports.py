"""What the ranks of the host have imported before they start.

Importing torch and torchtitan takes seconds. One process does it and each rank is forked
from it. No thread of torch's runs here yet and no device is in use.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import tests.parity.gradients
import tests.support.train_jobs  # noqa: F401
from titan_moe_lb.upstream import cpu

cpu.use_host()
torch.set_num_threads(1)
