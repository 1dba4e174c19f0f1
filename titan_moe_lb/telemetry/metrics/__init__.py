"""The metrics of a logged step, a file each. A metric of the package is a file and an import here."""

from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.metrics.capacity import CapacityFactor
from titan_moe_lb.telemetry.metrics.expert_bias import BiasLargestStep, BiasNorm, BiasRange
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
    "AverageOverload",
    "BiasLargestStep",
    "BiasNorm",
    "BiasRange",
    "CapacityFactor",
    "CumulativeOverload",
    "MainGradient",
    "MaximumOverload",
    "Metric",
    "MicroBatchMaxViolation",
    "PaddingShare",
    "Reduction",
]
