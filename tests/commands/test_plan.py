"""Tests of ``titan-moe-lb plan`` on small jobs, against real builds and values by hand."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support import planning
from tests.support.planning import DEVICE, TINY, device_file, plan, write_run
from titan_moe_lb.commands.plan import arguments
from titan_moe_lb.parallel import single_process

LAYOUTS = {
    "ep4": ["--parallelism.expert_parallel_degree=4"],
    "hsdp2x2, ep2": [
        "--parallelism.data_parallel_replicate_degree=2",
        "--parallelism.expert_parallel_degree=2",
    ],
    "tp2": ["--parallelism.tensor_parallel_degree=2"],
    "tp2, ep4": [
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.expert_parallel_degree=4",
    ],
    "pp2 interleaved, ep2": [
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
        "--parallelism.expert_parallel_degree=2",
    ],
    "pp2 1f1b": ["--parallelism.pipeline_parallel_degree=2"],
    "pp2 zbv": [
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
    ],
}


@pytest.fixture
def device(tmp_path) -> str:
    return device_file(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_of_a_rank_is_that_of_a_real_build(ranks, device, layout):
    """The sizes equal the parameters and optimizer state of the first rank of every pipeline
    position, on gloo."""
    ranks.need(4)
    flags = LAYOUTS[layout]
    ep = next((flag.split("=")[1] for flag in flags if "expert_parallel" in flag), "1")
    planned = plan(ranks, ["--hardware", device, "--ranks=4", f"--ep={ep}"], flags)
    real = ranks.run(4, planning.built_state, [*TINY, *flags])
    assert planned["states"]
    for state in planned["states"]:
        built = real[state["rank"]]
        for name in ("num_parameters", "parameter_bytes", "optimizer_bytes"):
            assert state[name] == built[name], (state["rank"], name)
        assert state["gradient_bytes"] == built["parameter_bytes"]
    assert max(state["num_parameters"] for state in planned["states"]) == max(
        built["num_parameters"] for built in real
    )


@pytest.mark.parametrize(
    ("schedule", "least", "most"),
    [
        # 8 micro-batches on 2 ranks: the textbook's (M v + P - 1) x (F + B); a bubble that is
        # filled is between none and that.
        ("1F1B", 27, 27),
        ("GPipe", 27, 27),
        ("Interleaved1F1B", 51, 51),
        ("LoopedBFS", 51, 51),
        ("InterleavedZeroBubble", 48, 51),
        ("ZBVZeroBubble", 48, 51),
        ("DualPipeV", 48, 51),
    ],
)
def test_every_schedule_of_torch_can_be_replayed(ranks, schedule, least, most):
    flags = [
        "--parallelism.pipeline_parallel_degree=2",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--training.local_batch_size=8",
    ]
    ((span, stages),) = ranks.run(1, planning.unit_makespan, [*TINY, *flags], 2)
    assert stages == (2 if schedule in ("1F1B", "GPipe") else 4)
    assert least <= span <= most


def mlp(rows: float, dim: int, hidden: int) -> float:
    return 3 * 2 * rows * dim * hidden / DEVICE["bf16_flops"]


def test_answers_by_hand(ranks, device):
    """The tiny model at EP 2 has 8 experts of 64 x 32, top 2, and a shared expert of 64 x 32."""
    planned = plan(
        ranks,
        [
            "--hardware", device, "--ranks=2", "--ep=2", "--imbalance=1.0,2.0,worst",
            "--compute-efficiency=1", "--network-efficiency=1",
        ],
        ["--training.local_batch_size=4"],
    )  # fmt: skip
    job = planned["job"]
    assert (job["num_experts"], job["top_k"], job["dim"], job["hidden_dim"]) == (8, 2, 64, 32)
    assert job["moe_layers"] == [1, 2, 3]
    (degree,) = planned["degrees"]
    tokens = 4 * 128
    assert degree["tokens_per_rank"] == tokens
    mean = 2 * tokens * 2 / 8
    exchange = tokens * 2 * 64 * 2 * (1 / 2) / 1e9
    layers = []
    for row, factor in zip(degree["rows"], (1.0, 2.0, 4.0), strict=True):
        outcome = row["outcome"]
        hot, rest = factor * mean, (2 * tokens * 2 - factor * mean) / 7
        compute = (
            2 * tokens * 64 * 8 / 1e12
            + mlp(hot, 64, 32)
            + 3 * mlp(math.ceil(rest), 64, 32)
            + mlp(tokens, 64, 32)
            # Values of two bytes, moved: 4 D + 3 F of each received token, 5 D of each sent one.
            + 2 * ((hot + 3 * rest) * (4 * 64 + 3 * 32) + tokens * 2 * 5 * 64) / 1e15
        )
        skew = (hot + 3 * rest) / (4 * mean)
        assert row["imbalance_factor"] == factor
        assert outcome["compute_seconds"] == pytest.approx(compute, rel=1e-9)
        assert outcome["dispatch_seconds"] == pytest.approx(exchange * skew, rel=1e-9)
        assert outcome["combine_seconds"] == pytest.approx(exchange * skew, rel=1e-9)
        # Forward, then twice the products and each all-to-all once more.
        layers.append(3 * compute + 4 * exchange * skew)
        assert outcome["layer_seconds"] == pytest.approx(layers[-1], rel=1e-9)
        assert outcome["layer_slowdown"] == pytest.approx(layers[-1] / layers[0], rel=1e-9)
        assert outcome["hot_expert_tokens"] == pytest.approx(hot)
        assert outcome["busiest_rank_tokens"] == pytest.approx(hot + 3 * rest)
    balance, _twice, worst = (row["outcome"] for row in degree["rows"])
    # No checkpointing: the peak is in the loss (512 tokens of 2,048 logits), when each of 3 layers
    # keeps what it received and none is at work.
    received = worst["busiest_rank_tokens"] - balance["busiest_rank_tokens"]
    assert worst["memory_bytes"] - balance["memory_bytes"] == pytest.approx(
        received * 3 * 2 * (64 + 4 * 32), rel=1e-9
    )
    # Only the three MoE layers' part of the step depends on the routing.
    assert worst["step_seconds"] - balance["step_seconds"] == pytest.approx(
        3 * (layers[2] - layers[0]), rel=1e-9
    )


def test_memory_decides_what_fits(ranks, tmp_path, device):
    """At the largest imbalance that fits, the memory equals the usable memory."""
    job = ["--training.local_batch_size=64"]
    arguments = ["--ranks=2", "--ep=2"]
    roomy = plan(ranks, [*arguments, "--hardware", device, "--imbalance=1.0,2.5,worst"], job)
    needs = [row["outcome"]["memory_bytes"] for row in roomy["degrees"][0]["rows"]]
    assert needs[0] < needs[1] < needs[2]
    path = tmp_path / "small.toml"
    path.write_text(Path(device).read_text().replace("100000000.0", repr(needs[1] / 0.9)))
    small = plan(ranks, [*arguments, "--hardware", str(path), "--imbalance=1.0,2.5,worst"], job)
    (degree,) = small["degrees"]
    assert degree["largest_imbalance_that_fits"] == pytest.approx(2.5, abs=2e-3)
    assert [row["outcome"]["fits"] for row in degree["rows"]][::2] == [True, False]
    path.write_text(Path(device).read_text().replace("100000000.0", "1e7"))
    none = plan(ranks, [*arguments, "--hardware", str(path)], job)
    assert none["degrees"][0]["largest_imbalance_that_fits"] is None


def test_run_with_two_levels_costs_what_the_formula_says(ranks, device, tmp_path):
    """In 20 steps, the first is balanced, and the last has a hot expert with 2.75 times the
    mean."""
    hot = np.array([2.75 * 7] + [8 - 2.75] * 7) * 64
    counts = np.repeat(np.stack([np.full(8, 448.0), hot])[:, None], 3, axis=1).round().astype(int)
    # Twenty steps, so that a tenth of them at each end are averaged: two.
    write_run(tmp_path, np.repeat(counts, 10, axis=0))
    planned = plan(
        ranks,
        ["--hardware", device, "--ranks=2", "--ep=2", "--imbalance=1.0,2.75"]
        + ["--from-run", str(tmp_path)],
        ["--training.local_batch_size=7"],
    )
    (degree,) = planned["degrees"]
    contiguous, greedy = degree["measured"]
    assert planned["run"]["first_steps"] == [1, 2]
    assert planned["run"]["last_steps"] == [19, 20]
    for name in ("first", "last"):
        # One of four experts on a device is hot wherever it is placed. Expert 0 of every layer
        # is on one device in blocks, and on another one in every layer when placed greedily.
        blocks, moved = contiguous[name], greedy[name]
        assert moved.pop("memory_bytes") <= blocks["memory_bytes"]
        assert moved == pytest.approx({key: blocks[key] for key in moved}, rel=1e-9)
    for name, row in zip(("first", "last"), degree["rows"], strict=True):
        assert contiguous[name] == pytest.approx(row["outcome"], rel=1e-9)


def test_better_placement_of_a_run(ranks, device, tmp_path):
    """Two hot experts share a device; a greedy placement separates them."""
    counts = np.array([5, 5, 1, 1, 1, 1, 1, 1]) * 64
    write_run(tmp_path, np.broadcast_to(counts, (1, 3, 8)))
    planned = plan(
        ranks,
        ["--hardware", device, "--ranks=2", "--ep=2", "--from-run", str(tmp_path)],
        ["--training.local_batch_size=4"],
    )
    contiguous, greedy = planned["degrees"][0]["measured"]
    assert contiguous["last"]["busiest_rank_tokens"] == pytest.approx(2048 * 12 / 16)
    assert greedy["last"]["busiest_rank_tokens"] == pytest.approx(2048 * 8 / 16)
    assert greedy["last"]["step_slowdown"] < contiguous["last"]["step_slowdown"]


def test_table_and_page(ranks, device, tmp_path):
    write_run(tmp_path, np.full((2, 3, 8), 128))
    page = tmp_path / "plan.html"
    status, out, err = ranks.run(
        1,
        planning.command,
        ["plan", "--hardware", device, "--ranks=2", "--from-run", str(tmp_path), "-o", str(page)]
        + ["--", *TINY],
    )[0]
    assert (status, err) == (0, "")
    assert "deepseek_v3 tiny on 2 x device: 3 MoE layers, 8 experts, top 2" in out
    # The layout's own degree is 1; 2 is the other one that it allows.
    assert "EP 1: fits at any imbalance" in out and "EP 2: fits at any imbalance" in out
    assert "micro-batch's forward of one MoE layer" in out and out.endswith(f"\nPage: {page}\n")
    assert "greedy" in out
    # Without exchange the step is shortest, though every degree is at 1.00 of its own balance.
    assert re.search(r"^Fastest that fits: EP 1 at imbalance 1.00 \([\d.]+ ms", out, re.M)
    assert re.search(r"EP 2: first steps 1.00 x balance \([\d.]+ ms\)", out)
    text = page.read_text()
    assert text.count('<th scope="col">step s</th><th scope="col">step x balance</th>') == 2
    measured = text.partition("<h2>Measured load</h2>")[2]
    rows = re.findall(r"<tr.*?><td>(\d)</td><td>(\w+)</td><td>(\w+)</td>", measured)
    placed = [(how, when) for how in ("contiguous", "greedy") for when in ("first", "last")]
    assert rows == [(ep, *one) for ep in "12" for one in placed]
    packed = re.search(r'id="drawings">([^<]*)', text)[1]
    drawings = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert [len(figures) for figures in drawings] == [2, 1, 1, 2]
    for figure in (figure for figures in drawings for figure in figures):
        assert figure["layout"]["xaxis"]["title"]["text"]
        assert figure["layout"]["yaxis"]["title"]["text"]
    assert "What the run&#39;s own load costs" in text
    assert "http" not in text.split('<script type="text/plain"')[0].split("<footer>")[0]


TABLE = """
from titan_moe_lb.commands.answer.answer import Cell, Column, Table

def table(plan):
    rows = [(d.ep_degree, Cell(value=d.tokens_per_rank, is_bad=True)) for d in plan.degrees]
    columns = (Column(title="EP"), Column(title="routed", unit="tokens", show="{:,}".format))
    return Table(title="Tokens", columns=columns, groups=[rows], notes=["[all]"], key="tokens")
"""


def test_a_table_is_one_file_and_one_line(ranks, device, tmp_path):
    """Terminal, JSON and page show the same table."""
    file, page = tmp_path / "tokens.py", tmp_path / "plan.html"
    file.write_text(TABLE)
    words = ["plan", "--hardware", device, "--ranks=2", "--ep=1,2", "-o", str(page)]

    def out(*more: str) -> str:
        run = planning.command_with_table, str(file), [*words, *more, "--", *TINY]
        status, out, err = ranks.run(1, *run)[0]
        assert (status, err) == (0, "")
        return out

    expected = [(ep, 8 * 128) for ep in (1, 2)]
    shown = out().partition("routed tokens")[2]
    assert re.findall(r"^ +(\d) +([\d,]+) *$", shown, re.M) == [("1", "1,024"), ("2", "1,024")]
    assert shown.endswith(f"[all]\n\nPage: {page}\n")
    assert json.loads(out("--json"))["tokens"] == [
        {"EP": ep, "routed tokens": tokens} for ep, tokens in expected
    ]
    section = page.read_text().partition("<h2>Tokens</h2>")[2].partition("</section>")[0]
    assert section.count('<td class="bad">1,024</td>') == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep=3"], "expert_parallel_degree 3 must divide"),
        (["--imbalance=lognormal:much"], "'lognormal:much' is neither a number nor"),
        (["--imbalance=lognormal:-1"], "--imbalance lognormal:-1 is outside [0, 5]"),
        (["--imbalance=overload:2"], "'overload:2' is neither a number nor"),
        (["--imbalance=overload:0.5@4"], "--imbalance overload:0.5@4: an overload factor is"),
        (["--imbalance=overload:2@3"], "--imbalance overload:2@3: 3 ranks do not divide 8"),
        (["--imbalance=overload:9@4"], "--imbalance overload:9@4 is above 2.42, which"),
        (["--drop-share=0.1"], "--drop-share needs the load of a run: add --from-run"),
        (["--drop-share=1.5"], "--drop-share 1.5 must be above 0 and below 1"),
    ],
)
def test_mistakes_are_one_line(ranks, arguments, message):
    """These wrong flags are not in tests/refused."""
    words = ["plan", "--ranks=4", "--hardware=h100", *arguments, "--", *TINY]
    status, out, err = ranks.run(1, planning.command, words)[0]
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("titan_moe_lb: error: ") and err.count("\n") == 1


def test_multi_token_prediction_has_an_moe_layer_of_its_own(ranks, device):
    planned = plan(ranks, ["--hardware", device], ["--model.num_mtp_layers=1"])
    assert planned["job"]["moe_layers"] == [1, 2, 3, 4]


def test_a_trainer_that_was_built_in_this_process_sets_no_ranks(monkeypatch):
    monkeypatch.delenv("NGPU", raising=False)
    single_process.announce()
    assert arguments.ranks(SimpleNamespace(ranks=None), of_job=8) == 8
