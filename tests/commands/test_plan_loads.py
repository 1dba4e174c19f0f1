"""Tests of ``titan-moe-lb plan`` from recorded loads: verdict, placements and capacity, by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

import titan_moe_lb as lb
from tests.support import planning
from tests.support.planning import TINY, device_file, plan, write_run
from titan_moe_lb import cli

MEAN = 256  # tokens of an expert: 2 ranks x 512 tokens x top 2 over 8 experts
EVEN = np.full(8, MEAN)
HOT_01 = np.array([5, 5, 1, 1, 1, 1, 1, 1]) * MEAN // 2
HOT_0_AND_4 = np.array([5, 1, 1, 1, 5, 1, 1, 1]) * MEAN // 2
HOT_0_ALONE = np.array([9, 1, 1, 1, 1, 1, 1, 1]) * MEAN // 2
JOB = ["--training.local_batch_size=4", "--training.steps=900"]


def steps(*loads: np.ndarray) -> np.ndarray:
    """Write one step for each load, equal in all three layers."""
    return np.repeat(np.stack(loads)[:, None], 3, axis=1)


@pytest.fixture
def planned(ranks, tmp_path):
    """Plan on 2 ranks from a run with these loads."""

    def of_run(counts, micro_batches=None, *arguments: str) -> dict:
        write_run(tmp_path, counts, micro_batches)
        return plan(
            ranks,
            ["--hardware", device_file(tmp_path), "--ranks=2", "--ep=2"]
            + ["--from-run", str(tmp_path), *arguments],
            JOB,
        )

    return of_run


def measured(planned: dict) -> dict[str, dict]:
    return {row["placement"]: row for row in planned["degrees"][0]["measured"]}


def test_a_run_of_another_name_and_the_same_shape_is_taken(ranks, planned, tmp_path):
    """A run of another framework or of an own model has the same loads."""
    mine = planned(steps(EVEN, HOT_01))
    write_run(tmp_path / "other", steps(EVEN, HOT_01), model="mine", flavor="big")
    arguments = ["--hardware", device_file(tmp_path), "--ranks=2", "--ep=2"]
    other = plan(ranks, [*arguments, "--from-run", str(tmp_path / "other")], JOB)
    assert measured(other) == measured(mine)


def test_a_run_of_fewer_layers_stands_for_the_depth(ranks, planned, tmp_path):
    """Two recorded layers, the first hot, stand for three: layer 0 * 2 // 3 = 0, 0, then 1."""
    hot_and_even = np.stack([HOT_01, EVEN])
    mine = planned(np.broadcast_to(np.stack([HOT_01, HOT_01, EVEN]), (20, 3, 8)))
    folder = tmp_path / "other"
    write_run(folder, np.broadcast_to(hot_and_even, (20, 2, 8)), layers=(0, 7))
    arguments = ["--hardware", device_file(tmp_path), "--ranks=2", "--ep=2"]
    other = plan(ranks, [*arguments, "--from-run", str(folder)], JOB)
    assert measured(other) == measured(mine)
    assert (other["run"]["num_layers"], other["run"]["num_planned_layers"]) == (2, 3)


def test_a_plan_of_bare_counts_has_a_value_everywhere(ranks, tmp_path):
    """Counts alone have no times, no micro-batches and no overload: nothing shows them as nan."""
    with lb.LoadTrace(tmp_path, top_k=2) as trace:
        for step in range(1, 21):
            trace.write(step, dict.fromkeys((0, 1, 2), HOT_01))
    command = ["plan", "--hardware", device_file(tmp_path), "--ranks=2", "--ep=1,2"]
    command += ["--from-run", str(tmp_path)]
    page = tmp_path / "plan.html"
    texts = []
    for output in (["-o", str(page)], ["--json"]):
        status, out, err = ranks.run(1, planning.command, [*command, *output, "--", *TINY, *JOB])[0]
        assert status == 0, err
        texts.append(out)
    body = re.sub("<(script|style).*?</\\1>", "", page.read_text(), flags=re.DOTALL)
    for text in (*texts, body):
        assert not re.search(r"\b(nan|inf|None|NaN|Infinity|undefined)\b", text)


def test_verdict_by_hand(planned):
    """The first half of the run is balanced; then two hot experts share a device."""
    found = planned(steps(*[EVEN] * 10, *[HOT_01] * 10))
    degree, verdict = found["degrees"][0], found["verdict"]
    last, balance = measured(found)["contiguous"]["last"], degree["balance"]
    assert (verdict["ep_degree"], verdict["outcome"]) == (2, last)
    hours = 900 * 2 / 3600
    assert verdict["gpu_hours"] == pytest.approx(last["step_seconds"] * hours)
    saved = last["step_seconds"] - balance["step_seconds"]
    assert verdict["balancing"]["share"] == pytest.approx(saved / last["step_seconds"])
    assert verdict["balancing"]["gpu_hours"] == pytest.approx(saved * hours)
    assert verdict["head_room_bytes"] == pytest.approx(
        found["usable_memory_bytes"] - last["memory_bytes"]
    )
    # Placed for the first half, where nothing says which experts will be hot.
    (greedy,) = verdict["placements"]
    stale = measured(found)["greedy"]["stale_last"]["step_seconds"]
    assert greedy["gpu_hours"] == pytest.approx((last["step_seconds"] - stale) * hours)


def test_micro_batches_count_one_by_one(planned):
    """Two alternating opposite loads are balanced together, but each costs what it costs alone."""
    mirrored = HOT_01[::-1]
    in_turn = planned(steps(*[EVEN] * 20), steps(*[HOT_01, mirrored] * 10))
    alone = planned(steps(*[EVEN] * 20), steps(*[HOT_01] * 20))
    together = planned(steps(*[EVEN] * 20))
    last, always, never = (
        measured(one)["contiguous"]["last"] for one in (in_turn, alone, together)
    )
    assert never["layer_slowdown"] == pytest.approx(1.0)
    assert last["layer_seconds"] == pytest.approx(always["layer_seconds"])
    assert last["step_seconds"] == pytest.approx(always["step_seconds"])
    assert last["layer_slowdown"] > 1.2
    assert in_turn["run"]["micro_batches"] == 20 and together["run"]["micro_batches"] == 0


def test_a_layer_is_as_slow_as_its_own_load(planned):
    counts = steps(*[EVEN] * 20)
    counts[:, 1] = HOT_01
    one, all_three = planned(counts), planned(steps(*[HOT_01] * 20))
    row, worst = (measured(found)["contiguous"]["last"] for found in (one, all_three))
    assert row["worst_layer_slowdown"] == pytest.approx(worst["layer_slowdown"])
    assert row["layer_slowdown"] - 1 == pytest.approx((worst["layer_slowdown"] - 1) / 3)


def test_a_placement_gets_stale(planned):
    """First experts 0 and 1 are hot, then expert 0 and the one that greedy put beside it."""
    found = planned(steps(*[HOT_01] * 10, *[HOT_0_AND_4] * 10))
    contiguous, greedy = measured(found)["contiguous"], measured(found)["greedy"]
    assert contiguous["first"]["step_slowdown"] > 1.1
    assert contiguous["last"]["step_slowdown"] == pytest.approx(1.0, abs=0.1)
    routed = 2 * 512 * 2
    for name in ("stale_second_half", "stale_last"):
        assert greedy[name]["busiest_rank_tokens"] == pytest.approx(routed * 12 / 16)
    assert greedy["last"]["busiest_rank_tokens"] == pytest.approx(routed * 8 / 16)
    assert contiguous["stale_last"] == contiguous["last"]
    # In the first half it would have been right.
    right = planned(steps(*[HOT_01] * 20))
    assert measured(right)["greedy"]["stale_last"] == measured(right)["greedy"]["last"]


def test_copies_of_one_hot_expert(planned):
    found = planned(steps(*[HOT_0_ALONE] * 20), None, "--redundant-experts=2")
    rows = measured(found)
    assert rows["eplb"]["redundant_experts"] == 2
    routed = 2 * 512 * 2
    # 9 of 16 parts in one expert: alone on a device with 3 others, 12; its three copies have 3
    # each, and of five slots a device gets 2 copies and 3 others, or 1 and 4.
    assert rows["greedy"]["last"]["busiest_rank_tokens"] == pytest.approx(routed * 12 / 16)
    assert rows["eplb"]["last"]["busiest_rank_tokens"] == pytest.approx(routed * 9 / 16)
    assert rows["eplb"]["last"]["step_slowdown"] < rows["greedy"]["last"]["step_slowdown"]
    # Each rank holds one copy in each of three layers: BF16 weights and gradients.
    more = rows["eplb"]["last"]["memory_bytes"] - rows["greedy"]["last"]["memory_bytes"]
    assert more < 3 * 3 * 64 * 32 * 4
    (_greedy, eplb) = found["verdict"]["placements"]
    assert eplb["by"] == "eplb +2" and eplb["share"] > 0


def test_capacity_of_a_run(planned):
    """The second half has nine even micro-batches, and one with 12 of 16 parts on a rank."""
    loads = steps(*[EVEN] * 19, HOT_01)
    found = planned(steps(*[EVEN] * 20), loads, "--drop-share=0.02")
    never, some = found["degrees"][0]["capacity"]
    assert never["capacity_factor"] == pytest.approx(1.5)
    assert never["non_blocking_capacity_factor"] == pytest.approx(1.5 * 2 / (2 * 2))
    # Of 10 x 2 balanced loads 0.4 may be dropped: the room is 0.4 below the one peak of 1.5.
    assert (some["drop_share"], some["capacity_factor"]) == (0.02, pytest.approx(1.1))
    balance = found["degrees"][0]["balance"]
    assert balance["memory_bytes"] < some["memory_bytes"] < never["memory_bytes"]
    # In DistMoE's words: one micro-batch of ten overruns every factor below 1.5.
    loads = steps(*[EVEN] * 19, HOT_01)
    for share, factor in ((0.05, 1.5), (0.1, 1.0)):
        found = planned(steps(*[EVEN] * 20), loads, f"--drop-share={share}")
        none, row = found["degrees"][0]["overruns"]
        assert none["scratch_capacity_factor"] == pytest.approx(1.5)
        assert (row["overrun_share"], row["micro_batches"]) == (share, 10)
        assert row["scratch_capacity_factor"] == pytest.approx(factor)
        assert row["activation_slot_capacity_factor"] == pytest.approx(factor)
        assert row["worst_capacity_factor"] == pytest.approx(2 * 2 / 2)


def test_log_normal_loads(ranks, tmp_path):
    arguments = ["--hardware", device_file(tmp_path), "--ranks=2", "--ep=2"]
    imbalance = "--imbalance=1.0,lognormal:0,lognormal:1,overload:1.4@2"
    page = tmp_path / "page.html"
    found = plan(ranks, [*arguments, imbalance, "-o", str(page)], JOB)
    rows = found["degrees"][0]["lognormal"]
    none, much, overload = (row["outcome"] for row in rows)
    names = [row["name"] for row in rows]
    assert names == ["σ 0.00", "σ 1.00", "1.40@2"]
    assert all(f"<td>{name}</td>" in page.read_text() for name in names)
    assert none["step_slowdown"] < overload["step_slowdown"]
    assert none["step_seconds"] == pytest.approx(found["degrees"][0]["balance"]["step_seconds"])
    assert much["step_slowdown"] > 1.05
    # The first sigma is the load of the verdict, where no run is given.
    assert found["verdict"]["load"] == "log-normal loads of sigma 0"
    assert found["verdict"]["balancing"]["share"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop-share=0.1"], "--drop-share needs loads of single micro-batches"),
        (["--redundant-experts=some"], "--redundant-experts some must be whole numbers"),
    ],
)
def test_what_a_run_cannot_answer_is_one_line(ranks, tmp_path, arguments, message):
    write_run(tmp_path, steps(EVEN))
    command = ["plan", "--hardware=h100", "--ranks=2", "--ep=2", f"--from-run={tmp_path}"]
    status, out, err = ranks.run(1, planning.command, [*command, *arguments, "--", *TINY])[0]
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_the_verdict_comes_first(ranks, tmp_path):
    write_run(tmp_path, steps(HOT_01), steps(HOT_01))
    command = ["plan", "--hardware", device_file(tmp_path), "--ranks=2", f"--from-run={tmp_path}"]
    status, out, err = ranks.run(
        1,
        planning.command,
        [*command, "--redundant-experts=2", "-o", str(tmp_path / "p.html"), "--", *TINY],
    )[0]
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert (
        lines[0].startswith("Verdict: EP 1, the run's own, is the fastest")
        and "GPU-hours for" in lines[0]
    )
    assert lines[1].startswith("Balancing: at EP ")
    assert lines[2].startswith("Placing: greedy would save ") and "what-if" in lines[2]
    assert lines[3].startswith("How sure: the load is that of 1 recorded micro-batch, too few to")
    assert "moe_expert_rank_capacity_factor" in out
    page = (tmp_path / "p.html").read_text()
    assert page.index("<strong>Verdict: </strong>EP 1") < page.index("Step time against imbalance")
    assert "<h2>Capacity</h2>" in page and "<h2>How long a placement lasts</h2>" in page


def test_the_plan_of_an_imported_run_is_that_of_a_trained_one(ranks, tmp_path):
    """The imported run has the loads of the trained one, and no groups of experts."""
    counts_SME = steps(*[EVEN] * 10, *[HOT_01] * 10)
    write_run(tmp_path, counts_SME, expert_groups=None, world_size=2, dp_shard=2, ep=2)
    rows = [
        ",".join(map(str, (step, layer, *counts_E)))
        for step, counts_ME in enumerate(counts_SME, start=1)
        for layer, counts_E in enumerate(counts_ME, start=1)
    ]
    file, run = tmp_path / "loads.csv", tmp_path / "imported"
    file.write_text("\n".join(["step,layer,0,1,2,3,4,5,6,7", *rows, ""]))
    cli.main(["import", str(file), "-o", str(run), "--top-k=2", "--ep=2"])
    words = ["--hardware", device_file(tmp_path), "--ranks=2", "--ep=2", "--from-run"]
    trained, found = (plan(ranks, [*words, str(one)], JOB) for one in (tmp_path, run))
    assert found["degrees"] == trained["degrees"] and found["verdict"] == trained["verdict"]
