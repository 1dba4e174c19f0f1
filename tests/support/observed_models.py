"""Tiny models of transformers with routers of six kinds, and their choices in plain numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import transformers as tf
from torch import nn

E, K, LAYERS, VOCABULARY = 8, 2, 2, 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": K,
    "eos_token_id": None,
}
_FEW_HEADS = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": E, "first_k_dense_replace": 0}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_FEW_HEADS, moe_intermediate_size=16, num_experts=E)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_FEW_HEADS, num_local_experts=E)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **_SIZES,
            **_LATENT,
            **_GROUPS,
            num_key_value_heads=4,
            v_head_dim=8,
            moe_intermediate_size=16,
        )
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_FEW_HEADS, num_local_experts=E)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **_FEW_HEADS, intermediate_size_mlp=48, num_local_experts=E, interleave_moe_layer_step=1
        )
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**_SIZES, num_experts=E)),
}


def model_of(name: str) -> nn.Module:
    """Make a model in training mode; equal on every rank."""
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch(seed: int, rows: int = 2) -> torch.Tensor:
    """Make token ids ``(rows, 16)``."""
    return torch.randint(VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(seed))


class Logits:
    """Logits of each router, taken from its input and its weights, without its own forward."""

    def __init__(self, model: nn.Module) -> None:
        self.by_router: dict[str, list[np.ndarray]] = {}
        self._weights = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ("gate", "router") and hasattr(module, "top_k"):
                self.by_router[name] = []
                module.register_forward_pre_hook(self._noted(name))

    def _noted(self, name: str):
        def note(module: nn.Module, inputs: tuple) -> None:
            x_TD = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            bias = getattr(module, "bias", None)
            logits_TE = nn.functional.linear(x_TD, module.weight.detach(), bias)
            self.by_router[name].append(logits_TE.detach().numpy())

        return note

    def counts(self, grouped: bool) -> np.ndarray:
        """Count the top-K of all forwards ``(M, E)``; ``grouped``: in the better half, by DeepSeek."""
        return np.array(
            [_counts(np.concatenate(rows), grouped) for rows in self.by_router.values()]
        )


def _counts(logits_TE: np.ndarray, grouped: bool) -> np.ndarray:
    scores_TE = logits_TE
    if grouped:  # the best group by the sum of its two best sigmoids; the bias is 0
        scores_TE = 1 / (1 + np.exp(-logits_TE))
        halves_TGE = np.sort(scores_TE.reshape(-1, 2, E // 2), axis=-1)
        closed_T = halves_TGE[..., -2:].sum(axis=-1).argmin(axis=-1)
        scores_TE = scores_TE.copy()
        for token, half in enumerate(closed_T):
            scores_TE[token, half * E // 2 : (half + 1) * E // 2] = -np.inf
    return np.bincount(np.argsort(-scores_TE, axis=-1)[:, :K].ravel(), minlength=E)
