"""Losses of DeepSeek-V2 over groups of experts that share a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss
from titan_moe_lb.errors import JobError


class _OverDeviceGroups(SumsLoss):
    """Base class of losses over D equal groups of neighboring experts.

    The number of groups is a setting, not the expert-parallel degree of a run, so the loss does not
    depend on the layout. torchtitan places the groups on devices in this order if the degree is D.
    """

    linear: ClassVar[bool] = True

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        num_device_groups: int
        """Number of expert groups, D."""

        @property
        def expert_groups(self) -> int:
            """Number of groups in the formula, D."""
            return self.num_device_groups

        def bind(self, **numbers: Any) -> None:
            """Fill in the numbers, and check that D divides E."""
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
        """Compute the load of each expert's group relative to balance, float32 ``(B, E)``."""
        raise NotImplementedError

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Return the load of the group / L, times the share of the sequence."""
        load_BE = self.load(counts_BE, sequences.tokens)
        return load_BE * (sequences.share / sequences.tokens)


class DeviceLevelLoss(_OverDeviceGroups):
    """Mean over the sequences of sum_g f'_g P'_g; 1.0 at balance.

    f'_g is the mean of f_i over the experts of group g, and P'_g is the sum of P_i, with f and P of
    the sequence-wise loss. Source: DeepSeek-V2, arXiv 2405.04434, Eqs. 26 to 28.
    """

    type_name: ClassVar[str] = "device_level"
    metric_name: ClassVar[str] = "device_level_loss"

    def load(self, counts_BE, tokens) -> torch.Tensor:
        """Compute f' of each expert's group."""
        f_BE = counts_BE * (self.num_experts / (self.top_k * tokens))
        f_BGN = f_BE.unflatten(-1, (self.num_groups, -1))
        return f_BGN.mean(dim=-1, keepdim=True).expand_as(f_BGN).flatten(-2)


class CommunicationLoss(_OverDeviceGroups):
    """Mean over the sequences of sum_g f''_g P''_g.

    f''_g = D / (M L) * #{t : t is sent to group g}, where a token counts once however many of its
    experts are in the group. P''_g is the sum of P_i over the group. The loss evens out the numbers
    of tokens that devices receive, if each token is sent to M devices. Source: DeepSeek-V2, arXiv
    2405.04434, Eqs. 29 to 31.
    """

    type_name: ClassVar[str] = "communication"
    metric_name: ClassVar[str] = "communication_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(_OverDeviceGroups.Config):
        devices_per_token: int
        """Largest number of devices that a token is sent to, M. It is a factor of the loss alone:
        the model's group-limited routing sets the limit."""

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
        """Compute f'' of each expert's group."""
        return counts_BE * (self.num_groups / (self.devices_per_token * tokens))
