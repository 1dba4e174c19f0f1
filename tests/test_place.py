"""``titan-moe-lb place`` on trained checkpoints: the same function, the same training."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoModelForCausalLM

from tests import test_hugging_face as hugging_face
from tests.place_jobs import FLOAT32, logits_around_a_placement, train_with_hot_experts
from tests.train_jobs import train
from titan_moe_lb import checkpoints
from titan_moe_lb.place.command import place
from titan_moe_lb.place.placement import FILE_NAME, read
from titan_moe_lb.plan.command import make_plan
from titan_moe_lb.plan.question import Question
from titan_moe_lb.traces.trace import Trace, read_trace

TRAIN = [
    *FLOAT32,
    *("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.no-last-save-model-only"),
    *("--debug.seed=1", "--debug.deterministic", "--lr_scheduler.total_steps=8"),
]
FSDP2 = ["--parallelism.data_parallel_shard_degree=2"]
EP2 = [*FSDP2, "--parallelism.expert_parallel_degree=2"]
EP4 = ["--parallelism.data_parallel_shard_degree=4", "--parallelism.expert_parallel_degree=4"]
PP2 = ["--parallelism.pipeline_parallel_degree=2"]
DEEPSEEK = [
    *("--config", "deepseek_v3_tiny", "--model.expert_bias", '{type="quantile_trend"}'),
    "--model.aux_losses",
    '[{type="global_batch", weight=0.1}, {type="device_level", weight=0.1, num_device_groups=2}]',
]
QWEN = [
    *("--module", "qwen3", "--config", "qwen3_tiny", "--model.expert_bias", '{type="momentum"}'),
    *("--model.aux_losses", '[{type="global_batch", weight=0.1}]'),
]
SAME = ("loss_metrics/global_avg_loss", "moe/max_violation", "moe/global_load_balancing_loss")


@pytest.fixture(scope="module")
def deepseek(ranks, tmp_path_factory) -> Path:
    """Groups of experts, two losses, a rule that remembers a trend."""
    folder = tmp_path_factory.mktemp("deepseek")
    job = [*DEEPSEEK, *TRAIN, *EP2, "--training.steps=2", f"--dump_folder={folder}/run"]
    ranks.run(2, train, job)
    place(folder / "run", output=folder / "placed", ep=2)
    return folder


@pytest.fixture(scope="module")
def qwen(ranks, tmp_path_factory) -> Path:
    """The first half of the experts is hot, and with it the first of two ranks."""
    folder = tmp_path_factory.mktemp("qwen")
    job = [*QWEN, *TRAIN, *EP2, "--training.steps=2", f"--dump_folder={folder}/run"]
    ranks.run(2, train_with_hot_experts, job, 4, 0.05)
    return folder


def resumed(ranks, job: list[str], run: Path, layout: list[str]) -> tuple[list[dict], Trace]:
    """Three steps more of a copy of a run, and their trace."""
    folder = run.with_name(f"{run.name}-{'-'.join(layout)[-60:]}".replace(".", "-"))
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.arrow"))
    degree = 4 if layout == EP4 else 2
    flags = [*layout, "--training.steps=5", "--checkpoint.load_only", f"--dump_folder={folder}"]
    logged = ranks.run(degree, train, [*job, *TRAIN, *flags], first_step=3)
    # Only the last stage of a pipeline sees the loss.
    (seen,) = [one for one in logged if one and SAME[0] in one[0]][:1]
    return seen, read_trace(folder)


def assert_same_training(before: tuple[list[dict], Trace], after: tuple[list[dict], Trace], file):
    assert len(before[0]) == len(after[0]) == 3
    for one, other in zip(before[0], after[0], strict=True):
        for name in SAME:
            assert other[name] == pytest.approx(one[name], rel=1e-6), name
    orders = read(file).orders
    for row, layer in enumerate(before[1].layers):
        assert not np.array_equal(orders[layer], np.arange(8))
        renumbered = before[1].counts_SME[:, row][:, orders[layer]]
        np.testing.assert_array_equal(after[1].counts_SME[:, row], renumbered)


@pytest.mark.parametrize("layout", [PP2, FSDP2], ids=["PP2", "FSDP2"])
def test_training_goes_on_as_it_would_have(ranks, deepseek, layout):
    runs = [resumed(ranks, DEEPSEEK, deepseek / name, layout) for name in ("run", "placed")]
    assert_same_training(*runs, deepseek / "placed" / FILE_NAME)
    assert runs[0][1].info.expert_groups == runs[1][1].info.expert_groups == (2, 4)
    assert runs[0][1].info.placement is None
    assert runs[1][1].info.placement == read(deepseek / "placed" / FILE_NAME).title


def test_a_hot_rank_is_as_loaded_as_was_planned(ranks, qwen):
    """Placed by the loads of the very steps that are then trained again."""
    before = resumed(ranks, QWEN, qwen / "run", EP2)
    place(qwen / "run", output=qwen / "placed", ep=2, from_run=before[1].path.parent)
    after = resumed(ranks, QWEN, qwen / "placed", EP2)
    assert_same_training(before, after, qwen / "placed" / FILE_NAME)
    job = ("--module", "qwen3", "--config", "qwen3_tiny")
    question = Question(
        hardware="h100", ranks=2, ep="2", from_run=before[1].path.parent, job_flags=job
    )
    (degree,) = make_plan(question).degrees
    measured = {row.placement: row.last.busiest_rank_tokens for row in degree.measured}
    tokens = degree.tokens_per_rank * 2  # top 2
    overload = "max_overload_factor"
    for placed, (_logged, trace) in (("contiguous", before), ("greedy", after)):
        expected = measured[placed] / tokens
        assert trace.over_steps(overload)[-1] == pytest.approx(expected, rel=1e-9)
    assert measured["contiguous"] / tokens > 1.3 > 1.1 > measured["greedy"] / tokens


def test_at_another_degree_it_is_the_same_training(ranks, qwen):
    if not (qwen / "placed").exists():
        place(qwen / "run", output=qwen / "placed", ep=2)
    runs = [resumed(ranks, QWEN, qwen / name, EP4) for name in ("run", "placed")]
    assert_same_training(*runs, qwen / "placed" / FILE_NAME)


def stored(run: Path) -> dict[str, torch.Tensor | bytes]:
    """Everything that a checkpoint stores, by an own reader: each chunk for itself."""
    reader = FileSystemReader(run / "checkpoint" / "step-2")
    metadata = checkpoints.read_metadata(Path(reader.path))
    found = {}
    for index, info in metadata.storage_data.items():
        with open(Path(reader.path) / info.relative_path, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        found[f"{index.fqn} {index.offset}"] = data
        if not isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            import io

            found[f"{index.fqn} {index.offset}"] = torch.load(io.BytesIO(data))
    return found


BY_EXPERT = {
    *("expert_bias_E", "router.gate.weight", "router.aux_losses.global_batch.load_E"),
    *(f"routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD")),
    "router.expert_bias.trend_E",
}


def test_undo_gives_back_every_bit_and_nothing_else_was_touched(deepseek):
    place(deepseek / "placed", output=deepseek / "back", undo=True)
    first, placed, back = (stored(deepseek / name) for name in ("run", "placed", "back"))
    assert first.keys() == placed.keys() == back.keys() and len(first) > 800

    def same(one, other) -> bool:
        if isinstance(one, bytes):
            return one == other
        return one.dtype == other.dtype and torch.equal(
            one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        )

    assert all(same(first[name], back[name]) for name in first)
    assert not (deepseek / "back" / FILE_NAME).exists()
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
    """Against transformers: the same logits, and with --undo the same files."""
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
    file.write_text(
        f'{{"ep_degree": 4, "groups": [4], "orders": {{{", ".join(f"{chr(34)}{n}{chr(34)}: {order}" for n in layers)}}}}}'
    )
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
