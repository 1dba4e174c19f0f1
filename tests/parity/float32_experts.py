"""Experts in float32, because torchtitan's grouped GEMM in bfloat16 would hide 1e-5.

Every expert computes every row, and each row keeps its own expert's result. For the few experts of
the tiny models, this is several times faster than gathering weights for each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts


class Float32Experts(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        with spmd.no_typecheck():
            expert_R = _expert_of_each_row(x_RD, num_tokens_per_expert_E)
            w1_EFD, w2_EDF, w3_EFD = map(_local, (self.w1_EFD, self.w2_EDF, self.w3_EFD))
            h_RF = F.silu(_of_its_expert(all_experts(x_RD, w1_EFD), expert_R))
            h_RF = h_RF * _of_its_expert(all_experts(x_RD, w3_EFD), expert_R)
            return _of_its_expert(all_experts(h_RF, w2_EDF), expert_R)


class Float32GptOssExperts(GptOssGroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        with spmd.no_typecheck():
            expert_R = _expert_of_each_row(x_RD, num_tokens_per_expert_E)
            w1_EGD, b1_EG, w2_EDF, b2_ED = map(
                _local,
                (
                    self.mlp1_weight_EGD,
                    self.mlp1_bias_EG,
                    self.mlp2_weight_EDF,
                    self.mlp2_bias_ED,
                ),
            )
            h_RG = _of_its_expert(all_experts(x_RD, w1_EGD) + b1_EG, expert_R)
            gate_RF, up_RF = h_RG[:, 0::2], h_RG[:, 1::2]
            gate_RF = gate_RF.clamp(max=self.swiglu_limit)
            up_RF = up_RF.clamp(-self.swiglu_limit, self.swiglu_limit)
            h_RF = gate_RF * torch.sigmoid(1.702 * gate_RF) * (up_RF + 1)
            return _of_its_expert(all_experts(h_RF, w2_EDF) + b2_ED, expert_R)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _expert_of_each_row(x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
    ends_E = torch.cumsum(num_tokens_per_expert_E, dim=0)
    rows_R = torch.arange(x_RD.shape[0], device=x_RD.device)
    return torch.searchsorted(ends_E, rows_R, right=True).clamp_max(ends_E.shape[0] - 1)


def all_experts(x_RY: torch.Tensor, w_EXY: torch.Tensor) -> torch.Tensor:
    """Compute all experts ``(R, E, X)`` by one plain product.

    An einsum would be a batched product, for which inductor (torch 2.14, ``kernel/bmm.py``) asks on
    the host whether it has a single row. EP ranks know this only when they run.
    """
    return (x_RY @ w_EXY.flatten(0, 1).T).unflatten(1, w_EXY.shape[:2])


def _of_its_expert(out_REX: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
    index_R1X = expert_R[:, None, None].expand(-1, 1, out_REX.shape[2])
    return out_REX.gather(1, index_R1X).squeeze(1)


@override(target=GroupedExperts.Config, description="float32 experts")
def float32_experts(config: GroupedExperts.Config) -> GroupedExperts.Config:
    if isinstance(config, GptOssGroupedExperts.Config):
        return derive(config, Float32GptOssExperts.Config)
    return derive(config, Float32Experts.Config)
