"""Own training loops on the ranks of a pool."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchtitan.config import (
    OverrideConfig,
    ParallelismConfig,
    TrainingConfig,
    apply_overrides,
)
from torchtitan.protocols.model_spec import ModelSpec

from examples.chat_data import loader_config
from model_registry.deepseek_v3 import model_registry
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import (
    AuxLoss,
    EntropyLoss,
    GlobalBatchAuxLoss,
    ImportanceLoss,
    RouterZLoss,
    SequenceWiseAuxLoss,
)
from titan_moe_lb.balancing.router import moe_layers_of, routers_of
from titan_moe_lb.balancing.value_schedule import Change
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.balance import Balance
from titan_moe_lb.own_loop.build import BuiltModel, build_model
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.run.train import trainer_config
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.upstream import cpu
from titan_moe_lb.wiring.model_spec import balanced

SEQ_LEN = 64
FLOAT32 = "tests.parity.float32_experts.float32_experts"
LOSSES = (SequenceWiseAuxLoss, GlobalBatchAuxLoss, ImportanceLoss, EntropyLoss, RouterZLoss)
LENGTHS = (64, 64, 40, 24)
"""Numbers of tokens of the rows of one global batch."""


class Layer(nn.Module):
    """Model of one MoE layer; its input stands for tokens."""

    def __init__(self, loss: AuxLoss.Config | None = None, **options: Any) -> None:
        super().__init__()
        config = model_registry("tiny", aux_losses=[loss] if loss else [], **options)
        self.moe = config.model.layers[-1].moe.build()
        with torch.no_grad():
            self.moe.init_states(buffer_device=torch.device("cpu"))

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return self.moe(x_BLD)


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]


def built(parallelism: ParallelismConfig | None = None) -> BuiltModel:
    """Build the tiny DeepSeek-V3 with losses of every kind, and the same weights in every
    layout."""
    built = build_model(
        _spec(),
        training=TrainingConfig(seq_len=SEQ_LEN, mixed_precision_param="float32"),
        parallelism=parallelism,
        override_imports=[FLOAT32],
    )
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(built.model, plain_model().state_dict(), options=options)
    return built


def plain_model(**settings: Any) -> nn.Module:
    """Build the same model without torchtitan's parallelism, with other settings of balanced()."""
    return initialised(balanced(_spec(), **settings) if settings else _spec())


def initialised(spec: ModelSpec) -> nn.Module:
    """Build the model of a spec in float32 from one seed, without torchtitan's parallelism."""
    spec.model.update_from_config(config=SimpleNamespace(parallelism=ParallelismConfig()))
    host = [cpu.DENSE_ATTENTION] if cpu.needed() else []
    apply_overrides(OverrideConfig(imports=[FLOAT32, *host]), spec.model)
    torch.manual_seed(0)
    model = spec.model.build()
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model.train()


def _spec() -> ModelSpec:
    return model_registry("tiny", aux_losses=[loss.Config(weight=0.1) for loss in LOSSES])


def forward(
    model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand(*tokens.shape)
    masks = plain.get_attention_masks(positions)
    return model(tokens, attention_masks=masks, positions=positions, **kwargs)


def _report(model: nn.Module, balance: Balance, gradients: dict[str, Any]) -> dict[str, Any]:
    """Report gradients of the routers' losses alone, valid tokens of each expert, and metrics."""
    router = routers_of([model])[0]
    sums = router.step_record.reduce([])
    return {
        "gradients": gradients,
        "counts": sums.counts_NSE[:, router.sources.valid].tolist(),
        "metrics": balance.metrics(),
    }


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            whole[name.removeprefix("module.")] = (
                gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
            )
    return whole


def padded_batch() -> dict[str, Any]:
    """Run one forward of all rows, padded to one length. One rank."""
    model, dims, context = built()
    balance = attach(model, None, dims, rows_per_step=len(LENGTHS), padded=True)
    tokens = torch.zeros(len(LENGTHS), SEQ_LEN, dtype=torch.int64)
    for row, filled in zip(rows(), tokens, strict=True):
        filled[: len(row)] = row
    mask = torch.arange(SEQ_LEN) < torch.tensor(LENGTHS).unsqueeze(1)
    with context():
        (0.0 * forward(model, tokens, valid_tokens=mask)).sum().backward()
    balance.close_step()
    return _report(model, balance, _gradients(model))


def unequal_micro_batches(
    cut: Sequence[Sequence[Sequence[int]]], parallelism: ParallelismConfig, ddp: bool = False
) -> dict[str, Any]:
    """Run these rows in micro-batches of their own lengths.

    Args:
        cut: row numbers by rank and micro-batch; rows of a micro-batch have one length.
        ddp: use torch's DistributedDataParallel, which averages the gradients.
    """
    model: nn.Module
    dims, context = None, nullcontext
    if ddp:
        dist.init_process_group()
        model = DistributedDataParallel(plain_model())
    else:
        model, dims, context = built(parallelism)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balance = attach(model, optimizer, dims, gradients="mean" if ddp else "sum")
    whole = rows()
    # A step that is skipped, and forwards that teach nothing.
    balance.begin_step(len(LENGTHS))
    with context():
        (0.0 * forward(model, torch.stack([whole[0]]))).sum().backward()
        optimizer.zero_grad()
        balance.begin_step(len(LENGTHS))
        with torch.no_grad():
            forward(model, torch.stack([whole[2]]))
        model.eval()
        forward(model, torch.stack([whole[3]]))
        model.train()
        mine = cut[dist.get_rank()]
        for number, micro_batch in enumerate(mine):
            tokens = torch.stack([whole[row] for row in micro_batch])
            if ddp:
                model.require_backward_grad_sync = number == len(mine) - 1
            (0.0 * forward(model, tokens)).sum().backward()
    gradients = _gradients(model)
    optimizer.step()
    report = _report(model, balance, gradients)
    counts = torch.tensor(report["counts"])
    dist.all_reduce(counts)
    # Summed over ranks once already where the bias moves.
    report["counts"] = (counts // dist.get_world_size()).tolist()
    return report


def as_the_trainer(
    arguments: list[str], steps: int, chats: str | None = None
) -> tuple[list[Any], list[Any]]:
    """Return counts and metrics of torchtitan's trainer and of a loop, on the same batches and
    weights.

    Args:
        chats: folder of a chat data set, whose rows are padded.
    """
    flags = ["--optimizer.param_groups.0.optimizer_kwargs.lr=0.0", f"--training.steps={steps}"]
    config = trainer_config(*arguments, *flags)
    config.metrics.write_moe_trace = False
    if chats is not None:
        config.dataloader = loader_config(chats)
        config.hf_assets_path = f"{chats}/tokenizer"
    spec = model_registry("tiny")
    trainer = config.build()
    model, dims, context = build_model(spec, training=config.training)
    model.load_state_dict(trainer.model_parts[0].state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = config.training.local_batch_size
    balance = attach(model, optimizer, dims, rows_per_step=rows, padded=chats is not None)
    batches = trainer.batch_generator(trainer.dataloader)
    theirs, ours = [], []
    for step in range(1, steps + 1):
        inputs, labels = next(batches)
        trainer.step = step
        trainer.train_step(iter([(inputs, labels)]))
        load = reduce_step(moe_layers_of(trainer.model_parts), RankGroups.of(trainer.parallel_dims))
        theirs.append((load.counts_ME.tolist(), load.layer_columns, load.step_columns))
        with context():
            forward(model, inputs.pop("input"), **inputs).sum().mul(0.0).backward()
        optimizer.step()
        load = balance.load()
        ours.append((load.counts_ME.tolist(), load.layer_columns, load.step_columns))
    trainer.close()
    return theirs, ours


def train_on_rows_of_another_number(arguments: list[str]) -> None:
    """Train with six rows in each forward, whatever the job announces."""
    flags = ["--module=deepseek_v3", "--config=deepseek_v3_tiny", "--training.local_batch_size=2"]
    config = trainer_config(*flags, *arguments)
    config.metrics.write_moe_trace = False
    trainer = config.build()
    tokens = torch.zeros(6, config.training.seq_len, dtype=torch.int64)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = {"input": tokens, "positions": positions}
    trainer.train_step(itertools.repeat((batch, tokens)))


def steps_of_unequal_ranks() -> tuple[list[float], list[float]]:
    """Train four steps; rank 0 has two rows of 8 tokens, rank 1 six.

    Returns:
        The weight of the z-loss in each step (0.5, and 0.125 after 128 tokens), and the bias.
    """
    dist.init_process_group()
    change = Change(tokens=128, value=0.125)
    torch.manual_seed(0)
    model = Layer(
        RouterZLoss.Config(weight=0.5, changes=[change]),
        expert_bias=SignBias.Config(speed=0.1, changes=[change]),
    )
    balance = attach(model)
    weights = []
    for _ in range(4):
        balance.begin_step(8)
        model(torch.randn(2 + 4 * dist.get_rank(), 8, 64)).sum().backward()
        weights.append(8 * float(model.moe.router.record.weights_A))
        balance.close_step()
    return weights, model.moe.expert_bias_E.tolist()


def norms_at_the_gates(parallelism: ParallelismConfig | None = None) -> list[list[float]]:
    """Return what a self-test measures at each gate: the model's gradient and those of the losses."""
    model, dims, context = built(parallelism)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance = attach(model, optimizer, dims, rows_per_step=4)
    tokens = torch.randint(0, 256, (4, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]

    def forward_backward() -> None:
        with context():
            (forward(model, mine).float().square().sum() / tokens.numel()).backward()

    layers = balance.check(forward_backward, optimizer).measured.layers
    return [[layer.main_norm, *(loss.norm for loss in layer.losses)] for layer in layers]


def faults_beside_a_wrong_dtype_on_rank_1(parallelism: ParallelismConfig) -> list[str]:
    """Return the kinds of the faults that a self-test names where one rank has a bfloat16 bias."""
    model, dims, context = built(parallelism)
    balance = attach(model, None, dims, rows_per_step=4)
    tokens = torch.randint(0, 256, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    if dist.get_rank() == 1:
        layer = moe_layers_of([model])[0]
        layer.expert_bias_E = layer.expert_bias_E.bfloat16()

    def forward_backward() -> None:
        with context():
            forward(model, tokens).float().square().sum().backward()

    return [fault.kind for fault in balance.check(forward_backward).faults]
