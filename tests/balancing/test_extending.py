"""Tests of the examples in docs/howto/add_*.md: each runs as printed and does what its page
states."""

from __future__ import annotations

import importlib
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import titan_moe_lb
from tests.parity.compare import Parity
from tests.parity.layout import parse
from tests.support import doc_examples
from tests.support.rank_pool import RankPool
from tests.support.routers import inputs, router, values
from tests.support.textbook import SCORES, mean_loss
from tests.support.train_jobs import train
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.losses import AuxLoss, SumsLoss
from titan_moe_lb.commands.report.page import render
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config, model_help
from titan_moe_lb.telemetry.metrics import Metric
from titan_moe_lb.traces.trace import read_trace

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.steps=2"]


def train_with(example: str, arguments: list[str]) -> list[dict[str, float]]:
    """Train a job in a process that has imported the example. Runs on every rank."""
    with doc_examples.imported(example):
        return train(arguments)


@pytest.mark.parametrize("name", doc_examples.names())
def test_every_example_can_be_imported(name):
    with doc_examples.imported(name) as module:
        assert module.__name__ == name


# ---- A loss

IMPORTANCE = {"aux_losses": [{"type": "my_importance", "weight": 0.1}]}


class PoolWithExample:
    """Pool of ranks that import an example first."""

    def __init__(self, pool: RankPool, example: str) -> None:
        self._pool, self._example = pool, example
        self.need = pool.need

    def run(self, num_ranks: int, function: Callable, *args, **kwargs) -> list:
        path = (function.__module__, function.__qualname__)
        return self._pool.run(num_ranks, run_with, self._example, path, args, kwargs)


def run_with(example: str, path: tuple[str, str], args: tuple, kwargs: dict):
    with doc_examples.imported(example):
        return getattr(importlib.import_module(path[0]), path[1])(*args, **kwargs)


@pytest.fixture(scope="module")
def importance(ranks):
    with Parity(PoolWithExample(ranks, "importance"), IMPORTANCE) as parity:
        yield parity


@pytest.mark.parametrize(
    "layout", ["pp=2", "tp=2,ep=2", "cp=2,ac=selective", "compile=true,backend=aot_eager"]
)
def test_loss_is_the_same_under_every_layout(importance, layout):
    """The gradient equals that of autograd, also in traced and repeated forwards."""
    (comparison,) = importance.compare(parse(layout))
    assert comparison.faults() == [], comparison


@pytest.mark.parametrize("score_func", SCORES)
def test_loss_is_its_formula(score_func):
    with doc_examples.imported("importance") as module:
        built = router([module.ImportanceLoss.Config(weight=0.5)], score_func)
    x, y = inputs()[0], inputs()[0]
    (0.0 * built(x)[0].sum()).backward()
    logits = built.gate(y)
    scores = SCORES[score_func](logits)
    expected = mean_loss("importance", logits, scores, scores.topk(2).indices)
    (0.5 * expected).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6 * float(y.grad.abs().max()))
    assert values(built) == [pytest.approx(expected.item(), rel=1e-5)]


def test_loss_without_a_formula_or_a_kind_is_refused():
    """Without the refusal, a loss that no router can apply would silently do nothing."""

    class Empty(SumsLoss):
        @dataclass(kw_only=True, slots=True)
        class Config(SumsLoss.Config):
            pass

    class Unknown(AuxLoss):
        @dataclass(kw_only=True, slots=True)
        class Config(AuxLoss.Config):
            pass

    for loss, name in ((Empty, "value"), (Unknown, "SumsLoss")):
        with pytest.raises(JobError, match=name):
            router([loss.Config(weight=1.0)])


@pytest.mark.parametrize(
    ("example", "folder", "flag"),
    [
        ("importance", "losses", '--model.aux_losses=[{type="my_importance", weight=0.1}]'),
        ("relative_bias", "expert_bias", '--model.expert_bias={type="my_relative", speed=0.5}'),
    ],
)
def test_inside_the_package_it_is_a_new_file_and_one_edit(tmp_path, example, folder, flag):
    """Inside the package, the edit is the import that registers the class; outside, importing the
    module does."""
    for package in ("titan_moe_lb", "model_registry"):
        shutil.copytree(doc_examples.ROOT / package, tmp_path / package)
    methods = tmp_path / "titan_moe_lb" / "balancing" / folder
    text = next(block.text for block in doc_examples.blocks() if block.example == example)
    (methods / f"{example}.py").write_text(text)
    with (methods / "__init__.py").open("a") as file:
        file.write(f"from titan_moe_lb.balancing.{folder} import {example}\n")
    command = [sys.executable, "-m", "titan_moe_lb.cli", "train", *TINY, flag, "--print-config"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "my_" in result.stdout


# ---- Names


@pytest.mark.parametrize("base", [SumsLoss, ExpertBias, ForcedRouting, Metric])
def test_name_of_another_class_is_refused(base):
    key = "name" if base is Metric else "type_name"
    taken, owner = next(iter(base.kinds.items()))
    with pytest.raises(JobError) as refusal:
        type(base)("Mine", (base,), {key: taken})
    assert "Mine" in str(refusal.value) and owner.__name__ in str(refusal.value)
    assert base.kinds[taken] is owner


@pytest.mark.parametrize(("name", "base"), [("importance", AuxLoss), ("busiest_share", Metric)])
def test_module_that_is_imported_again_brings_its_classes_anew(name, base):
    with doc_examples.imported(name) as module:
        before = dict(base.kinds)
        (mine,) = [kind for kind in before.values() if kind.__module__ == name]
        assert pickle.loads(pickle.dumps(mine)) is mine
        module.__loader__.exec_module(module)
        assert base.kinds.keys() == before.keys()
        (again,) = [kind for kind in base.kinds.values() if kind.__module__ == name]
        assert again is not mine


# ---- A bias rule


def test_bias_rule_moves_the_bias_by_its_formula(ranks, tmp_path):
    flags = ['--model.expert_bias={type = "my_relative", speed = 0.5}', f"--dump_folder={tmp_path}"]
    logged, _ = ranks.run(2, train_with, "relative_bias", [*TINY, *flags])
    trace = read_trace(tmp_path)
    assert trace.info.expert_bias == "my_relative (speed 0.5)"
    # By hand from the loads of the two steps: nothing else moves the bias.
    load_SME = trace.counts_SME / trace.counts_SME.mean(axis=-1, keepdims=True)
    delta_SME = 0.5 * (1 - load_SME)
    bias_SME = delta_SME.cumsum(axis=0)
    for name, expected_SM in (
        ("bias_range", np.ptp(bias_SME, axis=-1)),
        ("bias_norm", np.linalg.norm(bias_SME, axis=-1)),
        ("bias_largest_step", np.abs(delta_SME).max(axis=-1)),
    ):
        np.testing.assert_allclose(trace.layer_columns[name], expected_SM, rtol=1e-5)
    assert logged[1]["moe/bias_range"] == pytest.approx(np.ptp(bias_SME[1], axis=-1).mean())


def test_bias_rule_without_a_formula_is_refused():
    class Empty(ExpertBias):
        @dataclass(kw_only=True, slots=True)
        class Config(ExpertBias.Config):
            pass

    with pytest.raises(JobError, match=r"Empty.*delta\(\)"):
        Empty.Config().build()


# ---- A metric


def test_metric_is_measured_reduced_and_written(ranks, tmp_path):
    """With 2 EP ranks, the share of the busiest rank is half of the overload factor."""
    flags = [
        "--parallelism.data_parallel_shard_degree=2",
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.expert_parallel_degree=2",
        "--training.local_batch_size=4",
        f"--dump_folder={tmp_path}",
    ]
    by_rank = ranks.run(4, train_with, "busiest_share", [*TINY, *flags])
    trace = read_trace(tmp_path)
    share_SM = trace.layer_columns["my_busiest_share"]
    np.testing.assert_allclose(share_SM, trace.layer_columns["max_overload_factor"] / 2)
    assert (share_SM > 0.5).all()
    assert all(
        logged[1]["moe/my_busiest_share"] == pytest.approx(share_SM[1].max()) for logged in by_rank
    )
    assert "My busiest share" in render([trace])


# ---- A forced strategy


def test_strategy_has_the_load_that_it_promises(ranks, tmp_path):
    """With 8 experts and EP 2, one rank has all the load: the first 4 experts are cold, then the
    last 4."""
    flags = [
        "--parallelism.expert_parallel_degree=2",
        "--training.local_batch_size=4",
        f"--dump_folder={tmp_path}",
        '--model.forced_routing={type = "cold_experts", num_cold = 4}',
    ]
    logged, _ = ranks.run(2, train_with, "cold_experts", [*TINY, *flags])
    trace = read_trace(tmp_path)
    each = 8 * 128 * 2 // 4
    assert (trace.counts_SME[0] == [0, 0, 0, 0, each, each, each, each]).all()
    assert (trace.counts_SME[1] == [each, each, each, each, 0, 0, 0, 0]).all()
    assert trace.info.forced_routing == "cold_experts (num_cold 4)"
    assert logged[0]["moe/max_overload_factor"] == 2


@pytest.mark.parametrize("table", ["num_cold = 7", "cold = 4"])
def test_strategy_of_a_bad_job_is_refused(table):
    """The message names the key that is out of range, or the valid key nearest to an unknown
    one."""
    flags = [f'--model.forced_routing={{type = "cold_experts", {table}}}']
    with doc_examples.imported("cold_experts"), pytest.raises(JobError, match="num_cold"):
        job_config.load([*TINY, *flags])


def test_strategy_is_in_the_help():
    shown = io.StringIO()
    with doc_examples.imported("cold_experts"):
        model_help.show("deepseek_v3", Console(file=shown, width=120))
    assert 'type = "cold_experts"' in shown.getvalue() and "num_cold" in shown.getvalue()


def test_strategy_of_the_package_is_one_file_and_one_line():
    """Only the file of its kind and the package's list of strategies mention ``rotating``."""
    package = Path(titan_moe_lb.__file__).parent
    mentions = {
        str(path.relative_to(package)): sum("otating" in line for line in path.open())
        for path in package.rglob("*.py")
    }
    folder = "balancing/forced_routing"
    assert mentions.pop(f"{folder}/hot.py") > 0
    assert {name: n for name, n in mentions.items() if n} == {f"{folder}/__init__.py": 1}


# ---- A model


def test_model_trains(ranks):
    flags = ["--module", "my_model", "--training.steps=2", "--training.seq_len=64"]
    small = ["--training.local_batch_size=2"]
    losses = ['--model.aux_losses=[{type = "z_loss", weight = 1e-3}]']
    parallel = "--parallelism.expert_parallel_degree=2"
    own, _ = ranks.run(2, train_with, "my_model", [*flags, *small, parallel])
    (other,) = ranks.run(1, train_with, "my_model", [*flags, *small, *losses])
    assert own[1]["moe/global_load_balancing_loss"] > 0.9
    assert "moe/z_loss" in other[1]
    assert "moe/global_load_balancing_loss" not in other[1]
