"""The numbers of a model's MoE layers, whatever pipeline stage holds them."""

from __future__ import annotations

import re

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE


def layer_numbers(model_config: Decoder.Config) -> dict[str, int]:
    """By name in the model, ascending: the number of the decoder layer that an MoE is in.

    MoE layers elsewhere (multi-token prediction) go on from the last decoder layer, dense
    ones included, in their order.
    """
    names = [name for name, *_ in model_config.traverse(MoE.Config)]
    numbers = {
        name: int(match[1]) for name in names if (match := re.match(r"layers\.(\d+)\.", name))
    }
    others = [name for name in names if name not in numbers]
    return numbers | {
        name: number for number, name in enumerate(others, start=len(model_config.layers))
    }
