"""Trainers of ``torchtitan.experiments``, on the ranks of a pool.

Each runs twice at learning rate 0: torchtitan's own model, whose routers are watched, and the
balanced model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan import experiments
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw, register_moe_load_balancing_hook
from torchtitan.config import (
    CompileConfig,
    OverrideConfig,
    ParallelismConfig,
    TrainingConfig,
    apply_overrides,
)
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models import deepseek_v3
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model_registry import recipes
from model_registry.deepseek_v3 import tiny
from tests.support.own_loop_jobs import forward
from tests.support.textbook import mean_loss, sequence_counts
from titan_moe_lb.balancing.freezing import Freeze
from titan_moe_lb.balancing.losses import SequenceWiseAuxLoss
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.transformers_backend import balanced_transformers
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.upstream import cpu
from titan_moe_lb.wiring.model_spec import balanced

STEPS, MICRO_BATCHES, ROWS, SEQ_LEN = 3, 2, 2, 32
LOSSES = [SequenceWiseAuxLoss.Config(weight=1.0)]
LONGEST = 1e9  # of the gradients: none is clipped


@dataclass
class Seen:
    """Recorded numbers of every step, on one rank."""

    counts: list[list[list[int]]] = field(default_factory=list)
    """Tokens of each expert of each MoE layer, over all ranks."""

    biases: list[list[list[float]]] = field(default_factory=list)

    gate_gradients: list[torch.Tensor] = field(default_factory=list)
    """Gate gradient of the last MoE layer, which gets no aux loss but its own."""

    textbook_gradients: list[torch.Tensor] = field(default_factory=list)
    """Expected contribution of the aux loss to it, from torchtitan's model."""


def spec(ours: bool) -> ModelSpec:
    """Build the tiny DeepSeek-V3, torchtitan's own or balanced."""
    upstream = deepseek_v3.model_registry("debugmodel")
    upstream.model = tiny("flex", "standard")
    return balanced(upstream, aux_losses=LOSSES) if ours else upstream


def on_host(model_spec: ModelSpec) -> ModelSpec:
    """Prepare the host as a job needs it, which these trainers do not do."""
    if cpu.needed():
        cpu.adapt_spec(model_spec)
        apply_overrides(OverrideConfig(imports=[cpu.DENSE_ATTENTION]), model_spec.model)
    return model_spec


def watch(parts: list[nn.Module], optimizers: Any, dims: ParallelDims) -> Seen:
    """Record each step of the model; call it before the first forward."""
    seen = Seen()
    layers = [module for part in parts for module in part.modules() if isinstance(module, MoE)]
    ours = moe_layers_of(parts) == layers
    assert ours or not moe_layers_of(parts)
    noted: list[list[torch.Tensor]] = [[] for _ in layers]
    gate = layers[-1].router.gate

    def note(row: int, out: tuple[torch.Tensor, ...]) -> None:
        noted[row].append(out[1].detach().clone())

    def note_textbook(inputs: tuple, out: tuple[torch.Tensor, ...]) -> None:
        weight = whole(gate.weight).detach().clone().requires_grad_()
        logits = inputs[0].detach() @ weight.T
        softmax = layers[-1].router.score_func == "softmax"
        scores = logits.softmax(dim=-1) if softmax else logits.sigmoid()
        mean_loss("sequence_wise", None, scores, out[1]).backward()
        seen.textbook_gradients.append(weight.grad)

    if not ours:
        for row, layer in enumerate(layers):
            layer.router.register_forward_hook(lambda _m, _i, out, row=row: note(row, out))
        layers[-1].router.register_forward_hook(lambda _m, inputs, out: note_textbook(inputs, out))

    def before_step(*_: Any) -> None:
        parameters = [p for part in parts for p in part.named_parameters()]
        gradients = [p.grad for name, p in parameters if name.endswith("router.gate.weight")]
        seen.gate_gradients.append(whole(gradients[-1]).clone())

    def after_step(*_: Any) -> None:
        seen.biases.append([whole(layer.expert_bias_E).tolist() for layer in layers])
        if ours:
            seen.counts.append(reduce_step(layers, RankGroups.of(dims)).counts_ME.tolist())
            return
        counts = torch.stack(
            [sequence_counts(torch.cat(ids), layers[0].router.num_experts).sum(0) for ids in noted]
        )
        dist.all_reduce(counts)
        seen.counts.append(counts.long().tolist())
        for ids in noted:
            ids.clear()

    optimizers.register_step_pre_hook(before_step)
    optimizers.register_step_post_hook(after_step)
    return seen


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def policy_trainer(ours: bool, parallelism: ParallelismConfig) -> Seen:
    """Run torchtitan's reinforcement-learning trainer through its endpoints."""
    trainer_class, micro_batch_class = _without_actors()
    model_spec = spec(ours)
    training = TrainingConfig(
        seq_len=SEQ_LEN, steps=STEPS, max_norm=LONGEST, mixed_precision_param="float32"
    )
    config = trainer_class.Config(
        optimizer=default_adamw(lr=0.0), training=training, parallelism=parallelism
    )
    config.debug.seed = 0
    config.debug.enable_structured_logging = False
    if not ours:  # recomputed forwards would be noted twice
        config.ac_config = None
    trainer = trainer_class(
        config, model_spec=on_host(model_spec), compile_config=CompileConfig(), output_dir=""
    )
    parts, optimizers, dims = trainer.model_parts, trainer.optimizers, trainer.parallel_dims
    rows = ROWS * MICRO_BATCHES * trainer.dp_size
    if ours:
        attach(parts, optimizers, dims, rows_per_step=rows, finished_steps=trainer.policy_version)
    else:  # the trainer itself never moves the bias
        register_moe_load_balancing_hook(optimizers, parts, dims)
    seen = watch(parts, optimizers, dims)
    for step in range(STEPS):
        for number in range(MICRO_BATCHES):
            batches = [
                micro_batch_class(
                    token_ids=_tokens(step, number, rank),
                    labels=_tokens(step, number, rank).roll(-1, dims=1),
                    positions=torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN),
                    generator_logprobs=torch.full((ROWS, SEQ_LEN), -7.0),
                    loss_mask=torch.ones(ROWS, SEQ_LEN, dtype=torch.bool),
                    advantages=torch.ones(ROWS, SEQ_LEN),
                )
                for rank in range(trainer.dp_size)
            ]
            asyncio.run(trainer.forward_backward(batches, rows * SEQ_LEN))
        asyncio.run(trainer.optim_step())
    return seen


def _tokens(step: int, number: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * number + rank)
    return torch.randint(0, 2000, (ROWS, SEQ_LEN), generator=generator)


def _without_actors() -> tuple[Any, Any]:
    """Import the classes of the trainer and its micro-batches.

    Minimal modules replace the actor framework, torchstore, and the package's own ``__init__``,
    which imports vLLM.
    """

    def endpoint(function: Any) -> Any:
        return function

    actor = ModuleType("monarch.actor")
    actor.__dict__.update(
        Actor=type("Actor", (), {}),
        endpoint=endpoint,
        concurrent_endpoint=endpoint,
        current_rank=lambda: SimpleNamespace(rank=dist.get_rank() if dist.is_initialized() else 0),
    )
    face = ModuleType("torchtitan.experiments.rl")
    face.__path__ = [f"{experiments.__path__[0]}/rl"]
    for module in (ModuleType("monarch"), actor, ModuleType("torchstore"), face):
        sys.modules.setdefault(module.__name__, module)
    trainer = importlib.import_module("torchtitan.experiments.rl.actors.trainer")
    types = importlib.import_module("torchtitan.experiments.rl.types")
    return trainer.PolicyTrainer, types.TrainingMicrobatch


def _job(model_spec: ModelSpec, loss: CrossEntropyLoss.Config | None = None) -> Trainer.Config:
    config = recipes.debug(model_spec, loss, local_batch_size=ROWS, seq_len=SEQ_LEN)
    config.optimizer = default_adamw(lr=0.0)
    config.training.steps = STEPS
    config.training.global_batch_size = ROWS * MICRO_BATCHES
    config.training.max_norm = LONGEST
    config.training.mixed_precision_param = "float32"
    config.debug.seed = 0
    config.debug.enable_structured_logging = False
    config.metrics.write_moe_trace = False
    return config


def _fields_of(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def graph_trainer(ours: bool, mode: str | None = None, passes: bool = False) -> Seen:
    """Run the graph trainer's DeepSeek-V3. One rank.

    Args:
        mode: mode of its compilation; None: eager.
        passes: True to run its graph passes too, one of which recomputes activations.
    """
    configs = importlib.import_module("torchtitan.experiments.graph_trainer.configs")
    package = importlib.import_module("torchtitan.experiments.graph_trainer.deepseek_v3")
    config = configs.to_graph_trainer_config(_job(spec(ours=False)), package.model_registry)
    if ours:
        config.model_spec = balanced(config.model_spec, aux_losses=LOSSES)
    config.compile = configs.GraphTrainerCompileConfig(
        enable=mode is not None,
        mode=mode,
        enable_passes=passes,
        # Asks Triton for the memory bandwidth of a GPU.
        disable_passes=["joint_transformer_block_bucketing_reordering_pass"],
    )
    if cpu.needed():
        cpu.adapt(config)
    return _train(config)


def fault_tolerant_trainer(ours: bool) -> Seen:
    """Run the trainer of ``experiments/torchft`` without its replicas. One rank."""
    folder = "torchtitan.experiments.torchft"
    trainer_class = importlib.import_module(f"{folder}.trainer").FaultTolerantTrainer
    checkpoint = importlib.import_module(f"{folder}.checkpoint").TorchFTCheckpointManager.Config()
    model_spec = on_host(spec(ours))
    # Not the chunked loss, nor the backend: this trainer prepares neither, torchtitan's does.
    loss = CrossEntropyLoss.Config(global_vocab_size=model_spec.model.vocab_size)
    job = _job(model_spec, loss)
    set_spmd_backend(job.parallelism.spmd_backend)
    return _train(trainer_class.Config(**_fields_of(job) | {"checkpoint": checkpoint}))


def frozen_transformers_trainer(folder: str) -> list[tuple[str, bool, bool, bool]]:
    """Run it with sigmoid scores, the gate of layer 0 and the bias of layer 1 frozen.

    Returns:
        For each layer: the score function; whether the gate learns, has a gradient, and the bias
        has moved.
    """
    _seen, parts = _transformers_trainer(
        folder, balanced_transformers, score_func="sigmoid", freeze=Freeze(gate=0, bias=1)
    )
    return [
        (
            layer.router.score_func,
            layer.router.gate.weight.requires_grad,
            layer.router.gate.weight.grad is not None,
            bool(layer.expert_bias_E.any()),
        )
        for layer in moe_layers_of(parts)
    ]


def transformers_trainer(ours: bool, folder: str) -> Seen:
    """Run a Hugging Face model with torchtitan's MoE layers. One rank.

    Args:
        folder: folder of the model's ``config.json``.
    """
    return _transformers_trainer(folder, balanced_transformers if ours else None)[0]


def _transformers_trainer(
    folder: str, balance: Any, **arguments: Any
) -> tuple[Seen, list[nn.Module]]:
    package = "torchtitan.experiments.transformers_modeling_backend"
    backend = importlib.import_module(package)
    config_class = importlib.import_module(f"{package}.configs").TransformersBackendConfig
    model = backend.HFTransformerModel.Config(model_config=backend.TitanMoeModelConfig())
    model_spec = dataclasses.replace(backend.model_registry("debugmodel_moe"), model=model)
    if balance is not None:
        model_spec = balance(model_spec, aux_losses=LOSSES, **arguments)
    else:
        model_spec.post_optimizer_build_fn = _initialize_and_move_bias
    job = _job(model_spec, CrossEntropyLoss.Config())
    job.metrics = MetricsProcessor.Config()
    if cpu.needed():
        cpu.adapt(job)
        job.override.imports.clear()  # which know torchtitan's own attention
        AttentionInterface.register(model.attn_implementation, _dense_attention)
    trainer = config_class(**_fields_of(job), hf_model=folder).build()
    parts, optimizers, dims = trainer.model_parts, trainer.optimizers, trainer.parallel_dims
    if balance is not None:
        attach(parts, optimizers, dims, rows_per_step=ROWS * MICRO_BATCHES)
    # The backend leaves some weights, and the frequencies, to what the memory held.
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parts[0].parameters():
            parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(std=0.02)
        for name, buffer in parts[0].named_buffers():
            if name.endswith("inv_freq"):
                buffer.fill_(0.1)
    seen = watch(parts, optimizers, dims)
    trainer.train()
    trainer.close()
    return seen, parts


def _initialize_and_move_bias(optimizers: Any, parts: list[nn.Module], dims: ParallelDims) -> None:
    for module in parts[0].modules():
        if isinstance(module, MoE):
            module.init_states()
    register_moe_load_balancing_hook(optimizers, parts, dims)


def _dense_attention(module, query, key, value, attention_mask, *, scaling, **_):
    """Use dense attention, because FlexAttention has no backward on the host."""
    (mask,) = attention_mask.mask_mod.args
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)


def _train(config: Trainer.Config) -> Seen:
    trainer = config.build()
    seen = watch(trainer.model_parts, trainer.optimizers, trainer.parallel_dims)
    trainer.train()
    trainer.close()
    return seen


def forge_engine(ours: bool) -> Seen:
    """Run a loop around the engine of ``experiments/forge``. One rank."""
    engine_class = importlib.import_module("torchtitan.experiments.forge.engine").ForgeEngine
    model_spec = on_host(spec(ours))
    # The engine asks its spec for a loss, which ModelSpec has not in torchtitan 0.3.0.
    model_spec.loss = SimpleNamespace(build=lambda *_, **__: None)
    job = _fields_of(_job(model_spec))
    names = [f.name for f in dataclasses.fields(engine_class.Config)]
    engine = engine_class(engine_class.Config(**{name: job[name] for name in names}))
    parts, optimizers, dims = engine.model_parts, engine.optimizers, engine.parallel_dims
    if ours:
        attach(parts, optimizers, dims, rows_per_step=ROWS * MICRO_BATCHES)
    seen = watch(parts, optimizers, dims)
    for step in range(STEPS):
        with engine.train_context():
            for number in range(MICRO_BATCHES):
                forward(parts[0], _tokens(step, number, 0)).square().mean().backward()
        optimizers.step()
        optimizers.zero_grad()
    return seen


def forge_engine_as_it_is() -> str:
    """Return the engine's error for torchtitan's own spec."""
    engine_class = importlib.import_module("torchtitan.experiments.forge.engine").ForgeEngine
    try:
        engine_class(_job(on_host(spec(ours=False))))
    except AttributeError as error:
        return str(error)
    return ""
