"""Bytes that a rank keeps for the backward pass, and the peak over a schedule.

What a rank receives in an MoE layer grows with the imbalance; what it sends does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from titan_moe_lb.costmodel.hardware.roofline import BF16_BYTES, FP32_BYTES
from titan_moe_lb.costmodel.loads.expert_load import Array
from titan_moe_lb.costmodel.times.dispatch import places_of_a_token
from titan_moe_lb.costmodel.times.job import JobModel, Stage
from titan_moe_lb.costmodel.times.layer import MoELayer, RankRole
from titan_moe_lb.parallel.schedules import peak, stages_of


def bytes_per_received_token(layer: MoELayer, expert_shards: int = 1) -> float:
    """Kept by the experts for each token and expert: one D and four F wide values.

    The input of w1 and w3, their two results, the activation of the first, and the
    product, which is the input of w2; in BF16, as torchtitan computes them.
    """
    return BF16_BYTES * (layer.dim + 4 * layer.hidden_dim / expert_shards)


def bytes_of_combine(layer: MoELayer, role: RankRole, received: Array) -> Array:
    """Kept by the combine: the results of the experts, for the gradient of the scores.

    In float32 on the ranks that route the tokens; with DeepEP in BF16 on those that compute
    them, which apply the scores.

    Args:
        received: tokens that the ranks receive.
    """
    if role.exchanges and role.dispatcher == "deepep":
        return received * layer.dim * BF16_BYTES
    return role.tokens_per_rank * layer.top_k * layer.dim * FP32_BYTES


def bytes_of_exchanges(layer: MoELayer, role: RankRole, received: Array) -> Array:
    """Results of the all-to-alls, there and back. With DeepEP a token comes once to a rank, and
    its sum goes back. Arguments: as :func:`bytes_of_combine`."""
    if not role.exchanges:
        return 0.0
    there, back = received, role.tokens_per_rank * layer.top_k
    if role.dispatcher == "deepep":
        ranks = places_of_a_token(
            role.ep_degree, layer.num_experts, layer.top_k, layer.neighbouring_choices
        )
        there = np.minimum(received * ranks / layer.top_k, role.tokens)
        back = role.tokens_per_rank
    return (there + back) * layer.dim * BF16_BYTES


def working_bytes_per_received_token(layer: MoELayer, expert_shards: int = 1) -> float:
    """Not kept, but there while the experts run backward.

    Either the gradients of the result, of the product and of one of its factors, or the
    gradient of the result and that of the input three times: from w1, from w3, their sum.
    """
    hidden_dim = layer.hidden_dim / expert_shards
    return BF16_BYTES * max(layer.dim + 2 * hidden_dim, 3 * layer.dim)


def activation_peak(
    job: JobModel, role: RankRole, position: int, received: Mapping[int, np.ndarray]
) -> float:
    """Bytes of activations at the peak on one pipeline rank.

    Under full checkpointing a layer keeps its input, and one layer at a time is whole. The
    selective policy keeps every second linear layer's result and attention's, and on a GPU with
    EP what the all-to-alls bring.

    Args:
        position: the pipeline rank.
        received: by MoE layer, tokens that each rank of the EP group receives in one
            micro-batch ``(N, R)``, under N loads that the micro-batches have in turn.
    """
    shape = next(iter(received.values())).shape
    turns = job.in_turn(shape[0])
    kept, working, left = {}, {}, {}
    stages = stages_of(job.schedule[position])
    for index in stages:
        keeps, works = _stage_bytes(job, role, job.stages[index], received)
        sent, awaited, left[index] = _released_bytes(job, stages, index)
        kept[index] = np.broadcast_to(keeps, shape)[turns] + sent
        working[index] = np.broadcast_to(works, shape)[turns] + awaited
    most = peak(
        job.schedule[position],
        kept=lambda stage, micro_batch: kept[stage][:, micro_batch],
        working=lambda stage, micro_batch: working[stage][:, micro_batch],
        left=lambda stage: left[stage],
    )
    return float(np.max(most)) + _batch_bytes(job) + _pipeline_bytes(job, stages)


def _batch_bytes(job: JobModel) -> float:
    """Inputs, labels and positions of a pass, of which some are there twice: five int64 values
    a token. On the host the mask of its attention, a byte for each key."""
    per_token = 5 * 8 + (job.seq_len if job.on_host else 0)
    return job.num_micro_batches * job.tokens_per_microbatch * per_token


def _boundary_bytes(job: JobModel) -> float:
    """One micro-batch between two stages, D wide, in BF16."""
    return job.tokens_per_microbatch / job.tp_degree * job.dim * BF16_BYTES


def _pipeline_bytes(job: JobModel, stages: list[int]) -> float:
    """Buffers that torch's pipelining holds for a pass, before torch 2.15.

    A stage has a buffer for each input and each gradient that it receives. A rank with several
    stages waits for what it has sent at the end of the pass; between two stages of its own the
    sent tensor is the received one.
    """
    if job.releases_buffers:
        return 0.0
    last = len(job.stages) - 1
    boundaries = sum((stage > 0) + (stage < last) for stage in stages)
    if len(stages) > 1:
        own = sum(stage + 1 in stages for stage in stages)
        boundaries = 2 * boundaries - 2 * own
    return boundaries * job.num_micro_batches * _boundary_bytes(job)


def _released_bytes(job: JobModel, stages: list[int], index: int) -> tuple[float, float, float]:
    """Buffers of one micro-batch of a stage, since torch 2.15, which allocates and releases
    buffers one by one.

    Returns:
        Bytes of its output until its backward, where a rank has several stages; of the gradient
        that its backward receives; of the gradient that it sends, until the end of the pass.
    """
    if not job.releases_buffers:
        return 0.0, 0.0, 0.0
    size = _boundary_bytes(job)
    has_next, several = index < len(job.stages) - 1, len(stages) > 1
    sends_output = several and has_next and index + 1 not in stages
    sends_gradient = several and index > 0 and index - 1 not in stages
    return size * sends_output, size * has_next, size * sends_gradient


def _stage_bytes(
    job: JobModel, role: RankRole, stage: Stage, received: Mapping[int, Array]
) -> tuple[Array, Array]:
    """Kept by one micro-batch of a stage, and needed besides while it runs.

    While a block runs, those behind it are not there yet, or gone.
    """
    tokens = job.tokens_per_microbatch / job.tp_degree
    inputs = tokens * job.dim * BF16_BYTES
    kept: Array = 0.0
    peaks: list[Array] = []
    for block in stage.blocks:
        attention, feed_forward = tokens * block.attention, tokens * block.feed_forward
        saved = inputs + tokens * block.selective
        experts: Array = 0.0
        at_work: Array = 0.0
        if block.moe_layer is not None:
            layer = job.moe_layers[block.moe_layer]
            arrived = received[block.moe_layer]
            experts = arrived * bytes_per_received_token(layer, role.expert_shards)
            experts = experts + bytes_of_combine(layer, role, arrived)
            at_work = arrived * working_bytes_per_received_token(layer, role.expert_shards)
            if job.tp_degree > 1 and job.ep_degree > 1:
                # The router has its own tokens, the shared experts those of all ranks of TP.
                feed_forward += inputs
            if not job.on_host:
                saved = saved + bytes_of_exchanges(layer, role, arrived)
        whole = attention + feed_forward + experts
        keeps = {"none": whole, "selective": saved, "full": inputs}[job.checkpointing]
        again = {"none": 0.0, "selective": whole + inputs - saved, "full": whole}[job.checkpointing]
        attends = tokens * max(block.attention_forward, block.attention_backward)
        kept = kept + keeps
        peaks += [kept + again + at_work, kept + again - feed_forward - experts + attends]
    if stage.head:
        kept = kept + tokens * stage.head.norm
        peaks.append(kept + tokens * stage.head.loss)
    most = np.max(np.stack(np.broadcast_arrays(kept, *peaks)), axis=0)
    return kept, most - kept


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
