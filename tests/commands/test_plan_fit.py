"""Tests of what fits, of the job on another number of ranks, and of a measured step."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import numpy as np
import pytest
import tomli

from benchmarks.published.jobs import planned
from benchmarks.published.step_times import RUNS
from tests.support import planning
from tests.support.planning import DEVICE, TINY, device_file, plan, write_run
from titan_moe_lb.commands.plan import published_error
from titan_moe_lb.commands.plan.published_error import Error

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    str(path.relative_to(ROOT)): found
    for path in sorted((ROOT / "configs").glob("*/*.toml"))
    if (found := re.search(r'description = ".* on ([\d,]+) (\w+)"', path.read_text()))
}
HOT_0 = np.array([5, 1, 1, 1, 1, 1, 1, 1]) * 64


def device_with(folder: Path, **figures: float) -> str:
    path = folder / "changed.toml"
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in (DEVICE | figures).items()))
    return str(path)


def test_every_job_of_published_size_names_its_device():
    sizes = {path for path in PUBLISHED if "local_batch_size" in (ROOT / path).read_text()}
    large = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "configs").glob("*/*.toml")
        if tomli.loads(path.read_text())["job"]["ranks"] > 8
    }
    assert sizes == large and len(large) == 7


@pytest.mark.parametrize("path", PUBLISHED)
def test_a_job_of_published_size_fits_its_device(ranks, path):
    """The job as it is fits, at balance and with an expert of twice the mean load."""
    number, device = PUBLISHED[path].groups()
    job = tomli.loads((ROOT / path).read_text())
    assert job["job"]["ranks"] == int(number.replace(",", ""))
    degree = job["parallelism"]["expert_parallel_degree"]
    words = ["plan", "--json", f"--hardware={device.lower()}", f"--job-config={ROOT / path}"]
    words += [f"--ep={degree}", "--imbalance=1.0,2.0"]
    status, out, err = ranks.run(1, planning.command, words)[0]
    assert status == 0, err
    rows = json.loads(out)["degrees"][0]["rows"]
    assert [row["outcome"]["fits"] for row in rows] == [True, True]


def test_a_job_that_does_not_fit_gets_the_nearest_that_do(ranks, tmp_path):
    """The flags of each alternative, pasted, plan the job that it promises."""
    base, job = ["--ranks=2", "--ep=2"], ["--training.local_batch_size=8"]
    roomy = plan(ranks, ["--hardware", device_file(tmp_path), *base], job)
    need = roomy["degrees"][0]["balance"]["memory_bytes"]
    small = ["--hardware", device_with(tmp_path, memory_bytes=0.7 * need / 0.9)]
    found = plan(ranks, [*small, *base], job)
    assert found["verdict"]["fits"] is False and found["verdict"]["ep_degree"] == 2
    assert found["verdict"]["balancing"]["share"] > 0
    names = {one["name"] for one in found["alternatives"]}
    assert "half of the local batch, accumulated" in names
    for one in found["alternatives"]:
        ours, _dashes, theirs = one["flags"].partition("-- ")
        words = [*small, *base, *shlex.split(ours)]
        again = plan(ranks, words, [*job, *shlex.split(theirs)])["verdict"]
        assert again["fits"]
        assert again["outcome"] == pytest.approx(one["verdict"]["outcome"], rel=1e-9)
    tokens = {
        one["tokens_per_step"] for one in found["alternatives"] if "--ranks" not in one["flags"]
    }
    assert tokens == {2 * 8 * 128}


def test_nothing_near_fits(ranks, tmp_path):
    small = ["--hardware", device_with(tmp_path, memory_bytes=1.2e7)]
    words = ["plan", *small, "--ranks=2", "--ep=2", "--", *TINY, "--training.local_batch_size=512"]
    status, out, err = ranks.run(1, planning.command, words)[0]
    assert (status, err) == (0, "")
    assert out.startswith("Verdict: no expert-parallel degree fits")
    assert "Nothing near fits" in out and "\nBalancing: " in out and "\nHow sure: " in out


def test_the_same_job_on_another_number_of_ranks(ranks, tmp_path):
    """Only ``--ranks`` is needed; a degree that the job's own flags fix is not changed."""
    job = tmp_path / "job.toml"
    job.write_text(
        '[job]\nmodule = "deepseek_v3"\nconfig = "deepseek_v3_tiny"\nranks = 2\n'
        "[parallelism]\ndata_parallel_shard_degree = 2\nexpert_parallel_degree = 2\n"
    )
    words = ["plan", "--json", f"--hardware={device_file(tmp_path)}", f"--job-config={job}"]

    def planned(*more: str) -> tuple[int, str, str]:
        return ranks.run(1, planning.command, [*words, *more])[0]

    status, out, _err = planned("--ranks=8", "--ep=8")
    assert status == 0 and json.loads(out)["job"]["ranks"] == 8
    status, _out, err = planned(
        "--ranks=8", "--ep=2", "--", "--parallelism.data_parallel_shard_degree=2"
    )
    assert status == 2 and "data_parallel_shard_degree 2" in err and "--ranks" in err


def test_mean_and_peak_of_an_overload(ranks, tmp_path):
    """An overload of 1.8 reads 1.8, at the degree at which it was measured."""
    words = [
        "--hardware",
        device_file(tmp_path),
        "--ranks=4",
        "--ep=4",
        "--imbalance=overload:1.8@4",
    ]
    (degree,) = plan(ranks, words, [])["degrees"]
    outcome = degree["lognormal"][0]["outcome"]
    assert outcome["mean_overload"] == pytest.approx(1.8, abs=1e-3)
    balanced = degree["tokens_per_rank"] * 2
    assert outcome["peak_overload"] == pytest.approx(outcome["busiest_rank_tokens"] / balanced)
    assert outcome["peak_overload"] > 2
    expert = outcome["hot_expert_tokens"] / (balanced * 4 / 8)
    assert outcome["peak_expert_load"] == pytest.approx(expert)
    (even,) = degree["rows"]
    assert even["outcome"]["mean_overload"] == pytest.approx(1)


def test_a_measured_step_in_three_parts(ranks, tmp_path):
    """The parts are differences of the planned steps, and add up."""
    write_run(tmp_path, np.broadcast_to(HOT_0, (20, 3, 8)), world_size=2, ep=2)
    words = ["--hardware", device_file(tmp_path), "--ranks=2", "--ep=1,2"]
    found = plan(ranks, [*words, "--from-run", str(tmp_path), "--measured-step=0.5"], [])
    degree, clock = found["degrees"][1], found["clock"]
    last, balance = degree["measured"][0]["last"]["step_seconds"], degree["balance"]["step_seconds"]
    assert clock["ep_degree"] == found["verdict_of_run"]["ep_degree"] == 2
    assert clock["balance_seconds"] == balance
    assert clock["imbalance_seconds"] == pytest.approx(last - balance)
    assert clock["unexplained_seconds"] == pytest.approx(0.5 - last)
    assert clock["unexplained_share"] == pytest.approx(1 - last / 0.5)
    least, most = clock["imbalance_seconds_range"]
    assert least < clock["imbalance_seconds"] < most


def rows_of(heading: str) -> list[list[str]]:
    text = (ROOT / "docs/evidence/published_runs.md").read_text()
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if "|" in line
    ]
    return rows[2:]


def error_of(percents: list[int]) -> Error:
    return Error(len(percents), round(statistics.median(percents)), min(percents), max(percents))


def test_errors_are_those_of_the_published_runs():
    slow = rows_of("Slow-downs at a measured imbalance")
    assert error_of([int(row[5].rstrip("%")) for row in slow]) == published_error.SLOW_DOWNS
    added = [(float(row[4]) - 1) / (float(row[3]) - 1) for row in slow if row[1] == "none"]
    assert (min(added), max(added)) == pytest.approx(published_error.ADDED_TIME, abs=5e-3)
    steps = rows_of("Step times")
    for device, error in published_error.STEP_TIMES.items():
        of_device = [int(row[5].rstrip("%")) for row in steps if device in row[1]]
        assert error_of(of_device) == error


@pytest.mark.parametrize("run", [run for run in RUNS if run.ranks == 8], ids=lambda run: run.name)
def test_the_unexplained_share_of_a_published_step_is_its_deviation(run):
    """measured = predicted + unexplained, so the share is minus the deviation of the table."""
    (row,) = [row for row in rows_of("Step times") if row[0] == run.name]
    clock = planned(
        run.job,
        hardware=run.hardware,
        ranks=run.ranks,
        ep=run.ep,
        dispatcher=run.dispatcher,
        measured_step=float(row[3].split()[0]),
    ).clock
    assert -100 * clock.unexplained_share == pytest.approx(float(row[5].rstrip("%")), abs=0.6)
