"""Bytes that a rank saves for the backward pass, and their peak over a schedule.

The number of tokens that a rank receives in an MoE layer grows with the imbalance. The number
that it sends does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from titan_moe_lb.costmodel.loads.expert_load import Array
from titan_moe_lb.costmodel.times.dispatch import places_of_a_token
from titan_moe_lb.costmodel.times.gemm import BF16_BYTES, FP32_BYTES
from titan_moe_lb.costmodel.times.job import JobModel, Stage
from titan_moe_lb.costmodel.times.moe_layer import MoELayer, RankRole
from titan_moe_lb.parallel.schedules import peak, stages_of


def bytes_per_received_token(layer: MoELayer, expert_shards: int = 1) -> float:
    """Bytes that an expert saves for each token: one vector of D values and four of F values.

    These are the input of w1 and w3, their two results, the activation of the first, and the
    product, which is the input of w2. torchtitan computes them in BF16.
    """
    return BF16_BYTES * (layer.dim + 4 * layer.hidden_dim / expert_shards)


def bytes_of_combine(layer: MoELayer, role: RankRole, received: Array) -> Array:
    """Bytes that the combine saves: the experts' results, for the gradient of the scores.

    The ranks that route the tokens save them in float32. With DeepEP the ranks that compute the
    tokens apply the scores and save the results in BF16.
    """
    if role.exchanges and role.dispatcher == "deepep":
        return received * layer.dim * BF16_BYTES
    return role.tokens_per_rank * layer.top_k * layer.dim * FP32_BYTES


def bytes_of_exchanges(layer: MoELayer, role: RankRole, received: Array) -> Array:
    """Bytes of the results of the dispatch and combine all-to-alls.

    With DeepEP a rank receives a token once and returns one sum for it.
    """
    if not role.exchanges:
        return 0.0
    there, back = received, role.tokens_per_rank * layer.top_k
    if role.dispatcher == "deepep":
        ranks = places_of_a_token(layer, role.ep_degree)
        there = np.minimum(received * ranks / layer.top_k, role.tokens)
        back = role.tokens_per_rank
    return (there + back) * layer.dim * BF16_BYTES


def working_bytes_per_received_token(layer: MoELayer, expert_shards: int = 1) -> float:
    """Further bytes of each received token while the experts run backward.

    They are the larger of two sets: the gradients of the result, of the product and of one of
    its factors; or the gradients of the input from w1 and from w3, and their sum.
    """
    hidden_dim = layer.hidden_dim / expert_shards
    return BF16_BYTES * max(layer.dim + 2 * hidden_dim, 3 * layer.dim)


def activation_peak(
    job: JobModel, role: RankRole, position: int, received: Mapping[int, np.ndarray]
) -> float:
    """Peak bytes of the activations on one pipeline rank.

    Under full checkpointing each layer saves its input, and one layer at a time is recomputed. The
    selective policy saves the results of every second linear layer and of attention. On a GPU with
    EP it also saves the results of the all-to-alls. ``received`` has the tokens that each rank of
    the EP group receives in one micro-batch ``(N, R)``, by number of the MoE layer. The
    micro-batches cycle through the N loads.
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
    """Bytes of inputs, labels and positions of a pass: five int64 values for each token.

    Some of them exist twice. The host adds its attention mask, one byte for each key.
    """
    per_token = 5 * 8 + (job.seq_len if job.on_host else 0)
    return job.num_micro_batches * job.tokens_per_microbatch * per_token


def _boundary_bytes(job: JobModel) -> float:
    """Bytes of one micro-batch between two stages: D values for each token, in BF16."""
    return job.tokens_per_microbatch / job.tp_degree * job.dim * BF16_BYTES


def _pipeline_bytes(job: JobModel, stages: list[int]) -> float:
    """Bytes of the buffers that torch's pipelining keeps for a pass; 0 from torch 2.15 on.

    A stage has a buffer for each input and each gradient that it receives. A rank with several
    stages also keeps all sent tensors until the end of the pass. Between two stages of the same
    rank, the sent tensor is the received one.
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
    """Bytes of a stage's pipelining buffers for one micro-batch; 0 before torch 2.15.

    From 2.15 on, torch allocates and releases each buffer by itself.

    Returns:
        Bytes of the sent output, until its backward; of the gradient that its backward receives;
        and of the sent gradient, until the end of the pass. Only a rank with several stages keeps
        sent tensors, and only those for other ranks.
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
    """Bytes that one micro-batch of a stage saves, and further bytes while it runs.

    While a block runs, later blocks have no activations: they come after it in the forward and
    are done in the backward.
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
                # The router reads its rank's tokens, the shared experts the tokens of all TP ranks.
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
    """Find the largest imbalance in [1, worst] that fits, to within 0.001.

    ``fits`` stays False above the first imbalance for which it is. None if balance does not fit.
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
