"""Losses on the router besides the language-model loss: one file each.

:mod:`titan_moe_lb.balancing.losses.base` follows one loss from TOML to gradient.
"""

from titan_moe_lb import functional as functional
from titan_moe_lb.balancing.losses.base import AuxLoss as AuxLoss
from titan_moe_lb.balancing.losses.base import LogitsLoss as LogitsLoss
from titan_moe_lb.balancing.losses.base import SumsLoss as SumsLoss
from titan_moe_lb.balancing.losses.batch_wise import BatchWiseAuxLoss as BatchWiseAuxLoss
from titan_moe_lb.balancing.losses.device_groups import CommunicationLoss as CommunicationLoss
from titan_moe_lb.balancing.losses.device_groups import DeviceLevelLoss as DeviceLevelLoss
from titan_moe_lb.balancing.losses.entropy import EntropyLoss as EntropyLoss
from titan_moe_lb.balancing.losses.global_batch import GlobalBatchAuxLoss as GlobalBatchAuxLoss
from titan_moe_lb.balancing.losses.importance import ImportanceLoss as ImportanceLoss
from titan_moe_lb.balancing.losses.sequence_wise import SequenceWiseAuxLoss as SequenceWiseAuxLoss
from titan_moe_lb.balancing.losses.z_loss import RouterZLoss as RouterZLoss
