"""Experts in float32: torchtitan casts the grouped GEMM to bfloat16, which would hide 1e-5."""

from __future__ import annotations

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.moe import GroupedExperts


class Float32Experts(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        with spmd.no_typecheck():
            w1_EFD, w2_EDF, w3_EFD = (
                weight.to_local() if isinstance(weight, DTensor) else weight
                for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
            )
            ends_E = torch.cumsum(num_tokens_per_expert_E, dim=0)
            rows_R = torch.arange(x_RD.shape[0], device=x_RD.device)
            expert_R = torch.searchsorted(ends_E, rows_R, right=True).clamp_max(ends_E.shape[0] - 1)
            h_RF = F.silu(torch.einsum("rd,rfd->rf", x_RD, w1_EFD[expert_R]))
            h_RF = h_RF * torch.einsum("rd,rfd->rf", x_RD, w3_EFD[expert_R])
            return torch.einsum("rf,rdf->rd", h_RF, w2_EDF[expert_R])


@override(target=GroupedExperts.Config, description="float32 experts")
def float32_experts(config: GroupedExperts.Config) -> Float32Experts.Config:
    return derive(config, Float32Experts.Config)
