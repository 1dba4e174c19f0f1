"""Tests of GPU readiness without a GPU: nothing waits for the device or takes a size from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from benchmarks import gpu
from tests.support.host_reads import RefuseHostReads
from tests.support.telemetry_jobs import DeviceOperators, moe_layers
from titan_moe_lb.balancing.losses import (
    CommunicationLoss,
    DeviceLevelLoss,
    EntropyLoss,
    GlobalBatchAuxLoss,
    ImportanceLoss,
    RouterZLoss,
    SequenceWiseAuxLoss,
)
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.parallel.rank_groups import RankGroups

ROOT = Path(__file__).parents[2]
LOSSES = (
    SequenceWiseAuxLoss.Config(weight=1e-4),
    GlobalBatchAuxLoss.Config(weight=1e-3),
    DeviceLevelLoss.Config(weight=1e-3, num_device_groups=4),
    CommunicationLoss.Config(weight=1e-3, num_device_groups=4, devices_per_token=2),
    ImportanceLoss.Config(weight=1e-3),
    EntropyLoss.Config(weight=1e-3),
    RouterZLoss.Config(weight=1e-4),
)
RULES = ("sign", "proportional", "momentum", "quantile", "quantile_trend")


def built(rule: str, num_layers: int = 2) -> tuple[list, StepHook]:
    layers = moe_layers(list(range(num_layers)), list(LOSSES), expert_bias=rule)
    return layers, StepHook(
        layers, wire([layer.router for layer in layers], RankGroups()), RankGroups()
    )


def forward_and_backward(layers: list) -> None:
    for layer in layers:
        x_BLD = torch.randn(2, 8, 64, requires_grad=True)
        layer.router(x_BLD, layer.expert_bias_E)[0].sum().backward()


@pytest.mark.parametrize("rule", RULES)
def test_a_whole_step_never_waits_for_the_device(rule):
    """The step has forward, backward, losses, record and step end."""
    layers, hook = built(rule)
    with RefuseHostReads():
        forward_and_backward(layers)
        hook.close_step()
    assert layers[0].expert_bias_E.abs().max() > 0


@pytest.mark.parametrize("rule", RULES)
def test_a_whole_step_knows_its_sizes_without_its_numbers(rule):
    """Fake tensors have only shapes: reading a number, or a size that depends on one, raises."""
    layers, hook = built(rule)
    with FakeTensorMode(allow_non_fake_inputs=True):
        forward_and_backward(layers)
        hook.close_step()


def test_fake_tensors_refuse_what_needs_a_number():
    with FakeTensorMode():
        x = torch.ones(3)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x.nonzero()


@pytest.mark.parametrize("rule", RULES)
def test_operators_of_a_router_do_not_grow_with_the_batch(rule):
    layers, _hook = built(rule, 1)
    router = layers[0].router
    counts = set()
    for rows, length in ((2, 8), (4, 8), (8, 32)):
        x_BLD = torch.randn(rows, length, 64, requires_grad=True)
        router(x_BLD, torch.zeros(8))[0].sum().backward()
        with DeviceOperators() as operators:
            router(x_BLD, torch.zeros(8))[0].sum().backward()
        counts.add(operators.count)
    assert len(counts) == 1, counts


WITHOUT_TORCHTITAN = """
import sys, types

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchtitan":
            raise ImportError("torchtitan is not here")

sys.meta_path.insert(0, Refuse())
# The package's own __init__ brings its losses together, which need torchtitan.
losses = sys.modules["titan_moe_lb.balancing.losses"] = types.ModuleType("losses")
losses.__path__ = ["titan_moe_lb/balancing/losses"]
import pytest
tests = ["tests/balancing/test_functional.py", "tests/traces/test_balance_statistics.py"]
status = pytest.main(["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
assert "torchtitan" not in sys.modules
sys.exit(status)
"""


def test_the_formulas_pass_their_tests_under_torch_alone():
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHTITAN], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout and "failed" not in ended.stdout


def without_torchtitan(folder: Path) -> dict[str, str]:
    """Environment of processes, and of their own ones, that find no torchtitan and no spmd_types."""
    refused = 'sys.modules["torchtitan"] = sys.modules["spmd_types"] = None'
    (folder / "sitecustomize.py").write_text(f"import sys\n{refused}\n")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}


def test_one_command_gives_first_figures_under_torch_alone(tmp_path):
    """The whole command ends on a host without torchtitan, and what needs it is skipped."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--output", str(tmp_path / "gpu")]
    ended = subprocess.run(
        command, cwd=ROOT, env=without_torchtitan(tmp_path), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, *others = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert first["outcome"] == "passed", first
    assert all(part["outcome"].startswith("skipped") for part in others), others
    assert "torchtitan is not installed" in {part["outcome"].partition(": ")[2] for part in others}
    figures = {row["part"]: row for row in first["results"]}
    assert list(figures) == ["device", "loss", "record", "step_end", "graph_replay"]
    assert figures["loss"]["gradient_error"] < 1e-6
    assert "CUDA" in figures["graph_replay"]["skipped"]
    for part in ("loss", "record", "step_end"):
        assert all(ms > 0 for ms in figures[part]["ms"].values())


def test_a_part_ends_when_the_time_is_over():
    part = gpu.Part("waits", ["timeit", "-n1", "-r1", "import time; time.sleep(60)"])
    part.run(0, 1.0)
    assert part.outcome.startswith("stopped") and part.seconds < 30
    late = gpu.Part("late", ["platform"])
    late.run(0, 0.0)
    assert late.outcome.startswith("skipped") and not late.seconds


def test_what_a_host_skips_is_said_and_the_rest_is_written(tmp_path, monkeypatch, capsys):
    ran = [
        gpu.Part("prints", ["platform"]),
        gpu.Part("needs <two>", ["platform"], needs_gpus=2),
        gpu.Part("fails", ["no_such_module"]),
    ]
    monkeypatch.setattr(gpu, "parts", lambda quick, gpus: ran)
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path / "found")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert [part.outcome.partition(":")[0] for part in ran] == ["passed", "skipped", "failed"]
    page = (tmp_path / "found.html").read_text()
    assert "needs 2 GPU(s)" in page and "needs &lt;two&gt;" in page and "no_such_module" in page
    assert (tmp_path / "found.json").is_file() and "skipped" in capsys.readouterr().out


def test_every_part_is_a_program_that_is_here():
    parts = gpu.parts(quick=True, gpus=8)
    assert len({part.name for part in parts}) == len(parts)
    assert max(part.needs_gpus for part in parts) == 8
    for part in parts:
        module = part.command[0]
        found = ROOT / Path(*module.split("."))
        assert module == "pytest" or found.is_dir() or found.with_suffix(".py").is_file()
