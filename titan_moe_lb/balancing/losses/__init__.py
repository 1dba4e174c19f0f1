"""Losses on the router besides the language-model loss: one file each.

:mod:`titan_moe_lb.balancing.losses.base` follows one loss from TOML to gradient.
"""

from titan_moe_lb import functional
from titan_moe_lb.balancing.losses.base import AuxLoss, LogitsLoss, SumsLoss
from titan_moe_lb.balancing.losses.batch_wise import BatchWiseAuxLoss
from titan_moe_lb.balancing.losses.device_groups import CommunicationLoss, DeviceLevelLoss
from titan_moe_lb.balancing.losses.entropy import EntropyLoss
from titan_moe_lb.balancing.losses.global_batch import GlobalBatchAuxLoss
from titan_moe_lb.balancing.losses.importance import ImportanceLoss
from titan_moe_lb.balancing.losses.sequence_wise import SequenceWiseAuxLoss
from titan_moe_lb.balancing.losses.z_loss import RouterZLoss

__all__ = [
    "AuxLoss",
    "BatchWiseAuxLoss",
    "CommunicationLoss",
    "DeviceLevelLoss",
    "EntropyLoss",
    "GlobalBatchAuxLoss",
    "ImportanceLoss",
    "LogitsLoss",
    "RouterZLoss",
    "SequenceWiseAuxLoss",
    "SumsLoss",
    "functional",
]
