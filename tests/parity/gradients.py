"""Gradient of one fixed global batch under a layout. Runs on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config.override import derive
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.trainer import Trainer

from tests.parity.layout import Layout
from tests.support.train_jobs import skip_initialisation
from titan_moe_lb import toml_tables
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.router import moe_layers_of, routers_of
from titan_moe_lb.balancing.valid_tokens.batch_tokens import document_numbers
from titan_moe_lb.balancing.valid_tokens.model_input import DOCUMENT_IDS, VALID_TOKENS
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.upstream import cpu, zero_bubble

GLOBAL_BATCH_SIZE = 8
ROW_SIXTEENTHS = (16, 13, 6, 2, 11, 8, 15, 6)
"""Sixteenths of each row before its padding, which is 40 % of all tokens.

torchtitan's chunked loss needs multiples of 8 tokens.
"""
# A gate of ordinary size leaves many tokens with two experts almost tied, and the
# rounding of a layout would decide between them.
GATE_SCALE = 40.0


def make_config(layout: Layout, module: str, config: str, model: dict[str, Any]) -> Trainer.Config:
    """Make a registry config in float32 for the fixed batch under the layout."""
    flags = [f"--model.{key}={toml_tables.inline(value)}" for key, value in model.items()]
    draft = job_config.draft(["--module", module, "--config", config, *flags])
    trainer_config = draft.build()
    layout.apply(trainer_config, global_batch_size=GLOBAL_BATCH_SIZE)
    trainer_config.training.seq_len = layout.sequence_length
    trainer_config.training.mixed_precision_param = "float32"
    # The step between the two passes may move the expert bias and the counts of the
    # previous step, which are integers' work, but no weight.
    for group in trainer_config.optimizer.param_groups:
        group.optimizer_kwargs["lr"] = 0.0
    trainer_config.debug.seed = 0
    trainer_config.debug.enable_structured_logging = False
    trainer_config.override.imports.append("tests.parity.float32_experts.float32_experts")
    return trainer_config


def save_seed(folder: str, module: str, config: str, model: dict[str, Any]) -> None:
    """Write the initial weights of every layout. One rank."""
    trainer_config = _cut_config(folder, Layout(), module, config, model)
    trainer_config.checkpoint.create_seed_checkpoint = True
    trainer = _build(trainer_config)
    with torch.no_grad():
        for part in trainer.model_parts:
            for name, parameter in part.named_parameters():
                if "router.gate.weight" in name:
                    parameter.mul_(GATE_SCALE)
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()


def layout_gradients(
    seed_folder: str,
    out_folder: str,
    layout: Layout,
    *,
    module: str,
    config: str,
    model: dict[str, Any],
    with_main_loss: bool,
    alone: tuple[str, ...] = ("",),
    padding: Padding = "none",
    router_gradients: bool = False,
) -> list[Recorded]:
    """Save this rank's parameter gradients to ``out_folder``, and return the log.

    Args:
        padding: treatment of the padding of the batch.
        alone: losses by type, each with one pass in which it alone has its weight; the empty string
            stands for all losses together.
        router_gradients: measure the gradients of either loss in the logits, and log them.
    """

    def adapt(trainer_config: Trainer.Config) -> None:
        trainer_config.metrics.router_gradients = router_gradients
        if padding == "masked":
            loader = trainer_config.dataloader
            trainer_config.dataloader = derive(loader, LoaderWithMask.Config)

    trainer = build_from_seed(seed_folder, out_folder, layout, module, config, model, adapt)

    def run(number: int) -> None:
        # A bias made of the quantiles of a batch leaves tokens of the same batch on the fence.
        seed = 7 if padding == "none" else 7 + number
        batch = global_batch(layout.sequence_length, seed)
        run_batch(trainer, layout, batch, with_main_loss=with_main_loss, padding=padding)

    def step() -> None:
        # No weight moves, and without gradients Adam does not go through them to find that out.
        trainer.optimizers.zero_grad()
        trainer.optimizers.step()

    # A first pass gives the expert bias and the previous step's counts something to hold.
    run(0)
    step()
    layers = moe_layers_of(trainer.model_parts)
    names = list(layers[0].router.aux_losses) if layers else []
    weights_A = layers[0].router.record.weights_A if layers else torch.zeros(0)
    whole_A = weights_A.clone()
    recorded = []
    groups = RankGroups.of(trainer.parallel_dims)
    for number, kind in enumerate(alone, start=1):
        chosen = torch.tensor([kind in ("", name) for name in names], dtype=torch.float32)
        weights_A.copy_(whole_A * chosen.to(whole_A.device))
        run(number)
        gradients = gather_gradients(trainer)
        torch.save(gradients, os.path.join(out_folder, f"{kind}-rank{os.environ['RANK']}.pt"))
        histogram_NEH = layers[0].router.step_record.histogram_NEH if layers else None
        if histogram_NEH is not None:  # of this rank, and only until the step ends
            histogram_NEH = histogram_NEH.long()
            for group in groups.tokens:
                dist.all_reduce(histogram_NEH, group=group)
        step()
        load = reduce_step(layers, groups)
        metrics = [loss.metric_name for loss in AuxLoss.kinds.values()]
        metrics += ["main_gradient_squared", "aux_gradient_squared"]
        losses_M = {
            name: values_M.tolist()
            for name, values_M in load.layer_columns.items()
            if name in metrics
        }
        recorded.append(Recorded(losses_M, load.counts_ME.tolist(), load.layers))
        recorded[-1].bias = {
            layer.router.layer: whole(layer.expert_bias_E)
            for layer in layers
            if layer.expert_bias_E is not None
        }
        sums = layers[0].router.step_record.sums if layers else None
        if sums is not None:
            valid = layers[0].router.sources.valid
            recorded[-1].valid_counts = {
                layer.router.layer: whole(counts_E)
                for layer, counts_E in zip(layers, sums.counts_NSE[:, valid], strict=True)
            }
        if histogram_NEH is not None:
            recorded[-1].histograms = {
                layer.router.layer: whole(histogram_EH)
                for layer, histogram_EH in zip(layers, histogram_NEH, strict=True)
            }
    trainer.close()
    return recorded


Padding = Literal["none", "masked", "cut"]
"""Treatment of padding: none in the batch, a token mask, or rows cut to their own length.

Cut rows need a layout with one row in a micro-batch.
"""


class LoaderWithMask(HuggingFaceTextDataLoader):
    """Stand-in for a loader whose batches have a token mask. The harness feeds batches itself."""

    gives_valid_tokens = True

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTextDataLoader.Config):
        pass


@dataclass
class Recorded:
    """Numbers of one pass, as in a trace."""

    losses: dict[str, list[float]]
    counts: list[list[int]]
    layers: tuple[int, ...]
    bias: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)
    """Biases after the pass, by layer number; on a rank, those of its layers."""
    valid_counts: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)
    """Valid tokens of each expert, the input of all rules and losses."""
    histograms: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)
    """Histograms of the pass, if the bias rule has them."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().to("cpu", copy=True)


def build_from_seed(
    seed_folder: str,
    out_folder: str,
    layout: Layout,
    module: str,
    config: str,
    model: dict[str, Any],
    adapt: Callable[[Trainer.Config], None] = lambda config: None,
) -> Trainer:
    """Build a trainer under a layout with the weights of :func:`save_seed`."""
    trainer_config = _cut_config(out_folder, layout, module, config, model)
    adapt(trainer_config)
    skip_initialisation(trainer_config)
    trainer_config.checkpoint.load_only = True
    trainer_config.checkpoint.initial_load_path = os.path.join(seed_folder, "checkpoint", "step-0")
    trainer = _build(trainer_config)
    trainer.checkpointer.load()
    return trainer


def gather_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gather the whole gradients of this rank's pipeline stages, by parameter name."""
    return {
        canonical(name): whole(parameter.grad)
        for part in trainer.model_parts
        for name, parameter in part.named_parameters()
        if parameter.grad is not None
    }


def run_batch(
    trainer: Trainer,
    layout: Layout,
    batch: tuple[torch.Tensor, ...],
    *,
    with_main_loss: bool,
    padding: Padding = "none",
) -> None:
    """Run forward and backward of this rank's part of a global batch, as ``train_step`` does."""
    tokens, labels, positions = (part.to(trainer.device) for part in batch)
    row_lengths = [part * layout.sequence_length // 16 for part in ROW_SIXTEENTHS]
    lengths = torch.tensor(row_lengths, device=trainer.device).unsqueeze(1)
    mask = torch.arange(layout.sequence_length, device=trainer.device) < lengths
    documents = document_numbers(positions)
    if padding != "none":
        labels = labels.masked_fill(~mask, IGNORE_INDEX)
    valid = int((labels != IGNORE_INDEX).sum())
    if not with_main_loss:
        labels = torch.full_like(labels, IGNORE_INDEX)
        valid = 1
    dp_rank = (
        dist.get_rank(trainer.parallel_dims.get_mesh("batch").get_group()) if layout.dp > 1 else 0
    )
    local = GLOBAL_BATCH_SIZE // layout.dp
    size = layout.microbatch if layout.pp > 1 else local // layout.accumulate
    tables = {"input": tokens, "positions": positions}
    if padding == "masked":
        tables[VALID_TOKENS] = mask
    if any(router.num_documents > 1 for router in routers_of(trainer.model_parts)):
        tables[DOCUMENT_IDS] = documents
    batches = []
    for rows in range(local * dp_rank, local * (dp_rank + 1), size):
        length = row_lengths[rows] if padding == "cut" else layout.sequence_length
        part = slice(rows, rows + size), slice(length)
        batches.append(({name: table[part] for name, table in tables.items()}, labels[part]))
    trainer.optimizers.zero_grad()
    per_pass = len(batches) // layout.accumulate
    for start in range(0, len(batches), per_pass):
        inputs, targets = zip(*batches[start : start + per_pass], strict=True)
        trainer.forward_backward_step(
            input_dict=list(inputs) if layout.pp > 1 else inputs[0],
            labels=list(targets) if layout.pp > 1 else targets[0],
            global_valid_tokens=torch.tensor(valid, device=trainer.device),
        )


def canonical(name: str) -> str:
    """Remove the wrappers of checkpointing and compilation from a parameter name."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def global_batch(length: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make tokens, labels and positions ``(8, length)``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (GLOBAL_BATCH_SIZE, length)
    # Few distinct tokens, unevenly: loads differ between sequences and experts.
    tokens = torch.randint(0, 2048, shape, generator=generator) // torch.randint(
        1, 40, shape, generator=generator
    )
    labels = tokens.roll(-1, dims=1)
    # Two documents in each sequence.
    positions = torch.arange(length).remainder(length // 2 + 8).expand(shape)
    return tokens, labels, positions.contiguous()


def _cut_config(
    folder: str, layout: Layout, module: str, config: str, model: dict[str, Any]
) -> Trainer.Config:
    """Configure the fixed batch under a layout, with checkpoints and logs in ``folder``."""
    trainer_config = make_config(layout, module, config, model)
    trainer_config.dump_folder = folder
    trainer_config.checkpoint.enable = True
    return trainer_config


def _build(config: Trainer.Config) -> Trainer:
    if cpu.needed():
        cpu.adapt(config)
    zero_bubble.adapt(config)
    return config.build()
