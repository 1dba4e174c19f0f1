"""Is this forward the second of its kind?"""

from __future__ import annotations

import torch


def is_recomputation() -> bool:
    """True in a forward that eager activation checkpointing runs again in backward.

    Non-reentrant checkpointing recomputes from inside the autograd engine, where a
    graph task is current (torch.utils.checkpoint relies on the same fact). A
    compiled block needs no test: its forward graph alone holds the mutations of
    buffers.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
