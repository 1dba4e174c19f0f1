"""The two losses of DeepSeek-V2 over groups of experts that share a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss
from titan_moe_lb.errors import JobError


class _OverDeviceGroups(SumsLoss):
    """The experts are in D equal groups of neighbours, in the order of their numbers.

    The number of groups is a setting, not the expert-parallel degree of a run, so that the
    loss does not depend on the layout; torchtitan puts the groups on devices in this order
    where the degree is D.
    """

    linear: ClassVar[bool] = True

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        num_device_groups: int
        """D: how many groups the experts are in."""

        @property
        def expert_groups(self) -> int:
            return self.num_device_groups

        def bind(self, **numbers: Any) -> None:
            SumsLoss.Config.bind(self, **numbers)
            groups, num_experts = self.num_device_groups, numbers["num_experts"]
            if groups < 1 or num_experts % groups:
                raise JobError(
                    f"aux loss {self._owner.type_name} has num_device_groups {groups}, which must "
                    f"divide the {num_experts} experts of a layer"
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_groups = config.num_device_groups

    def load(self, counts_BE: torch.Tensor, tokens: int | torch.Tensor) -> torch.Tensor:
        """The load of each expert's group relative to balance, float32 ``(B, E)``."""
        raise NotImplementedError

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """The load of the group / L, times the share of the sequence."""
        load_BE = self.load(counts_BE, sequences.tokens)
        return load_BE * (sequences.share / sequences.tokens)


class DeviceLevelLoss(_OverDeviceGroups):
    """sum_g f'_g P'_g of each sequence, mean over the sequences; 1.0 at balance.

    f'_g is the mean of f_i over the experts of group g and P'_g the sum of P_i, with f and
    P of the sequence-wise loss. Source: DeepSeek-V2, arXiv 2405.04434, Eqs. 26 to 28.
    """

    type_name: ClassVar[str] = "device_level"
    metric_name: ClassVar[str] = "device_level_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(_OverDeviceGroups.Config):
        pass

    def load(self, counts_BE, tokens) -> torch.Tensor:
        f_BE = counts_BE * (self.num_experts / (self.top_k * tokens))
        f_BGN = f_BE.unflatten(-1, (self.num_groups, -1))
        return f_BGN.mean(dim=-1, keepdim=True).expand_as(f_BGN).flatten(-2)


class CommunicationLoss(_OverDeviceGroups):
    """sum_g f''_g P''_g of each sequence, mean over the sequences.

    f''_g = D / (M L) * #{t : t is sent to group g}, each token once however many of its
    experts are there, and P''_g the sum of P_i over the group: every device receives about
    as many tokens, where each token is sent to M. Source: DeepSeek-V2, arXiv 2405.04434,
    Eqs. 29 to 31.
    """

    type_name: ClassVar[str] = "communication"
    metric_name: ClassVar[str] = "communication_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(_OverDeviceGroups.Config):
        devices_per_token: int
        """M: to how many devices a token is sent at most. A factor of the loss alone: the
        limit itself is the model's group-limited routing."""

        def __post_init__(self) -> None:
            _OverDeviceGroups.Config.__post_init__(self)
            if self.devices_per_token < 1:
                raise JobError(
                    f"aux loss communication has devices_per_token {self.devices_per_token}; it "
                    "must be at least 1"
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.count_groups = config.num_device_groups
        self.devices_per_token = config.devices_per_token

    def load(self, counts_BE, tokens) -> torch.Tensor:
        return counts_BE * (self.num_groups / (self.devices_per_token * tokens))
