"""Bytes that a rank keeps for the backward pass, and the peak over a schedule.

What a rank receives in an MoE layer grows with the imbalance; what it sends does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from titan_moe_lb.costmodel.job import JobModel, Stage
from titan_moe_lb.costmodel.layer import MoELayer, Placement
from titan_moe_lb.costmodel.load import Array
from titan_moe_lb.costmodel.roofline import BF16_BYTES
from titan_moe_lb.parallel.schedules import peak, stages_of


def bytes_per_received_token(layer: MoELayer, expert_shards: int = 1) -> float:
    """Kept by the experts for each token and expert: one D and four F wide values.

    The input of w1 and w3, their two results, the activation of the first, and the
    product, which is the input of w2; in BF16, as torchtitan computes them.
    """
    return BF16_BYTES * (layer.dim + 4 * layer.hidden_dim / expert_shards)


def bytes_per_sent_token(layer: MoELayer) -> float:
    """Kept by the combine for each token and expert: the result in float32, for the scores."""
    return 4.0 * layer.dim


def working_bytes_per_received_token(layer: MoELayer, expert_shards: int = 1) -> float:
    """Not kept, but there while the experts run backward.

    Either the gradients of the result, of the product and of one of its factors, or the
    gradient of the result and that of the input three times: from w1, from w3, their sum.
    """
    hidden_dim = layer.hidden_dim / expert_shards
    return BF16_BYTES * max(layer.dim + 2 * hidden_dim, 3 * layer.dim)


def activation_peak(
    job: JobModel, placement: Placement, position: int, received: Mapping[int, np.ndarray]
) -> float:
    """Bytes of activations at the peak on one pipeline rank.

    Under full checkpointing a layer keeps its input, and one layer at a time is whole. The
    selective policy keeps the results of the all-to-alls and half of the linear layers'
    (torchtitan: every second one). Activations outside MoE layers are an estimate.

    Args:
        position: the pipeline rank.
        received: by MoE layer, tokens that each rank of the EP group receives in one
            micro-batch ``(N, R)``, under N loads that the micro-batches have in turn.
    """
    shape = next(iter(received.values())).shape
    turns = job.in_turn(shape[0])
    kept, working = {}, {}
    for index in stages_of(job.schedule[position]):
        keeps, works = _stage_bytes(job, placement, job.stages[index], received)
        kept[index] = np.broadcast_to(keeps, shape)[turns]
        working[index] = np.broadcast_to(works, shape)[turns]
    most = peak(
        job.schedule[position],
        kept=lambda stage, micro_batch: kept[stage][:, micro_batch],
        working=lambda stage, micro_batch: working[stage][:, micro_batch],
    )
    return float(np.max(most))


def _stage_bytes(
    job: JobModel, placement: Placement, stage: Stage, received: Mapping[int, Array]
) -> tuple[Array, Array]:
    """Kept by one micro-batch of a stage, and needed besides while it runs."""
    tokens = job.tokens_per_microbatch / job.tp_degree
    inputs = tokens * job.dim * BF16_BYTES * stage.num_layers
    dense = tokens * stage.dense_bytes
    whole: list[Array] = [0.0]
    arrived: Array = 0.0
    working: list[Array] = [0.0]
    for number in stage.moe_layers:
        layer = job.moe_layers[number]
        sent = placement.tokens_per_rank * layer.top_k
        whole.append(
            received[number] * bytes_per_received_token(layer, placement.expert_shards)
            + sent * bytes_per_sent_token(layer)
        )
        working.append(
            received[number] * working_bytes_per_received_token(layer, placement.expert_shards)
        )
        arrived = arrived + (received[number] + sent) * layer.dim * BF16_BYTES
    at_work = np.max(np.stack(np.broadcast_arrays(*working)), axis=0)
    one_layer = np.max(np.stack(np.broadcast_arrays(*whole)), axis=0)
    dense_layer = dense / max(stage.num_layers, 1)
    if job.checkpointing == "full":
        return inputs, at_work + one_layer + dense_layer
    if job.checkpointing == "selective":
        return inputs + arrived + 0.5 * dense, at_work + one_layer + 0.5 * dense_layer
    return sum(whole) + dense, at_work


def largest_that_fits(fits: Callable[[float], bool], worst: float) -> float | None:
    """The largest imbalance in [1, worst] that fits, to a thousandth; None if balance does not.

    Args:
        fits: does not turn true again once it is false.
    """
    if not fits(1.0):
        return None
    if fits(worst):
        return worst
    low, high = 1.0, worst
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
