"""Jobs of the tests of ``titan-moe-lb place``, on the ranks of a pool."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.support.train_jobs import build, train_config
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.commands.place.command import place
from titan_moe_lb.job import job_config

FLOAT32 = [
    "--training.mixed_precision_param=float32",
    "--override.imports",
    "tests.parity.float32_experts.float32_experts",
]
"""Flags for float32, because in bfloat16 the order of adding a token's experts would show."""


def train_with_hot_experts(arguments: list[str], num_hot: int, by: float) -> None:
    """Train a job whose first experts of every layer begin with a higher bias.

    Gates begin wide, so that rounding, which depends on the order of adding experts, decides
    nothing.
    """
    job = job_config.load(["--debug.no-enable-structured-logging", *arguments])

    def heat(trainer) -> None:
        for layer in moe_layers_of(trainer.model_parts):
            layer.expert_bias_E[:num_hot] += by
            with torch.no_grad():
                layer.router.gate.weight.mul_(10)

    train_config(job.config, prepare=heat)


def logits_around_a_placement(arguments: list[str], folder: str) -> list[torch.Tensor]:
    """Train one step, save, place at random, and load the placed checkpoint. One rank.

    Returns:
        Logits of the trained model, of the placed one, and with only the gates placed.
    """
    run, placed = f"{folder}/run", f"{folder}/placed"
    flags = ["--checkpoint.enable", "--checkpoint.interval=1", "--training.steps=1"]
    flags += ["--checkpoint.no-last-save-model-only", f"--dump_folder={run}"]
    job = job_config.load([*arguments, *FLOAT32, *flags])
    trainer = build(job.config)
    trainer.train()
    (model,) = trainer.model_parts
    layers = moe_layers_of([model])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2000, (2, 64), generator=generator)

    def logits() -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        inputs, _labels, extra = trainer.post_dataloading_process(
            {"input": tokens, "positions": positions}, tokens
        )
        with torch.no_grad(), trainer.train_context():
            return model.lm_head(model.eval()(inputs, **extra)).clone()

    def load(part: str) -> None:
        state = {name: value for name, value in model.state_dict().items() if part in name}
        dcp.load(state, checkpoint_id=f"{placed}/checkpoint/step-1")

    orders = {
        layer.router.layer: torch.randperm(layer.router.num_experts, generator=generator).tolist()
        for layer in layers
    }
    groups = layers[0].router.num_expert_groups or 1
    if groups > 1:  # whole groups, and the experts within them
        orders = {number: _in_groups(order, groups) for number, order in orders.items()}
    file = Path(folder, "random.json")
    file.write_text(json.dumps({"ep_degree": 2, "groups": [groups], "orders": orders}))
    found = [logits()]
    place(Path(run), output=Path(placed), file=file)
    load("router.gate")
    gates_alone = logits()
    load("")
    found += [logits(), gates_alone]
    trainer.close()
    return found


def _in_groups(order: list[int], groups: int) -> list[int]:
    size = len(order) // groups
    first = list(dict.fromkeys(expert // size for expert in order))
    return [expert for group in first for expert in order if expert // size == group]


def save_in_a_grid(folder: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint whose tensors with two or more axes are cut along two. Four ranks."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2))
    state = {
        name: distribute_tensor(tensor, mesh, [Shard(0), Shard(1)]) if tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }
    dcp.save(state, checkpoint_id=folder)


def layer_state(number: int, num_experts: int = 8) -> dict[str, torch.Tensor]:
    """Small MoE layer with torchtitan's names, and its optimizer state."""
    layer = f"layers.{number}.moe"
    random = torch.Generator().manual_seed(number)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    model = {
        f"{layer}.router.gate.weight": drawn(num_experts, 6),
        f"{layer}.routed_experts.inner_experts.w1_EFD": drawn(num_experts, 4, 6),
        f"{layer}.expert_bias_E": drawn(num_experts),
        f"{layer}.shared_experts.w1.weight": drawn(num_experts, 6),
        f"layers.{number}.attention.wq.weight": drawn(num_experts, 6),
    }
    moments = {
        f"optimizer.state.{name}.{slot}": drawn(*value.shape) if slot == "exp_avg" else drawn(1)[0]
        for name, value in model.items()
        if "bias" not in name
        for slot in ("exp_avg", "step")
    }
    return model | moments


def saved(folder: Path, **changes) -> Path:
    """Write a checkpoint of two such layers, with other entries, or without an entry that is
    None."""
    state = layer_state(1) | layer_state(2)
    state |= {"train_state.step": 7, "optimizer.param_groups.layers.1.moe.router.gate.weight.lr": 1}
    for name, value in changes.items():
        state[name] = value
    dcp.save({k: v for k, v in state.items() if v is not None}, checkpoint_id=folder, no_dist=True)
    return folder
