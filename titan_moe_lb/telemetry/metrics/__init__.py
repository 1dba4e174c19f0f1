"""Metrics of a logged step. To add one to the package, add a module and import it here."""

from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.metrics.capacity import ActivationSlotFactor, CapacityFactor
from titan_moe_lb.telemetry.metrics.expert_bias import BiasLargestStep, BiasNorm, BiasRange
from titan_moe_lb.telemetry.metrics.frozen_gate import FrozenGate
from titan_moe_lb.telemetry.metrics.gradients import AuxGradient, MainGradient
from titan_moe_lb.telemetry.metrics.margin import MARGIN_BELOW, Bfloat16Flips, SelectionMargin
from titan_moe_lb.telemetry.metrics.micro_batch import MicroBatchMaxViolation
from titan_moe_lb.telemetry.metrics.overload import (
    AverageOverload,
    CumulativeOverload,
    MaximumOverload,
)
from titan_moe_lb.telemetry.metrics.padding import PaddingShare
from titan_moe_lb.telemetry.metrics.scores import (
    ChosenMass,
    GateInputRms,
    GateLoadCorrelation,
    LargestLogit,
    LogitRms,
    TokenEntropy,
)

__all__ = [
    "ActivationSlotFactor",
    "AuxGradient",
    "AverageOverload",
    "Bfloat16Flips",
    "BiasLargestStep",
    "BiasNorm",
    "BiasRange",
    "CapacityFactor",
    "ChosenMass",
    "CumulativeOverload",
    "FrozenGate",
    "GateInputRms",
    "GateLoadCorrelation",
    "LargestLogit",
    "LogitRms",
    "MARGIN_BELOW",
    "MainGradient",
    "MaximumOverload",
    "Metric",
    "MicroBatchMaxViolation",
    "PaddingShare",
    "Reduction",
    "SelectionMargin",
    "TokenEntropy",
]
