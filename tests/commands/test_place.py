"""Tests of ``titan-moe-lb place`` on trained checkpoints: same function, same training."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoModelForCausalLM

from tests.models import test_hugging_face as hugging_face
from tests.support.place_jobs import FLOAT32, logits_around_a_placement, train_with_hot_experts
from tests.support.train_jobs import train
from titan_moe_lb.checkpoints.placement_file import FILE_NAME, read
from titan_moe_lb.checkpoints.resume_point import read_metadata
from titan_moe_lb.commands.place.command import place
from titan_moe_lb.commands.plan.command import make_plan
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.traces.trace import Trace, read_trace

TRAIN = [
    *FLOAT32,
    *("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.no-last-save-model-only"),
    *(
        "--training.seq_len=128",
        "--debug.seed=1",
        "--debug.deterministic",
        "--lr_scheduler.total_steps=8",
    ),
]
DEEPSEEK = [
    *("--config", "deepseek_v3_tiny", "--model.expert_bias", '{type="quantile_trend"}'),
    "--model.aux_losses",
    '[{type="global_batch", weight=0.1}, {type="device_level", weight=0.1, num_device_groups=4}]',
]
QWEN = [
    *("--module", "qwen3", "--config", "qwen3_tiny", "--model.expert_bias", '{type="momentum"}'),
    *("--model.aux_losses", '[{type="global_batch", weight=0.1}]'),
]
SAME = ("loss_metrics/global_avg_loss", "moe/max_violation", "moe/global_load_balancing_loss")


def layout(**degrees: int) -> list[str]:
    return [f"--parallelism.{name}_degree={number}" for name, number in degrees.items()]


FSDP2 = layout(data_parallel_shard=2)
EP2 = layout(data_parallel_shard=2, expert_parallel=2)
PP2 = layout(data_parallel_shard=2, pipeline_parallel=2)
EP4 = layout(data_parallel_shard=4, expert_parallel=4)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Run of two steps, its next three steps, and these steps again from the placed checkpoint."""

    job: list[str]
    folder: Path
    before: tuple[list[dict], Trace]
    after: tuple[list[dict], Trace]


def scene(ranks, folder: Path, job: list[str], layout: list[str], ep: int) -> Scene:
    """Run whose first rank begins with hot experts, placed by the loads of the next steps."""
    run, placed = folder / "run", folder / "placed"
    flags = [*job, *TRAIN, *layout, "--training.steps=2", f"--dump_folder={run}"]
    ranks.run(ep, train_with_hot_experts, flags, 8 // ep, 0.1)
    before = resumed(ranks, job, run, layout)
    place(run, output=placed, ep=ep, from_run=before[1].path.parent)
    return Scene(job=job, folder=folder, before=before, after=resumed(ranks, job, placed, layout))


@pytest.fixture(scope="module")
def deepseek(ranks, tmp_path_factory) -> Scene:
    """Run at EP2 with two expert groups on each rank, two losses, and a trend rule."""
    return scene(ranks, tmp_path_factory.mktemp("deepseek"), DEEPSEEK, EP2, 2)


@pytest.fixture(scope="module")
def qwen(ranks, tmp_path_factory) -> Scene:
    """Run at EP4 without groups."""
    return scene(ranks, tmp_path_factory.mktemp("qwen"), QWEN, EP4, 4)


def resumed(ranks, job: list[str], run: Path, layout: list[str]) -> tuple[list[dict], Trace]:
    """Continue a copy of a run for three steps; return their trace."""
    degrees = [int(flag.partition("=")[2]) for flag in layout if "expert" not in flag]
    folder = run.with_name(f"{run.name}-{'-'.join(flag[-20:] for flag in layout)}")
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.arrow"))
    flags = [*layout, "--training.steps=5", "--checkpoint.load_only", f"--dump_folder={folder}"]
    logged = ranks.run(math.prod(degrees), train, [*job, *TRAIN, *flags], first_step=3)
    # Only the last stage of a pipeline sees the loss.
    return next(one for one in logged if one and SAME[0] in one[0]), read_trace(folder)


def assert_same_training(before: tuple[list[dict], Trace], after: tuple[list[dict], Trace], file):
    assert len(before[0]) == len(after[0]) == 3
    for one, other in zip(before[0], after[0], strict=True):
        for name in SAME:
            assert other[name] == pytest.approx(one[name], rel=1e-6), name
    orders = read(file).orders
    moved = [not np.array_equal(orders[layer], np.arange(8)) for layer in before[1].layers]
    assert sum(moved) > len(moved) / 2
    for row, layer in enumerate(before[1].layers):
        renumbered = before[1].counts_SME[:, row][:, orders[layer]]
        np.testing.assert_array_equal(after[1].counts_SME[:, row], renumbered)


@pytest.mark.parametrize("layout", [PP2, FSDP2], ids=["PP2", "FSDP2"])
def test_training_goes_on_as_it_would_have_in_other_layouts(ranks, deepseek, layout):
    runs = [resumed(ranks, DEEPSEEK, deepseek.folder / name, layout) for name in ("run", "placed")]
    assert_same_training(*runs, deepseek.folder / "placed" / FILE_NAME)


@pytest.mark.parametrize("name", ["deepseek", "qwen"])
def test_a_hot_rank_is_as_loaded_as_was_planned(name, request):
    """EP2 and EP4 have the planned load and the same training."""
    found: Scene = request.getfixturevalue(name)
    file = found.folder / "placed" / FILE_NAME
    assert_same_training(found.before, found.after, file)
    traces = {"contiguous": found.before[1], "greedy": found.after[1]}
    info = traces["greedy"].info
    assert traces["contiguous"].info.placement is None and info.placement == read(file).title
    assert info.expert_groups == ((4,) if name == "deepseek" else ())
    question = PlanArguments(
        hardware="h100",
        ranks=info.ep,
        ep=str(info.ep),
        from_run=traces["contiguous"].path.parent,
        job_flags=tuple(found.job),
    )
    (degree,) = make_plan(question).degrees
    tokens = degree.tokens_per_rank * info.top_k
    overload = {}
    for row in degree.measured:
        overload[row.placement] = row.last.busiest_rank_tokens / tokens
        measured = traces[row.placement].over_steps("max_overload_factor")[-1]
        assert measured == pytest.approx(overload[row.placement], rel=1e-9)
    assert overload["contiguous"] > 1.1 * overload["greedy"]


def stored(run: Path) -> dict[str, torch.Tensor | bytes]:
    """Read everything that a checkpoint stores, each chunk by itself."""
    reader = FileSystemReader(run / "checkpoint" / "step-2")
    metadata = read_metadata(Path(reader.path))
    found = {}
    for index, info in metadata.storage_data.items():
        with open(Path(reader.path) / info.relative_path, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        found[f"{index.fqn} {index.offset}"] = data
        if not isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            found[f"{index.fqn} {index.offset}"] = torch.load(io.BytesIO(data))
    return found


BY_EXPERT = {
    *("expert_bias_E", "router.gate.weight", "router.aux_losses.global_batch.load_E"),
    *(f"routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD")),
    "router.expert_bias.trend_E",
}


def test_undo_gives_back_every_bit_and_nothing_else_was_touched(deepseek):
    folder = deepseek.folder
    place(folder / "placed", output=folder / "back", undo=True)
    first, placed, back = (stored(folder / name) for name in ("run", "placed", "back"))
    assert first.keys() == placed.keys() == back.keys() and len(first) > 800

    def same(one, other) -> bool:
        if isinstance(one, bytes):
            return one == other
        return one.dtype == other.dtype and torch.equal(
            one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        )

    assert all(same(first[name], back[name]) for name in first)
    assert not (folder / "back" / FILE_NAME).exists()
    differ = {name.split(" ")[0] for name in first if not same(first[name], placed[name])}
    tails = {re.sub(r".*layers\.\d\.moe\.", "", name) for name in differ}
    moments = {f"{name}.{slot}" for name in BY_EXPERT for slot in ("exp_avg", "exp_avg_sq")}
    assert tails - moments == BY_EXPERT
    assert len(tails & moments) == 8  # of the gate and three weights


@pytest.mark.parametrize("module", ["deepseek_v3", "qwen3", "gpt_oss", "llama4"])
def test_logits_of_every_model(ranks, module, tmp_path):
    arguments = ["--module", module, "--config", f"{module}_tiny", "--debug.seed=1"]
    ((before, after, gates_alone),) = ranks.run(
        1, logits_around_a_placement, arguments, str(tmp_path)
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert (gates_alone - before).abs().max() > 1e-4


@pytest.mark.parametrize("make", ["deepseek_v3", "qwen3", "gpt_oss_"])
def test_hugging_face_checkpoints(make, tmp_path):
    """transformers computes the same logits; --undo writes the same files."""
    torch.manual_seed(0)
    model = getattr(hugging_face, make)().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1).add_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(tmp_path / "first", max_shard_size="300KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 2
    layers = [1, 2, 3] if make == "deepseek_v3" else [0, 1, 2, 3]
    order = [5, 4, 0, 1, 7, 6, 2, 3]  # which keeps DeepSeek's four groups
    file = tmp_path / "placement.json"
    table = {"ep_degree": 4, "groups": [4], "orders": dict.fromkeys(layers, order)}
    file.write_text(json.dumps(table))
    place(tmp_path / "first", output=tmp_path / "placed", file=file)
    tokens = torch.randint(hugging_face.SIZES["vocab_size"], (2, 64))
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "placed", attn_implementation="eager", dtype=torch.float32
    ).eval()
    for one, two in zip(model.modules(), other.modules(), strict=True):
        if hasattr(one, "variance_epsilon"):
            two.variance_epsilon = one.variance_epsilon
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    place(tmp_path / "placed", output=tmp_path / "back", undo=True)
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    moved = [
        name
        for path in sorted((tmp_path / "first").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
        if not torch.equal(tensor, load_file(tmp_path / "placed" / path.name)[name])
    ]
    assert moved and not any("shared" in name or "attn" in name for name in moved)
