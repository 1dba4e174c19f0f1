"""Import before torchtitan: this process computes on the host, and only ranks may have GPUs."""

from __future__ import annotations

import os

import torch

from titan_moe_lb.upstream import cpu

_everyone = ",".join(map(str, range(torch.cuda.device_count())))
GPUS = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", _everyone).split(",") if gpu]
"""Ids of the GPUs that are here, as ``CUDA_VISIBLE_DEVICES`` lists them."""

os.environ["CUDA_VISIBLE_DEVICES"] = ""
if cpu.needed():
    cpu.use_host()
