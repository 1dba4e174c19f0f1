"""Tests of ``diagnose`` on real training runs, with planted faults and without."""

from __future__ import annotations

import pytest
import torch

from tests.support.train_jobs import train_config
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.commands.diagnose.checks import findings
from titan_moe_lb.commands.diagnose.finding import Finding
from titan_moe_lb.job import job_config
from titan_moe_lb.traces.trace import Trace, read_trace

SMALL = ["--training.steps=24", "--training.seq_len=64", "--training.local_batch_size=8"]
EP2 = ["--parallelism.data_parallel_shard_degree=2", "--parallelism.expert_parallel_degree=2"]
NO_BIAS = "--model.expert_bias=none"
LEARNING_RATE = "--optimizer.param_groups.0.optimizer_kwargs.lr="


def job(model: str, *arguments: str) -> list[str]:
    return [f"--module={model}", f"--config={model}_tiny", *SMALL, *arguments]


def with_bias(rule: str) -> tuple[str, str]:
    return "--model.aux_losses=[]", f"--model.expert_bias={{{rule}}}"


def with_loss(loss: str) -> tuple[str, str]:
    return f"--model.aux_losses=[{{{loss}}}]", NO_BIAS


RUNS = {
    "momentum at 0.3": job("deepseek_v3", *with_bias('type = "momentum", speed = 0.3')),
    "sign at 0.1": job("llama4", *with_bias('type = "sign", speed = 0.1')),
    "sign at 1e-6": job("qwen3", *with_bias('type = "sign", speed = 1e-6')),
    "ema of 0.99": job("gpt_oss", *with_bias('type = "quantile", ema = 0.99')),
    "z-loss alone": job("gpt_oss", *with_loss('type = "z_loss", weight = 1e-3')),
    "entropy alone": job("qwen3", *with_loss('type = "entropy", weight = 1e-3')),
    "weak loss": job("qwen3", *with_loss('type = "global_batch", weight = 1e-7')),
    "strong loss": job(
        "deepseek_v3",
        "--metrics.router_gradients",
        '--model.aux_losses=[{type = "sequence_wise", weight = 10.0}]',
    ),
    "gates of zeros": job("gpt_oss", f"{LEARNING_RATE}0.0", "--debug.seed=7"),
    "forced": job(
        "deepseek_v3",
        *EP2,
        '--model.forced_routing={type = "hot_rank", fraction = 0.8, rank = 0}',
    ),
    "deepseek_v3's default": job("deepseek_v3", "--metrics.router_gradients"),
    "llama4's default": job("llama4"),
    "quantile": job("gpt_oss", *with_bias('type = "quantile"')),
}

# The kind that is expected first (None: nothing is wrong), what follows from it, and what
# must not be listed.
ROWS = {
    "momentum at 0.3": ("bias_oscillates", {"collapse"}, {"bias_too_slow", "too_weak"}),
    "sign at 0.1": ("bias_oscillates", set(), {"bias_too_slow", "too_weak", "collapse"}),
    "sign at 1e-6": ("bias_too_slow", {"hot_expert"}, {"collapse", "too_weak", "hot_expert"}),
    "ema of 0.99": ("bias_too_slow", {"hot_expert"}, {"collapse", "too_weak", "hot_expert"}),
    "z-loss alone": ("nothing_balances", {"hot_expert"}, {"collapse", "too_weak", "hot_expert"}),
    "entropy alone": ("nothing_balances", {"hot_expert"}, {"collapse", "too_weak", "hot_expert"}),
    "weak loss": ("too_weak", {"hot_expert"}, {"nothing_balances", "collapse", "hot_expert"}),
    "strong loss": ("aux_loss_dominates", set(), {"nothing_balances", "too_weak"}),
    "gates of zeros": ("too_weak", {"collapse", "dead_experts"}, {"collapse", "dead_experts"}),
    "forced": ("forced_routing", {"hot_rank"}, {"hot_rank", "too_weak", "nothing_balances"}),
    "deepseek_v3's default": (None, set(), set()),
    "llama4's default": (None, set(), set()),
    "quantile": (None, set(), set()),
}


def run(arguments: list[str], *, zero_gates: bool) -> None:
    """Train one rank of a job."""

    def prepare(trainer) -> None:
        if zero_gates:  # all scores are equal, and the same experts win every time
            with torch.no_grad():
                for router in routers_of(trainer.model_parts):
                    for parameter in router.gate.parameters():
                        parameter.zero_()

    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    train_config(config, prepare=prepare)


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """Trace of a run by name; each run trains once."""
    traces: dict[str, Trace] = {}

    def of(name: str) -> Trace:
        if name not in traces:
            folder, arguments = tmp_path_factory.mktemp("run"), RUNS[name]
            num_ranks = 2 if EP2[0] in arguments else 1
            arguments = [*arguments, f"--dump_folder={folder}"]
            ranks.run(num_ranks, run, arguments, zero_gates=name == "gates of zeros")
            traces[name] = read_trace(folder)
        return traces[name]

    return of


def only(trace: Trace) -> Finding:
    [finding] = findings(trace)
    return finding


@pytest.mark.parametrize("name", ROWS)
def test_the_cause_is_named_first_and_its_symptoms_are_not(trained, name):
    expected, explained, absent = ROWS[name]
    found = findings(trained(name))
    kinds = [finding.kind for finding in found]
    assert kinds[:1] == ([expected] if expected else [])
    assert not absent & set(kinds)
    if found:
        assert explained <= set(found[0].explains)


def test_the_trace_says_what_a_speed_is_judged_by(trained):
    """The scores are the router's; 24 steps of 1e-6 move two biases apart by at most 48e-6."""
    assert trained("momentum at 0.3").info.score_func == "sigmoid"
    trace = trained("sign at 1e-6")
    assert trace.info.score_func == "softmax"
    assert 0 < trace.layer_columns["bias_range"].max() <= 48.1e-6
    assert trace.info.expert_bias == "sign (speed 1e-06)"
    momentum = trained("momentum at 0.3").info.expert_bias
    assert momentum == "momentum (speed 0.3, scale 2.0, momentum 0.5)"


def test_the_trace_says_what_names_a_run(trained):
    info = trained("gates of zeros").info
    assert (info.learning_rate, info.seed) == (0.0, 7)


def test_the_remedy_is_of_what_the_job_has(trained):
    """The remedy is a weight if a loss balances, and names no loss if only a bias does."""
    assert "# of global_load_balancing_loss" in only(trained("weak loss")).toml
    for name in ("momentum at 0.3", "sign at 1e-6", "ema of 0.99", "z-loss alone"):
        for finding in findings(trained(name)):
            assert "weight" not in finding.toml + finding.remedy
