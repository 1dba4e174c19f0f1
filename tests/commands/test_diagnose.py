"""Tests of ``diagnose``: a planted fault is named first, without its consequences."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.synthetic_trace import COLUMNS, run_info
from titan_moe_lb import cli
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.commands.diagnose import checks
from titan_moe_lb.commands.diagnose.balancing import OTHER_LOSSES, Balancing
from titan_moe_lb.commands.diagnose.command import diagnose
from titan_moe_lb.commands.diagnose.finding import Finding, Severity
from titan_moe_lb.commands.diagnose.window import Window, effective_experts
from titan_moe_lb.traces import expert_order
from titan_moe_lb.traces.balance_statistics import mark_absent, max_violation
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import Trace, TraceWriter, read_trace

STEPS = 40
GLOBAL = {"global_load_balancing_loss": 1e-3}
SEQUENCE = {"seq_load_balancing_loss": 1e-4}
MODELS = {
    "deepseek_v3": {
        "flavor": "671B",
        "layers": tuple(range(3, 61)),
        "num_experts": 256,
        "top_k": 8,
        "ep": 64,
        "expert_groups": (8,),
        "score_func": "sigmoid",
        "losses": SEQUENCE,
        "expert_bias": "sign (speed 0.001)",
    },
    "qwen3": {
        "flavor": "30B-A3B",
        "layers": tuple(range(48)),
        "num_experts": 128,
        "top_k": 8,
        "ep": 8,
        "score_func": "softmax",
        "losses": GLOBAL,
        "expert_bias": None,
    },
    "gpt_oss": {
        "flavor": "120b",
        "layers": tuple(range(36)),
        "num_experts": 128,
        "top_k": 4,
        "ep": 8,
        "score_func": "softmax",
        "losses": {"load_balancing_loss": 1e-3},
        "expert_bias": None,
    },
    "llama4": {
        "flavor": "17Bx16E",
        "layers": tuple(range(48)),
        "num_experts": 16,
        "top_k": 1,
        "ep": 8,
        "score_func": "sigmoid",
        "losses": {},
        "expert_bias": "sign (speed 0.001)",
    },
}


EXTRA = (
    "main_gradient_squared",
    "aux_gradient_squared",
    "bias_norm",
    "frozen_gate_squared",
    "largest_logit",
    "token_entropy",
    "bfloat16_flip_share",
    "selection_margin",
)
"""Columns of layers that a healthy run may lack."""


def info_of(model: str, **changes) -> RunInfo:
    fields = {"global_batch_size": 64, "seq_len": 1024, "micro_batch_size": 4}
    info = run_info(**{"model": model, **fields, **MODELS[model], **changes})
    of_bias = Column("bias_largest_step", summary="max")
    losses = tuple(Column(name, is_aux_loss=True) for name in info.losses)
    padding = Column("padding_share", per="step")
    of_layers = map(Column, EXTRA)
    return dataclasses.replace(info, columns=(*losses, *COLUMNS, of_bias, padding, *of_layers))


def write(
    folder: Path, info: RunInfo, share_SME, seed: int = 0, first_step: int = 1, **columns
) -> Path:
    """Write the trace of a run with these shares and sampling noise.

    Args:
        columns: names to values that replace the healthy ones; one value a step makes a column of
            steps, a function of the step a column of layers.
    """
    choices = info.global_batch_size * info.seq_len * info.top_k
    shares = share_SME / share_SME.sum(axis=-1, keepdims=True)
    counts_SME = np.random.default_rng(seed).multinomial(choices, shares)
    of_layers = {"bias_range": 0.05, "bias_largest_step": 1e-3, "micro_batch_max_violation": 0.4}
    of_step = {"loss": np.linspace(5, 4, STEPS), "padding_share": np.full(STEPS, 0.1)}
    of_layers |= {name: v for name, v in columns.items() if name in (*of_layers, *EXTRA)}
    of_step |= {name: np.broadcast_to(v, STEPS) for name, v in columns.items() if name in of_step}
    writer = TraceWriter(folder, info)
    for step in range(len(share_SME)):
        load = StepLoad(
            layers=info.layers,
            counts_ME=counts_SME[step],
            layer_columns={
                name: np.full(len(info.layers), v(step) if callable(v) else v)
                for name, v in of_layers.items()
            },
            step_columns={name: float(value_S[step]) for name, value_S in of_step.items()},
        )
        writer.write(first_step + step, load)
    writer.close()
    return folder


def even(info: RunInfo) -> np.ndarray:
    return np.ones((STEPS, len(info.layers), info.num_experts))


def shares(*changes):
    """Make even shares, except for some: ``(steps, rows of layers, experts, share)`` each."""

    def made(info: RunInfo) -> np.ndarray:
        share_SME = even(info)
        for steps, rows, experts, share in changes:
            share_SME[steps, rows, experts] = share
        return share_SME

    return made


def swinging(info: RunInfo) -> np.ndarray:
    """One half of the experts gets nearly all tokens of a step, the other half those of the next
    step."""
    share_SME, half = even(info), info.num_experts // 2
    share_SME[::2, :, :half] = share_SME[1::2, :, half:] = 0.02
    return share_SME


def in_turn(info: RunInfo) -> np.ndarray:
    """A sixteenth of the experts gets all tokens of a step, the next sixteenth those of the next
    step."""
    sixteenth = np.arange(info.num_experts) * 16 // info.num_experts
    turn_S11 = np.arange(STEPS)[:, None, None] % 16
    return np.where(turn_S11 == sixteenth, 1.0, 1e-3) * even(info)


def drawn_by_data(info: RunInfo) -> np.ndarray:
    """Every other step has other text, which uses half of the experts twice as much."""
    share_SME, half = even(info), info.num_experts // 2
    share_SME[::2, :, :half] = share_SME[1::2, :, half:] = 2.0
    return share_SME


def growing(first: float, last: float):
    """Make a column that grows evenly over the steps."""
    return np.linspace(first, last, STEPS).__getitem__


ALL = slice(None)
LATE = slice(20, None)
LOST = np.where(np.arange(STEPS) < 30, 4.5, np.nan)
UNEVEN = shares((ALL, ALL, slice(0, 4), 6.0))
"""Loads in which four experts of every layer get six times the others' share from the first step
on."""
FEW = shares((ALL, 11, slice(2, 5), 1000.0))
"""Loads in which three experts of the twelfth layer get nearly everything."""
NO_METHOD = {"losses": {}, "expert_bias": None}


def bias(description: str, **losses: float) -> dict:
    return {"expert_bias": description, "losses": losses}


def gradients(main: float, aux, every: int = 1) -> dict:
    """Columns of gradient norms that are measured in every ``every``-th step."""

    def column(norm):
        return lambda step: np.square(norm) if step % every == 0 else np.nan

    return {"main_gradient_squared": column(main), "aux_gradient_squared": column(aux)}


# Model, changes of its run, shares, columns, the kind expected first (None: nothing is wrong),
# kinds that must not be listed.
SYMPTOMS = ("too_weak", "collapse", "dead_experts", "hot_expert", "hot_rank", "first_layers")
ROWS = {
    "one expert of 48 layers": (
        ("qwen3", {}, shares((LATE, 17, 42, 6.0)), {}),
        ("hot_expert", ("nothing_balances", "too_weak", "collapse", "hot_rank", "first_layers")),
    ),
    "one expert beside a bias": (
        ("deepseek_v3", {}, shares((ALL, 57, 200, 6.0)), {}),
        ("hot_expert", ("bias_too_slow", "too_weak", "collapse", "hot_rank")),
    ),
    "one expert of the first layer": (
        ("llama4", {}, shares((ALL, 0, 5, 4.0)), {"bias_range": 0.2}),
        ("hot_expert", ("first_layers", "hot_rank", "bias_too_slow")),
    ),
    "two experts of which one is hotter": (
        ("gpt_oss", {}, shares((LATE, 9, 7, 3.0), (LATE, 9, 90, 5.0)), {}),
        ("hot_expert", ("collapse", "too_weak", "hot_rank")),
    ),
    "half of the experts chosen": (
        ("gpt_oss", {"num_experts": 8}, shares((ALL, 3, 2, 4.0)), {}),
        ("hot_expert", ("collapse", "too_weak")),
    ),
    "a z-loss alone": (
        ("qwen3", {"losses": {"z_loss": 1e-3}}, even, {}),
        ("nothing_balances", ("too_weak",)),
    ),
    "a z-loss alone, and hot experts": (
        ("gpt_oss", {"losses": {"z_loss": 1e-3}}, UNEVEN, {}),
        ("nothing_balances", SYMPTOMS),
    ),
    "losses of probabilities alone": (
        (
            "deepseek_v3",
            {**NO_METHOD, "losses": {"entropy_loss": 1, "importance_loss": 1}},
            FEW,
            {},
        ),
        ("nothing_balances", SYMPTOMS),
    ),
    "losses of groups alone": (
        ("llama4", {**NO_METHOD, "losses": {"device_level_loss": 0.05}}, UNEVEN, {}),
        ("nothing_balances", SYMPTOMS),
    ),
    "a frozen bias": (
        ("deepseek_v3", bias("frozen"), even, {"bias_largest_step": 0.0}),
        ("nothing_balances", ("bias_too_slow", "too_weak")),
    ),
    "a speed that was changed to 0": (
        ("llama4", bias("sign (speed 0.001)"), UNEVEN, {"bias_largest_step": 0.0}),
        ("nothing_balances", ("bias_too_slow", *SYMPTOMS)),
    ),
    "nothing at all": (
        ("qwen3", NO_METHOD, UNEVEN, {}),
        ("nothing_balances", SYMPTOMS),
    ),
    "sign at 1e-6": (
        (
            "deepseek_v3",
            bias("sign (speed 1e-06)"),
            UNEVEN,
            {"bias_range": 4e-5, "bias_largest_step": 1e-6},
        ),
        ("bias_too_slow", SYMPTOMS),
    ),
    "sign at 1e-6 in all layers but a frozen one": (
        (
            "deepseek_v3",
            bias("frozen; sign (speed 1e-06)"),
            UNEVEN,
            {"bias_range": 4e-5, "bias_largest_step": 1e-6},
        ),
        ("bias_too_slow", SYMPTOMS),
    ),
    "a bias of a typical size against a wide margin": (
        (
            "deepseek_v3",
            bias("sign (speed 1e-05)"),
            UNEVEN,
            {"bias_range": 4e-3, "bias_largest_step": 1e-5, "selection_margin": 0.1},
        ),
        ("bias_too_slow", SYMPTOMS),
    ),
    "a small bias against a narrow margin": (
        (
            "deepseek_v3",
            bias("sign (speed 1e-06)"),
            UNEVEN,
            {"bias_range": 4e-5, "bias_largest_step": 1e-6, "selection_margin": 1e-5},
        ),
        ("too_weak", SYMPTOMS[1:]),
    ),
    "sign at 1e-8 beside a z-loss": (
        (
            "qwen3",
            bias("sign (speed 1e-08)", z_loss=1e-3),
            UNEVEN,
            {"bias_range": 4e-7, "bias_largest_step": 1e-8},
        ),
        ("bias_too_slow", ("nothing_balances", *SYMPTOMS)),
    ),
    "proportional at 1e-5": (
        (
            "llama4",
            bias("proportional (speed 1e-05)"),
            FEW,
            {"bias_range": 8e-5, "bias_largest_step": 2e-6},
        ),
        ("bias_too_slow", SYMPTOMS),
    ),
    "momentum at 1e-7": (
        (
            "gpt_oss",
            bias("momentum (speed 1e-07, scale 2.0, momentum 0.5)"),
            UNEVEN,
            {"bias_range": 4e-6, "bias_largest_step": 1e-7},
        ),
        ("bias_too_slow", SYMPTOMS),
    ),
    "an average over too many steps": (
        ("deepseek_v3", bias("quantile (num_bins 1000, ema 0.99)"), UNEVEN, {}),
        ("bias_too_slow", SYMPTOMS),
    ),
    "a long average that has arrived": (
        ("deepseek_v3", bias("quantile (num_bins 1000, ema 0.99)"), even, {}),
        (None, ()),
    ),
    "momentum at 0.3": (
        (
            "deepseek_v3",
            bias("momentum (speed 0.3, scale 2.0, momentum 0.5)"),
            swinging,
            {"bias_range": 1.3, "bias_largest_step": 0.15},
        ),
        ("bias_oscillates", ("bias_too_slow", "bias_saturates", "nothing_balances", *SYMPTOMS)),
    ),
    "sign at 0.1, experts in turn": (
        (
            "gpt_oss",
            bias("sign (speed 0.1)"),
            in_turn,
            {"bias_range": 0.3, "bias_largest_step": 0.1},
        ),
        ("bias_oscillates", ("bias_too_slow", *SYMPTOMS)),
    ),
    "sign at 0.1 in a trace without its steps": (
        ("llama4", bias("sign (speed 0.1)"), swinging, {"bias_largest_step": np.nan}),
        ("bias_oscillates", SYMPTOMS),
    ),
    "a trend that overshoots": (
        (
            "llama4",
            bias("quantile_trend (num_bins 1000, ema 0.0, trend_ema 0.0)"),
            swinging,
            {"bias_largest_step": 0.1},
        ),
        ("bias_oscillates", ("bias_too_slow", *SYMPTOMS)),
    ),
    "text that swings, beside a slow bias": (
        ("deepseek_v3", {}, drawn_by_data, {}),
        (None, ()),
    ),
    "a bias larger than any score": (
        ("llama4", {}, UNEVEN, {"bias_range": 1.4}),
        ("bias_saturates", ("bias_too_slow", *SYMPTOMS)),
    ),
    "a loss that is too weak": (
        ("qwen3", {}, UNEVEN, {}),
        ("too_weak", ("nothing_balances", "hot_expert", "collapse")),
    ),
    "a bias that does not hold": (
        ("deepseek_v3", bias("sign (speed 0.0001)"), UNEVEN, {"bias_range": 0.01}),
        ("too_weak", ("bias_too_slow", "hot_expert")),
    ),
    "one layer that collapses": (
        ("gpt_oss", {}, FEW, {}),
        ("collapse", ("dead_experts", "hot_expert", "hot_rank", "too_weak")),
    ),
    "some experts dead": (
        ("qwen3", {}, shares((LATE, 7, slice(30, 35), 0.0)), {}),
        ("dead_experts", ("collapse", "hot_expert", "too_weak")),
    ),
    "half of them dead": (
        ("llama4", {}, shares((ALL, 7, slice(0, 8), 0.0)), {}),
        ("dead_experts", ("hot_expert", "too_weak")),
    ),
    "64 tokens that choose 8 of 1,024 at random": (
        ("deepseek_v3", {"num_experts": 1024, "global_batch_size": 1, "seq_len": 64}, even, {}),
        (None, ()),
    ),
    "a rank with the fuller half": (
        ("gpt_oss", {}, shares((ALL, ALL, slice(32, 48), 1.8)), {}),
        ("hot_rank", ("hot_expert", "too_weak")),
    ),
    "micro-batches": (
        ("qwen3", {}, even, {"micro_batch_max_violation": 2.0}),
        ("hidden_in_micro_batches", SYMPTOMS),
    ),
    "the first layer": (
        ("deepseek_v3", {}, shares((ALL, 0, slice(0, 256, 4), 1.9)), {}),
        ("first_layers", ("hot_expert", "too_weak")),
    ),
    "logits that grow": (
        ("qwen3", {}, even, {"largest_logit": growing(20, 120), "token_entropy": 0.01}),
        ("logits_grow", ("one_expert_decides",)),
    ),
    "logits that saturate a sigmoid": (
        ("deepseek_v3", {}, even, {"largest_logit": growing(10, 30)}),
        ("logits_grow", ()),
    ),
    "large logits that do not grow": (
        ("gpt_oss", {}, even, {"largest_logit": 70.0, "token_entropy": 0.5}),
        (None, ()),
    ),
    "growing logits that are small": (
        ("qwen3", {}, even, {"largest_logit": growing(5, 15)}),
        (None, ()),
    ),
    "one expert of four decides": (
        ("gpt_oss", {}, even, {"largest_logit": 12.0, "token_entropy": 0.01}),
        ("one_expert_decides", ("logits_grow",)),
    ),
    "one expert of one": (("llama4", {}, even, {"token_entropy": 0.01}), (None, ())),
    "flips of a bfloat16 gate": (
        ("qwen3", {}, even, {"bfloat16_flip_share": 0.08}),
        ("bfloat16_flips", SYMPTOMS),
    ),
    "few flips": (("deepseek_v3", {}, even, {"bfloat16_flip_share": 0.03}), (None, ())),
    "padding": (("qwen3", {}, even, {"padding_share": 0.5}), ("padding", SYMPTOMS)),
    "a loss that is lost, and with it the routing": (
        ("llama4", {}, shares((slice(30, None), ALL, slice(0, 3), 1000.0)), {"loss": LOST}),
        ("diverged", ("bias_too_slow", *SYMPTOMS)),
    ),
    "a benchmark": (
        ("deepseek_v3", {**NO_METHOD, "forced_routing": "hot_rank (rank 0)"}, FEW, {}),
        ("forced_routing", ("nothing_balances", *SYMPTOMS)),
    ),
    "a loss whose gradient is dropped": (
        ("qwen3", {}, UNEVEN, gradients(main=1.0, aux=0.0)),
        ("loss_without_gradient", ("aux_loss_too_weak", *SYMPTOMS)),
    ),
    "a gate that is detached, measured in every fifth step": (
        ("gpt_oss", {}, UNEVEN, gradients(main=0.0, aux=0.0, every=5)),
        ("loss_without_gradient", SYMPTOMS),
    ),
    "one layer without a gradient": (
        ("llama4", {"losses": GLOBAL}, even, gradients(main=1.0, aux=np.arange(48) != 7)),
        ("loss_without_gradient", ("aux_loss_too_weak", "aux_loss_dominates")),
    ),
    "a weight of 1e-12": (
        ("qwen3", {}, UNEVEN, gradients(main=1.0, aux=1e-10)),
        ("aux_loss_too_weak", ("loss_without_gradient", *SYMPTOMS)),
    ),
    "losses that are off in half of the layers": (
        (
            "qwen3",
            {"frozen": {"losses": list(range(24))}},
            even,
            gradients(main=1.0, aux=np.where(np.arange(48) < 24, 0.0, 0.01), every=3),
        ),
        (None, ()),
    ),
    "a frozen bias that moves": (
        (
            "deepseek_v3",
            {"frozen": {"bias": [5, 6]}},
            even,
            {"bias_norm": lambda step: np.where(np.arange(58) == 2, 1 + 1e-4 * step, 1.0)},
        ),
        ("frozen_part_drifts", SYMPTOMS),
    ),
    "a bias that moves beside frozen ones": (
        (
            "deepseek_v3",
            {"frozen": {"bias": [5, 6]}},
            even,
            {"bias_norm": lambda step: np.where(np.arange(58) == 9, 1 + 1e-4 * step, 1.0)},
        ),
        (None, ()),
    ),
    "a frozen gate that learns": (
        (
            "qwen3",
            {"frozen": {"gate": [3]}},
            even,
            {"frozen_gate_squared": lambda s: np.where(np.arange(48) == 3, 40 + 1e-3 * s, np.nan)},
        ),
        ("frozen_part_drifts", SYMPTOMS),
    ),
    **{f"a healthy {model}": ((model, {}, even, {}), (None, ())) for model in MODELS},
}


def planted(folder: Path, name: str) -> Path:
    model, changes, made, columns = ROWS[name][0]
    info = info_of(model, **changes)
    return write(folder, info, made(info), **columns)


@pytest.mark.parametrize("name", ROWS)
def test_the_cause_is_named_first_and_its_symptoms_are_not(tmp_path, name):
    expected, absent = ROWS[name][1]
    trace = read_trace(planted(tmp_path, name))
    found = checks.findings(trace)
    kinds = [finding.kind for finding in found]
    assert kinds[:1] == ([expected] if expected else [])
    assert not set(kinds) & set(absent)
    for finding in found:
        assert all((finding.what, finding.evidence, finding.reason, finding.remedy))
        assert_about_what_the_job_has(finding, trace.info)


def assert_about_what_the_job_has(finding: Finding, info: RunInfo) -> None:
    """Check that a remedy names a loss of the job, and a speed or an average that its rule has."""
    assert set(re.findall(r"# of (\w+)", finding.toml)) <= set(info.losses)
    if "its speed" in finding.remedy:
        assert "speed" in (info.expert_bias or "")
    if "ema = 0.0" in finding.toml:
        assert "ema" in (info.expert_bias or "")


def test_a_hot_expert_by_name(tmp_path):
    """From step 21 on, the expert gets 6 of 133 shares: 6 x 128 / 133 = 5.774 times its own.

    The third of eight ranks has 15 + 6 shares, 1.263 times 133 / 8. If the expert were like the
    others, it would have 1.
    """
    trace = read_trace(planted(tmp_path, "one expert of 48 layers"))
    finding = checks.findings(trace)[0]
    assert finding.layers == (17,) and finding.experts == ((17, 42),)
    assert abs(finding.since - 21) <= 1
    load = float(re.search(r"gets ([\d.]+) times", finding.what)[1])
    assert load == pytest.approx(5.774, rel=0.01)
    degree, rank, overload, without = re.findall(r"\d+(?:\.\d+)?", finding.evidence)
    assert (degree, rank) == ("8", "2")
    assert float(overload) == pytest.approx(1.263, abs=0.02)
    assert float(without) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("share", "overload"),
    [(3.0, 18 / (130 / 8)), (9.0, 24 / (136 / 8))],  # of rank 2, with 15 other experts
    ids=["ranks are even", "a rank is hot"],
)
def test_a_hot_expert_costs_time_where_its_rank_is_hot(tmp_path, share, overload):
    info = info_of("qwen3")
    (finding,) = checks.findings(
        read_trace(write(tmp_path, info, shares((ALL, 17, 42, share))(info)))
    )
    assert finding.kind == "hot_expert"
    assert float(re.findall(r"\d+\.\d+", finding.evidence)[0]) == pytest.approx(overload, abs=0.02)
    assert ("wait for it" in finding.reason) == (overload > 1.2)


@pytest.mark.parametrize("begin", [0, 15])
def test_only_a_checkpoint_that_can_exist_is_a_remedy(tmp_path, begin):
    info = info_of("llama4")
    share_SME = shares((slice(begin, None), 5, slice(0, 3), 1000.0))(info)
    finding = checks.findings(read_trace(write(tmp_path, info, share_SME)))[0]
    assert finding.kind == "collapse" and finding.since == begin + 1
    assert ("checkpoint before step" in finding.remedy) == (begin > 0)


def test_the_hotter_of_two_experts_stands_first(tmp_path):
    finding = checks.findings(read_trace(planted(tmp_path, "two experts of which one is hotter")))[
        0
    ]
    assert finding.experts == ((9, 90), (9, 7))


def test_what_began_earlier_is_no_symptom(tmp_path):
    """Routing collapses in step 16; the loss is not finite from step 31 on."""
    info = info_of("llama4")
    share_SME = shares((slice(15, None), ALL, slice(0, 3), 1000.0))(info)
    found = checks.findings(read_trace(write(tmp_path, info, share_SME, loss=LOST)))
    by_kind = {finding.kind: finding for finding in found}
    assert by_kind["diverged"].since == 31
    assert by_kind["collapse"].since == 16


def test_a_cause_is_as_bad_as_what_follows_from_it(tmp_path):
    """A layer with three used experts is a fault, so the missing balancing is one too."""
    finding = checks.findings(read_trace(planted(tmp_path, "losses of probabilities alone")))[0]
    assert finding.severity is Severity.FAULT and "collapse" in finding.explains
    forced = checks.findings(read_trace(planted(tmp_path / "b", "a benchmark")))[0]
    assert forced.severity is Severity.NOTE and "collapse" in forced.explains


def test_a_symptom_in_other_layers_is_listed(tmp_path):
    """The bias of one layer is larger than the scores; another layer has a hot expert."""
    info = info_of("llama4")
    write(
        tmp_path, info, shares((ALL, 0, 5, 4.0))(info), bias_range=np.where(np.arange(48), 0.2, 2)
    )
    kinds = [finding.kind for finding in checks.findings(read_trace(tmp_path))]
    assert kinds == ["bias_saturates"]
    write(
        tmp_path / "b",
        info,
        shares((ALL, 1, 5, 4.0))(info),
        bias_range=np.where(np.arange(48), 0.2, 2),
    )
    kinds = [finding.kind for finding in checks.findings(read_trace(tmp_path / "b"))]
    assert kinds == ["bias_saturates", "hot_expert"]


def test_what_explains_what_is_a_strict_order():
    """A check comes before the checks that it explains, and none of them explains another one that
    it does not."""
    explained = {
        one.kind: {
            other.kind for other in checks.CHECKS if {other.kind, other.topic} & {*one.explains}
        }
        for one in checks.CHECKS
    }
    order = [one.kind for one in checks.CHECKS]
    for kind, symptoms in explained.items():
        assert symptoms <= {*order[order.index(kind) + 1 :]}
        for symptom in symptoms:
            assert explained[symptom] <= symptoms
    known = {name for one in checks.CHECKS for name in (one.kind, one.topic)}
    assert all({*one.explains} <= known for one in checks.CHECKS)


NEW_CHECK = """
from titan_moe_lb.commands.diagnose.finding import Finding

def gate_is_cold(window):
    return Finding(what="cold", evidence="0", reason="0", remedy="warm it")
"""


def test_a_check_is_one_file_and_one_entry(tmp_path, monkeypatch, capsys):
    """The entry lists the findings that the check explains."""
    module: dict = {}
    (tmp_path / "gate.py").write_text(NEW_CHECK)
    exec((tmp_path / "gate.py").read_text(), module)
    mine = checks.Check(module["gate_is_cold"], explains=("loads",))
    monkeypatch.setattr(checks, "CHECKS", (mine, *checks.CHECKS))
    diagnose([planted(tmp_path, "one layer that collapses")], as_json=True)
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["kind"] == "gate_is_cold"
    assert set(finding["explains"]) == {"collapse", "hot_expert", "hot_rank"}


def test_losses_that_do_not_balance_are_those_without_counts_of_experts():
    needed = {"device_level": {"num_device_groups": 2}}
    needed["communication"] = {"num_device_groups": 2, "devices_per_token": 1}
    others = set()
    for name, kind in AuxLoss.kinds.items():
        if not kind.__module__.startswith("titan_moe_lb."):
            continue
        config = kind.Config(weight=1.0, **needed.get(name, {}))
        config.bind(num_experts=8, top_k=2)
        loss = config.build()
        counts = getattr(loss, "needs_counts", False) or loss.needs_step_counts
        if not counts or config.expert_groups > 1:
            others.add(kind.metric_name)
    assert others == set(OTHER_LOSSES)


@pytest.mark.parametrize("seq_len", [1, 8, 64, 1024])
def test_chance_alone_is_never_wrong(tmp_path, seq_len):
    """Balanced routing of few tokens has empty experts and a MaxVio above 100, but no finding."""
    info = info_of("qwen3", global_batch_size=1, seq_len=seq_len)
    info = dataclasses.replace(info, layers=info.layers[:6])
    for seed in range(10):
        write(tmp_path / str(seed), info, even(info), seed=seed)
        assert checks.findings(read_trace(tmp_path / str(seed))) == []


def test_the_bound_of_chance_by_hand(tmp_path):
    """The bound for an expert without tokens is e**-n x 128 experts x 48 layers x 1,000.

    At n = 18 balanced tokens it is 0.09, below 1; at 15 it is 1.9. For twice 50 tokens it is
    e**(-50 (2 ln 2 - 1)) x ... = 0.026.
    """
    window = Window(read_trace(planted(tmp_path, "a healthy qwen3")))
    for balanced, load, beyond in ((18, 0, True), (15, 0, False), (50, 2, True), (38, 2, False)):
        window.__dict__["balanced_M"] = np.array([balanced])
        assert window.beyond_chance(np.array([float(load)])) == beyond


def test_counts_that_chance_makes_are_balanced(tmp_path):
    """1e6 tokens, top 8 of 128 experts: the standard deviation is 250 of 62,500 tokens each."""
    window = Window(read_trace(planted(tmp_path, "a healthy qwen3")))
    assert (window.by_chance(lambda counts: counts.sum(axis=-1), 1e6) == 8e6).all()
    assert window.by_chance(np.std, 1e6) == pytest.approx(250, rel=0.05)
    assert (window.by_chance(max_violation, 1e6) < 5 * 250 / 62500).all()


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_bounds_of_a_layer_among_others_are_those_of_the_layer_alone(score_func):
    """The balanced layers have 8 experts with top 1, and 128 with top 8."""
    kinds = [(8, 1), (128, 8)]

    def window(*kinds: tuple[int, int]) -> Window:
        experts, top_k = zip(*kinds, strict=True)
        info = info_of(
            "qwen3",
            layers=tuple(range(len(kinds))),
            num_experts=max(experts),
            top_k=max(top_k),
            num_experts_by_layer=experts,
            top_k_by_layer=top_k,
            score_func=score_func,
        )
        counts_ME = np.full((len(kinds), max(experts)), 6400) * np.divide(top_k, experts)[:, None]
        counts_ME = mark_absent(counts_ME.astype(int), np.array(experts))
        return Window(
            Trace(
                path=Path("moe_load.arrow"),
                info=info,
                steps=np.arange(STEPS),
                counts_SME=np.stack([counts_ME] * STEPS),
                micro_batch_counts_SME=np.zeros((0, *counts_ME.shape)),
                layer_columns={},
                step_columns={},
                damage=(),
            )
        )

    def bounds(window: Window) -> np.ndarray:
        balancing = Balancing(window)
        return np.array(
            [
                window.balanced_M,
                window.uneven_M,
                window.by_chance(max_violation, 6400),
                window.by_chance(effective_experts, 6400),
                balancing.margin_M,
                balancing.moved(np.full(len(window.trace.layers), 0.1)),
            ]
        )

    alone = [bounds(window(kind)) for kind in kinds]
    np.testing.assert_array_equal(bounds(window(*kinds)), np.hstack(alone))
    assert alone[0][0] == 10 * 6400 / 8 and alone[1][0] == 10 * 6400 * 8 / 128
    assert checks.findings(window(*kinds).trace) == []


def test_a_healthy_run_says_what_was_looked_at(tmp_path, capsys):
    assert diagnose([planted(tmp_path, "a healthy deepseek_v3")], fail_on="note") == 0
    text = capsys.readouterr().out
    assert diagnose([tmp_path], as_json=True) == 0
    well = json.loads(capsys.readouterr().out)["well"]
    # Nothing of these is in this run.
    silent = {"forced_routing", "frozen_part_drifts", "loss_without_gradient"}
    silent |= {"aux_loss_too_weak", "aux_loss_dominates"}
    silent |= {"logits_grow", "one_expert_decides", "bfloat16_flips"}
    assert set(well) == {one.kind for one in checks.CHECKS} - silent
    for kind, seen in well.items():
        assert kind.replace("_", " ") in text and re.search(r"\d", seen)


def test_what_a_person_and_a_script_get(tmp_path, capsys):
    planted(tmp_path, "sign at 1e-6")
    cli.main(["diagnose", str(tmp_path)])
    text = capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["diagnose", str(tmp_path), "--json", "--fail-on", "warning"])
    assert stop.value.code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == STEPS
    [finding] = answer["findings"]
    assert finding["kind"] == "bias_too_slow" and len(finding["layers"]) == 58
    assert finding["severity"] == "warning" and set(finding["explains"]) >= {
        "hot_expert",
        "too_weak",
    }
    assert "4e-05" in text and "0.0039" in text
    for what in finding["explains"].values():
        assert what[:40] in text
    cli.main(["diagnose", str(tmp_path), "--fail-on", "fault"])


@pytest.mark.parametrize(
    ("resumed", "found"),
    [
        (bias("sign (speed 0.001)"), ("too_weak", "hot_expert")),  # as before the resume
        (bias("quantile (ema 0.5)"), ()),
    ],
    ids=["the same rule", "another rule"],
)
def test_only_steps_of_the_present_balancing_count(tmp_path, resumed, found):
    before = info_of("llama4", **bias("sign (speed 0.001)"))
    write(tmp_path, before, shares((LATE, 5, 3, 20.0))(before))
    after = info_of("llama4", **resumed)
    write(tmp_path, after, even(after)[:8], first_step=STEPS + 1)
    kinds = {finding.kind for finding in checks.findings(read_trace(tmp_path))}
    assert bool(kinds & {*found}) == bool(found), kinds


def test_too_few_steps_of_the_present_balancing(tmp_path, capsys):
    before, after = info_of("llama4"), info_of("llama4", **bias("quantile (ema 0.5)"))
    write(tmp_path, before, even(before))
    write(tmp_path, after, even(after)[:4], first_step=STEPS + 1)
    assert diagnose([tmp_path], fail_on="warning") == 1
    assert f"step {STEPS + 1}" in capsys.readouterr().out


def test_an_excess_begins_under_the_present_balancing(tmp_path):
    before, after = info_of("llama4"), info_of("llama4", **bias("quantile (ema 0.5)"))
    hot = shares((ALL, 5, 3, 5.0))
    write(tmp_path, before, hot(before))
    write(tmp_path, after, hot(after), first_step=STEPS + 1)
    (finding,) = checks.findings(read_trace(tmp_path))
    assert (finding.kind, finding.since) == ("hot_expert", STEPS + 1)


def test_a_run_that_is_too_short_says_so(tmp_path, capsys):
    info = info_of("llama4")
    write(tmp_path, info, even(info)[:3])
    assert diagnose([tmp_path], fail_on="fault") == 1
    assert "3 logged steps" in capsys.readouterr().out


def test_overload_of_the_best_order_by_hand():
    """Loads 4, 3, 2, 1 on two ranks of two experts: the best order is 4 + 1 and 3 + 2."""
    for load_E, expected in (([4.0, 3.0, 2.0, 1.0], 1), ([9.0, 1.0, 1.0, 1.0], 10 / 6)):
        best = expert_order.greedy(np.array(load_E), 2)
        assert expert_order.overload(np.array(load_E), best) == expected


def test_a_hot_expert_on_a_cold_rank_is_not_what_others_wait_for(tmp_path):
    """Rank 2 of 8 has 6 + 15 x 0.2 = 9 shares, rank 0 has 16 x 1.5 = 24, the others 16 each."""
    info = info_of("qwen3")
    cold = [(ALL, 17, expert, 0.2) for expert in range(32, 48) if expert != 42]
    hot = [(ALL, 17, expert, 1.5) for expert in range(16)]
    trace = read_trace(write(tmp_path, info, shares((ALL, 17, 42, 6.0), *cold, *hot)(info)))
    (finding,) = [one for one in checks.findings(trace) if one.kind == "hot_expert"]
    total = 9 + 24 + 6 * 16
    degree, own, load, hottest, most = re.findall(r"\d+(?:\.\d+)?", finding.evidence)
    assert (degree, own, hottest) == ("8", "2", "0")
    assert float(load) == pytest.approx(9 * 8 / total, abs=0.02)
    assert float(most) == pytest.approx(24 * 8 / total, abs=0.02)
