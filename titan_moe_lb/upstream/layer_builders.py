"""Builders of model layers that torchtitan 0.3.0 has under private names.

Each model is imported when one of its layers is built.
"""

from __future__ import annotations

from typing import Any


def deepseek_v3_mtp_layers(inner_layer: Any, **sizes: int) -> list:
    """Configs of multi-token prediction layers around copies of ``inner_layer``."""
    from torchtitan.models import deepseek_v3

    return deepseek_v3._build_mtp_layers(inner_layer, **sizes)


def qwen3_moe_layers(**arguments: Any) -> list:
    """Configs of the MoE layers of a Qwen3 of the given sizes."""
    from torchtitan.models import qwen3

    return qwen3._build_qwen3_moe_layers(**arguments)


def gpt_oss_attention(**arguments: Any) -> Any:
    """Config of the attention of a GPT-OSS layer."""
    from torchtitan.models import gpt_oss

    return gpt_oss._make_gptoss_attn_config(**arguments)


def gpt_oss_experts(**arguments: Any) -> Any:
    """Config of the routed experts of a GPT-OSS layer."""
    from torchtitan.models import gpt_oss

    return gpt_oss._make_gptoss_experts_config(**arguments)
