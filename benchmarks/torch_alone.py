"""First figures of a device: loss, record, step end and graph replay. Torch alone.

    python -m benchmarks.torch_alone [--device cuda] [--tokens 8192] [--experts 256] [--top-k 8]

Needs torch 2.11 or newer, and neither torchtitan nor an installation of this package. Prints a line of
JSON for each part:

- ``loss``: forward and backward from the logits, without a loss, with the sequence-wise loss as our
  router attaches it, and with its textbook formula under autograd. ``gradient_error`` is the largest
  difference of the two gradients, over the largest gradient.
- ``record``: count the tokens of each expert and add them to the record of the step; beside a
  ``bincount`` of each sequence.
- ``step_end``: close the record of all layers; beside a loop over the layers.
- ``graph_replay``: a CUDA graph of loss and record, replayed; beside the same eagerly. Its counts and
  gradients are compared with those of an eager run.

``bound_percent`` is the share of the memory-bandwidth bound: the least bytes that the operation reads
and writes, at the bandwidth of a copy, over the measured time. It is above 100 where a cache holds the
tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.device_time import copy_bandwidth, device_name, interleaved, synchronize
from titan_moe_lb.balancing.recording.step_record import RouterRecord, StepRecord
from titan_moe_lb.functional import (
    count_tokens_per_expert,
    expert_load,
    gather_scores,
    inverse_sums,
    probability_sums,
)

SEQUENCES = 4
MICRO_BATCHES = 8
WEIGHT = 1e6
"""Weight of the loss: so large that its gradient is as large as that of the chosen scores."""


def main() -> None:
    """Measure all parts, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (
        ("tokens", 8192),
        ("experts", 256),
        ("top-k", 8),
        ("layers", 58),
        ("repeats", 50),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    for row in rows(**vars(arguments)):
        print(json.dumps(row), flush=True)


def rows(
    device: str, tokens: int, experts: int, top_k: int, layers: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure one part after the other, each with that many runs of every operation."""
    on = torch.device(device)
    yield {
        "part": "device",
        "name": device_name(on),
        "torch": torch.__version__,
        "copy_bytes_per_second": (bandwidth := copy_bandwidth(on)),
        "tokens": tokens,
        "experts": experts,
        "top_k": top_k,
        "layers": layers,
    }

    def row(
        part: str, runs: dict[str, Callable[[], object]], least_bytes: int, **more: Any
    ) -> dict[str, Any]:
        seconds = interleaved(runs, repeats, on)
        medians = {name: statistics.median(samples) for name, samples in seconds.items()}
        bound = least_bytes / bandwidth
        return {
            "part": part,
            "ms": {name: 1e3 * median for name, median in medians.items()},
            "bound_percent": {name: 100 * bound / median for name, median in medians.items()},
            **more,
        }

    record = StepRecord(
        num_routers=layers,
        num_micro_batches=MICRO_BATCHES,
        num_sources=1,
        num_experts=experts,
        num_losses=1,
        token_shape=None,
        device=on,
    )
    router = record.router(0, experts, top_k, 0)
    torch.manual_seed(0)
    logits = torch.randn(SEQUENCES, tokens // SEQUENCES, experts, device=on, requires_grad=True)
    ids = logits.detach().sigmoid().topk(top_k, dim=-1, sorted=False).indices
    runs = {
        name: lambda loss=loss: _gradient(logits, lambda at: loss(at, top_k))
        for name, loss in (("without", _without), ("attached", _attached), ("textbook", _textbook))
    }
    attached, textbook = runs["attached"](), runs["textbook"]()
    error = float((attached - textbook).abs().max() / textbook.abs().max())
    # Logits read, scores written and read; gradients of scores written and read, of logits written.
    loss_bytes = 6 * 4 * logits.numel() + (3 * 8 + 4 * 4) * ids.numel()
    yield row("loss", runs, loss_bytes, gradient_error=error)
    counted = {
        "record": lambda: _note(router, ids),
        "bincount": lambda: [sequence.flatten().bincount(minlength=experts) for sequence in ids],
    }
    yield row("record", counted, 8 * ids.numel())
    closed = {
        "step_end": lambda: (record.finish_step(SEQUENCES), record.reduce([])),
        "loop": lambda: _close_in_a_loop(record),
    }
    # Counts of the micro-batches read twice, written and zeroed, as int64; then summed.
    yield row("step_end", closed, 4 * 8 * record.counts_NMSE.numel())
    if on.type == "cuda":
        yield _graph_replay(logits, ids, router, record, row, loss_bytes)
    else:
        yield {"part": "graph_replay", "skipped": "needs a CUDA device"}


def _gradient(logits: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    return gradient


def _scores(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    return scores, scores.detach().topk(top_k, dim=-1, sorted=False).indices


def _without(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    scores, ids = _scores(logits, top_k)
    return scores.gather(-1, ids).sum()


def _attached(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Sequence-wise loss as the router attaches it, with its value."""
    scores, ids = _scores(logits, top_k)
    rows, length, num_experts = scores.shape
    with torch.no_grad():
        inverse = inverse_sums(scores)
        sums = probability_sums(scores, inverse_sums_BL=inverse)
        counts = count_tokens_per_expert(ids, num_experts)
        load = expert_load(counts.float(), ids.shape[-1], length) / length
        torch.mv(load.view(1, -1), sums.view(-1))  # the value, for the metrics
    return gather_scores(scores, ids, load * (WEIGHT / rows), inverse).sum()


def _textbook(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Equations 17 to 20 of arXiv 2412.19437, by autograd."""
    scores, ids = _scores(logits, top_k)
    rows, length, num_experts = scores.shape
    counts = torch.zeros(rows, num_experts, device=scores.device)
    counts.scatter_add_(1, ids.flatten(1), torch.ones(ids.flatten(1).shape, device=ids.device))
    load = counts * num_experts / (ids.shape[-1] * length)
    probability = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
    return scores.gather(-1, ids).sum() + WEIGHT * (load * probability).sum(dim=-1).mean()


def _note(router: RouterRecord, ids: torch.Tensor) -> None:
    router.add_counts(0, ids, router.one)
    router.note_ids(ids)


def _close_in_a_loop(record: StepRecord) -> list[torch.Tensor]:
    sums = []
    for counts, finished in zip(record.counts_NMSE, record.step_counts_NMSE, strict=True):
        finished.copy_(counts)
        counts.zero_()
        sums.append(finished.sum(dim=0).double())
    return sums


def _graph_replay(
    logits: torch.Tensor,
    ids: torch.Tensor,
    router: RouterRecord,
    record: StepRecord,
    row: Callable[..., dict[str, Any]],
    least_bytes: int,
) -> dict[str, Any]:
    def eager() -> torch.Tensor:
        gradient = _gradient(logits, lambda at: _attached(at, ids.shape[-1]))
        _note(router, ids)
        return gradient

    expected = eager()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = eager()
    record.discard_step()
    graph.replay()
    graph.replay()
    synchronize(logits.device)
    counts = count_tokens_per_expert(ids, logits.shape[-1]).sum(dim=0)
    return row(
        "graph_replay",
        {"eager": eager, "replay": graph.replay},
        least_bytes,
        counts_are_exact=bool((router.counts_MSE[0, 0] == 2 * counts).all()),
        gradient_error=float((captured - expected).abs().max()),
    )


if __name__ == "__main__":
    main()
