"""Metrics of a logged step. To add one to the package, add a module and import it here."""

from titan_moe_lb.telemetry.metrics import capacity as capacity
from titan_moe_lb.telemetry.metrics import expert_bias as expert_bias
from titan_moe_lb.telemetry.metrics import frozen_gate as frozen_gate
from titan_moe_lb.telemetry.metrics import gradients as gradients
from titan_moe_lb.telemetry.metrics import margin as margin
from titan_moe_lb.telemetry.metrics import micro_batch as micro_batch
from titan_moe_lb.telemetry.metrics import overload as overload
from titan_moe_lb.telemetry.metrics import padding as padding
from titan_moe_lb.telemetry.metrics import scores as scores
from titan_moe_lb.telemetry.metrics.base import Metric as Metric
from titan_moe_lb.telemetry.metrics.base import Reduction as Reduction
