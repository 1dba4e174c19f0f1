"""A fault that was planted is the one that is named, and in a healthy run none is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic_trace import FIGURES, run_info
from titan_moe_lb import cli
from titan_moe_lb.diagnose import checks
from titan_moe_lb.diagnose.command import diagnose
from titan_moe_lb.traces import placement
from titan_moe_lb.traces.figure import Figure
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceWriter, read_trace

STEPS, LAYERS, EXPERTS, TOP_K = 40, 4, 8, 2
TOKENS = 8 * 256 * TOP_K
"""Choices of a layer in a step."""


def write(folder: Path, share_SME, figures=None, step_figures=None, steps=None, **info) -> Path:
    """The trace of a run whose experts get such shares, with the noise of chance.

    Args:
        figures, step_figures: names to values that replace the healthy ones.
    """
    random = np.random.default_rng(0)
    info = run_info(LAYERS, EXPERTS, TOP_K, **info)
    padding = (Figure("padding_share", per="step"),)
    losses = tuple(Figure(name, is_aux_loss=True) for name in info.losses)
    info = dataclasses.replace(info, figures=(*losses, *FIGURES, *padding))
    writer = TraceWriter(folder, info)
    for step, share_ME in enumerate(share_SME):
        counts_ME = np.stack(
            [random.multinomial(TOKENS, share / share.sum()) for share in share_ME]
        )
        healthy = {"bias_range": 0.05, "micro_batch_max_violation": 0.4}
        of_step = {"loss": 5.0 - step / 20, "padding_share": 0.1}
        figures_M = {
            name: np.broadcast_to(value, LAYERS)
            for name, value in (healthy | (figures or {})).items()
        }
        given = {k: v[step] if np.ndim(v) else v for k, v in (step_figures or {}).items()}
        load = StepLoad(
            layers=info.layers,
            counts_ME=counts_ME,
            figures={name: values.astype(float) for name, values in figures_M.items()},
            step_figures=of_step | given,
        )
        writer.write((steps or range(1, STEPS + 1))[step], load)
    writer.close()
    return folder


def even() -> np.ndarray:
    return np.ones((STEPS, LAYERS, EXPERTS))


def with_shares(layer, experts, share) -> np.ndarray:
    shares = even()
    shares[:, layer, experts] = share
    return shares


def swinging() -> np.ndarray:
    shares = even()
    shares[::2, :, :4], shares[1::2, :, 4:] = 2.0, 2.0
    return shares


def never_better() -> np.ndarray:
    """One expert has 2.2 times its share throughout."""
    return with_shares(slice(None), 3, 2.7)


def lost_at(step: int) -> np.ndarray:
    loss_S = np.linspace(5, 4, STEPS)
    loss_S[step:] = np.nan
    return loss_S


UNBALANCED = {"losses": {}, "expert_bias": None}
NO_EP = {"ep": 1}
PLANTED = {
    "dead_experts": [
        (with_shares(2, [5], 0.0), {}),
        (with_shares(slice(None), [0, 1], 0.0), NO_EP),
    ],
    "collapse": [(with_shares(1, [2, 6], 100.0), {})],
    "nothing_balances": [(even(), UNBALANCED), (even(), {**UNBALANCED, "expert_bias": "frozen"})],
    "too_weak": [(never_better(), NO_EP)],
    "bias_saturates": [(even(), {"figures": {"bias_range": 1.4}})],
    "bias_oscillates": [(swinging(), NO_EP)],
    "hot_rank": [
        (with_shares(0, [0, 1, 2, 3], 2.0), {"ep": 2}),
        (with_shares(slice(None), [6, 7], 1.8), {"ep": 4}),
    ],
    "hidden_in_micro_batches": [(even(), {"figures": {"micro_batch_max_violation": 2.0}})],
    "first_layers": [(with_shares(0, [1, 6], 2.5), NO_EP)],
    "padding": [(even(), {"step_figures": {"padding_share": 0.5}})],
    "diverged": [(even(), {"step_figures": {"loss": lost_at(30)}})],
    "forced_routing": [(even(), {"forced_routing": "hot_rank (ranks [0])"})],
}


@pytest.mark.parametrize(
    ("kind", "shares", "options"),
    [(kind, *case) for kind, cases in PLANTED.items() for case in cases],
)
def test_the_planted_fault_is_the_first_that_is_named(tmp_path, kind, shares, options):
    trace = read_trace(write(tmp_path, shares, **options))
    found = checks.findings(trace)
    assert kind in [finding.kind for finding in found]
    worst = [finding.kind for finding in found if finding.severity == found[0].severity]
    assert kind in worst
    for finding in found:
        assert all((finding.what, finding.evidence, finding.reason, finding.remedy))


@pytest.mark.parametrize(
    "shares",
    [
        even(),
        np.random.default_rng(1).uniform(0.8, 1.2, (1, LAYERS, EXPERTS)).repeat(STEPS, axis=0),
    ],
    ids=["even", "a little uneven"],
)
def test_nothing_is_wrong_with_a_healthy_run(tmp_path, shares, capsys):
    assert diagnose(write(tmp_path, shares), fail_on="note") == 0
    assert "nothing is wrong with the balance" in capsys.readouterr().out


def test_what_a_person_and_a_script_get(tmp_path, capsys):
    write(tmp_path, PLANTED["hot_rank"][0][0])
    cli.main(["diagnose", str(tmp_path)])
    said = capsys.readouterr().out
    assert "warning: one expert-parallel rank is hot" in said and "rank 0 gets 1.3" in said
    with pytest.raises(SystemExit) as stop:
        cli.main(["diagnose", str(tmp_path), "--json", "--fail-on", "warning"])
    assert stop.value.code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == STEPS and answer["findings"][0]["kind"] == "hot_rank"
    cli.main(["diagnose", str(tmp_path), "--fail-on", "fault"])


def test_a_run_that_is_too_short_says_so(tmp_path, capsys):
    write(tmp_path, even()[:3])
    assert diagnose(tmp_path, fail_on="fault") == 1
    assert "3 logged steps are too short to say: 5 at least" in capsys.readouterr().out


def test_overload_of_the_best_order_by_hand():
    """4, 3, 2, 1 on two ranks of two: 4 + 1 and 3 + 2."""
    for load_E, expected in (([4.0, 3.0, 2.0, 1.0], 1), ([9.0, 1.0, 1.0, 1.0], 10 / 6)):
        best = placement.greedy(np.array(load_E), 2)
        assert placement.overload(np.array(load_E), best) == expected
