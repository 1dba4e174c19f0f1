"""MoE layers of a config by name, their numbers in the whole model, and their names in messages."""

from __future__ import annotations

import re
from typing import Any

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE


def moe_layers(config: Any) -> dict[str, MoE.Config]:
    """Find the MoE layers of a model config or a ``Trainer.Config``, by their names in it."""
    return {fqn: moe for fqn, moe, _parent, _attribute in config.traverse(MoE.Config)}


def layer_numbers(model_config: Decoder.Config) -> dict[str, int]:
    """Map the name of each MoE layer in the model to the number of its decoder layer.

    MoE layers elsewhere (multi-token prediction) have the numbers after the last decoder layer, in
    their order. Dense decoder layers count too.
    """
    names = list(moe_layers(model_config))
    numbers = {
        name: int(match[1]) for name in names if (match := re.match(r"layers\.(\d+)\.", name))
    }
    others = [name for name in names if name not in numbers]
    return numbers | {
        name: number for number, name in enumerate(others, start=len(model_config.layers))
    }


def layer_name(fqn: str) -> str:
    """Convert ``model_spec.model.layers.1.moe``, as in a ``Trainer.Config``, to ``layer 1``."""
    layer = re.search(r"(?:^|\.)(mtp_)?layers\.(\d+)(?:\.|$)", fqn)
    if layer is None:
        return fqn.removeprefix("model_spec.model.")
    return f"{'multi-token-prediction ' if layer[1] else ''}layer {layer[2]}"
