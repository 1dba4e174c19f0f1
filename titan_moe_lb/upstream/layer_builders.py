"""Builders of model layers that torchtitan 0.3.0 has under private names.

Each builder imports its model when it is called.
"""

from __future__ import annotations

from typing import Any


def deepseek_v3_mtp_layers(inner_layer: Any, **sizes: int) -> list:
    """Build the configs of multi-token prediction layers around copies of ``inner_layer``."""
    from torchtitan.models import deepseek_v3

    return deepseek_v3._build_mtp_layers(inner_layer, **sizes)


def qwen3_moe_layers(**arguments: Any) -> list:
    """Build the configs of the MoE layers of a Qwen3."""
    from torchtitan.models import qwen3

    return qwen3._build_qwen3_moe_layers(**arguments)


def gpt_oss_attention(**arguments: Any) -> Any:
    """Build the config of the attention in a GPT-OSS layer."""
    from torchtitan.models import gpt_oss

    return gpt_oss._make_gptoss_attn_config(**arguments)


def gpt_oss_experts(**arguments: Any) -> Any:
    """Build the config of the routed experts in a GPT-OSS layer."""
    from torchtitan.models import gpt_oss

    return gpt_oss._make_gptoss_experts_config(**arguments)
