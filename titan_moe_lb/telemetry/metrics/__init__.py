"""Metrics of a logged step. To add one to the package, add a module and import it here."""

from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.metrics.capacity import ActivationSlotFactor, CapacityFactor
from titan_moe_lb.telemetry.metrics.expert_bias import BiasLargestStep, BiasNorm, BiasRange
from titan_moe_lb.telemetry.metrics.frozen_gate import FrozenGate
from titan_moe_lb.telemetry.metrics.gradients import AuxGradient, MainGradient
from titan_moe_lb.telemetry.metrics.micro_batch import MicroBatchMaxViolation
from titan_moe_lb.telemetry.metrics.overload import (
    AverageOverload,
    CumulativeOverload,
    MaximumOverload,
)
from titan_moe_lb.telemetry.metrics.padding import PaddingShare

__all__ = [
    "AuxGradient",
    "ActivationSlotFactor",
    "AverageOverload",
    "BiasLargestStep",
    "BiasNorm",
    "BiasRange",
    "CapacityFactor",
    "CumulativeOverload",
    "FrozenGate",
    "MainGradient",
    "MaximumOverload",
    "Metric",
    "MicroBatchMaxViolation",
    "PaddingShare",
    "Reduction",
]
