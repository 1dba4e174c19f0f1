"""Names of layers in messages."""

from __future__ import annotations

import re


def layer_name(fqn: str) -> str:
    """Convert ``model_spec.model.layers.1.moe``, as in a ``Trainer.Config``, to ``layer 1``."""
    layer = re.search(r"(?:^|\.)(mtp_)?layers\.(\d+)(?:\.|$)", fqn)
    if layer is None:
        return fqn.removeprefix("model_spec.model.")
    return f"{'multi-token-prediction ' if layer[1] else ''}layer {layer[2]}"
