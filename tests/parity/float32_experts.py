"""Experts in float32: torchtitan casts the grouped GEMM to bfloat16, which would hide 1e-5."""

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
            w1_RFD, w2_RDF, w3_RFD = (
                _local(weight)[expert_R] for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
            )
            h_RF = F.silu(torch.einsum("rd,rfd->rf", x_RD, w1_RFD))
            h_RF = h_RF * torch.einsum("rd,rfd->rf", x_RD, w3_RFD)
            return torch.einsum("rf,rdf->rd", h_RF, w2_RDF)


class Float32GptOssExperts(GptOssGroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        with spmd.no_typecheck():
            expert_R = _expert_of_each_row(x_RD, num_tokens_per_expert_E)
            w1_RGD, b1_RG, w2_RDF, b2_RD = (
                _local(parameter)[expert_R]
                for parameter in (
                    self.mlp1_weight_EGD,
                    self.mlp1_bias_EG,
                    self.mlp2_weight_EDF,
                    self.mlp2_bias_ED,
                )
            )
            h_RG = torch.einsum("rd,rgd->rg", x_RD, w1_RGD) + b1_RG
            gate_RF, up_RF = h_RG[:, 0::2], h_RG[:, 1::2]
            gate_RF = gate_RF.clamp(max=self.swiglu_limit)
            up_RF = up_RF.clamp(-self.swiglu_limit, self.swiglu_limit)
            h_RF = gate_RF * torch.sigmoid(1.702 * gate_RF) * (up_RF + 1)
            return torch.einsum("rf,rdf->rd", h_RF, w2_RDF) + b2_RD


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _expert_of_each_row(x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
    ends_E = torch.cumsum(num_tokens_per_expert_E, dim=0)
    rows_R = torch.arange(x_RD.shape[0], device=x_RD.device)
    return torch.searchsorted(ends_E, rows_R, right=True).clamp_max(ends_E.shape[0] - 1)


@override(target=GroupedExperts.Config, description="float32 experts")
def float32_experts(config: GroupedExperts.Config) -> GroupedExperts.Config:
    if isinstance(config, GptOssGroupedExperts.Config):
        return derive(config, Float32GptOssExperts.Config)
    return derive(config, Float32Experts.Config)
