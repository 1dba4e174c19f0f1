"""Tests of ``titan-moe-lb import``: every kind and form of file gives the run of its counts."""

from __future__ import annotations

import csv
import errno
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import titan_moe_lb as lb
from titan_moe_lb import cli
from titan_moe_lb.commands.diagnose.checks import diagnosis
from titan_moe_lb.commands.report.page import render
from titan_moe_lb.traces.step_file import StepFile

S, M, E, K, TOKENS = 30, 3, 16, 4, 1024
STEPS, LAYERS = 10 * np.arange(1, S + 1), (1, 2, 5)


@pytest.fixture(scope="module")
def counts_SME() -> np.ndarray:
    generator = np.random.default_rng(0)
    share_ME = generator.dirichlet(np.full(E, 2.0), M)
    return np.array([[generator.multinomial(K * TOKENS, p_E) for p_E in share_ME]] * S)


@pytest.fixture(scope="module")
def native(counts_SME, tmp_path_factory):
    """Run with the same counts, written in Python."""
    folder = tmp_path_factory.mktemp("native") / "run"
    with lb.LoadTrace(folder, top_k=K, ep=4, model="loads") as trace:
        for step, counts_ME in zip(STEPS, counts_SME, strict=True):
            trace.write(int(step), dict(zip(LAYERS, counts_ME, strict=True)))
    return lb.read_trace(folder)


def long_rows(counts_SME):
    for step, counts_ME in zip(STEPS, counts_SME, strict=True):
        for layer, counts_E in zip(LAYERS, counts_ME, strict=True):
            for expert, tokens in enumerate(counts_E):
                yield int(step), layer, expert, int(tokens)


def wide_rows(counts_SME):
    for step, counts_ME in zip(STEPS, counts_SME, strict=True):
        for layer, counts_E in zip(LAYERS, counts_ME, strict=True):
            yield int(step), layer, *counts_E.tolist()


def write_long_csv(counts_SME, folder):
    with open(folder / "loads.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Iteration", "Layer ID", "expert_idx", "num_tokens"])
        rows.writerows(row for row in long_rows(counts_SME) if row[3])  # zeros are left out


def write_wide_tsv(counts_SME, folder):
    with open(folder / "loads.tsv", "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["step", "layer", *(f"expert_{number}" for number in range(E))])
        rows.writerows(wide_rows(counts_SME))


def write_json_lines(counts_SME, folder):
    rows = ({"step": s, "layer": m, "counts": list(c)} for s, m, *c in wide_rows(counts_SME))
    (folder / "loads.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_parquet(counts_SME, folder):
    columns = zip(*long_rows(counts_SME), strict=True)
    names = ["step", "layer", "expert", "count"]
    table = pa.table(dict(zip(names, map(list, columns), strict=True)))
    parquet.write_table(table, folder / "loads.parquet", row_group_size=77)


def write_numpy(counts_SME, folder):
    np.save(folder / "loads.npy", counts_SME.astype(np.float32))


def refusal(capsys, *arguments) -> str:
    """Return the message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(["import", *map(str, arguments)])
    assert end.value.code == 2
    return capsys.readouterr().err


KINDS = [write_long_csv, write_wide_tsv, write_json_lines, write_parquet, write_numpy]


@pytest.mark.parametrize("write", KINDS)
def test_report_and_diagnosis_are_those_of_the_counts(counts_SME, native, write, tmp_path):
    write(counts_SME, tmp_path)
    (file,) = tmp_path.iterdir()
    run = tmp_path / "run"
    cli.main(["import", str(file), "-o", str(run), "--top-k", str(K), "--ep", "4"])
    found = lb.read_trace(run)
    np.testing.assert_array_equal(found.counts_SME, counts_SME)
    if write is write_numpy:  # an array has no numbers of steps and layers
        assert found.steps.tolist() == [*range(1, S + 1)] and found.layers == (0, 1, 2)
        return
    assert found.steps.tolist() == STEPS.tolist() and found.layers == LAYERS
    assert diagnosis(found) == diagnosis(native)
    assert replace(found.info, started=native.info.started) == native.info
    page = render([found]).replace(found.info.started, native.info.started)
    assert page == render([native])


def test_files_of_one_run_follow_each_other(counts_SME, tmp_path):
    for name, part in {"a": counts_SME[:10], "b": counts_SME[10:]}.items():
        rows = [
            (s + 1 + 10 * (name == "b"), m, *c)
            for s, c_M in enumerate(part)
            for m, c in enumerate(c_M)
        ]
        text = "\n".join(",".join(map(str, row)) for row in rows)
        head = ",".join(["step", "layer", *map(str, range(E))])
        (tmp_path / f"{name}.csv").write_text(f"{head}\n{text}\n")
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    cli.main(["import", *files, "-o", str(tmp_path / "run"), "--top-k", "4"])
    np.testing.assert_array_equal(lb.read_trace(tmp_path / "run").counts_SME, counts_SME)


def test_layers_without_tokens_are_dense_and_numbers_of_a_step_are_kept(tmp_path, capsys):
    text = "step,layer,loss,e0,e1,e2\n1,0,2.5,0,0,0\n1,1,2.5,2,2,\n1,2,2.5,1,2,1\n"
    (tmp_path / "loads.csv").write_text(text)
    cli.main(["import", str(tmp_path / "loads.csv"), "-o", str(tmp_path / "run"), "--top-k", "2"])
    found = lb.read_trace(tmp_path / "run")
    assert found.layers == (1, 2) and found.info.num_experts_M.tolist() == [2, 3]
    assert found.over_steps("loss").tolist() == [2.5]
    guessed = capsys.readouterr().out
    assert "--ep 1" in guessed and "--micro-batches 1" in guessed and "dense: 0" in guessed


LONG = "step,layer,expert,tokens\n1,0,0,2\n1,0,1,2\n"


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        (LONG, ["--top-k=0"], "--top-k"),
        (LONG, ["--top-k=3"], "top_k"),
        (LONG, ["--top-k=2", "--ep=0"], "--ep"),
        (LONG, ["--top-k=2", "--num-experts=1"], "--num-experts"),
        (LONG, [], "--top-k"),
        (LONG + "2,0,2,4\n", ["--top-k=2"], "--num-experts"),
        (LONG + "1,0,1,2\n", ["--top-k=2"], "expert 1"),
        (LONG + "3,0,0,4\n2,0,0,4\n", ["--top-k=2"], "step 2"),
        (LONG + "2,1,0,4\n", ["--top-k=2"], "layer"),
        (LONG + "2,0,0,-4\n2,0,1,8\n", ["--top-k=2"], "layer 0"),
        (LONG + "2,0,0,\n", ["--top-k=2"], "layer 0"),
        (LONG + "2,x,0,4\n", ["--top-k=2"], "loads.csv"),
        (LONG + "2,-1,0,4\n", ["--top-k=2"], "layer"),
        ("step,layer,expert,tokens\n1,0,0,1.5\n1,0,1,2.5\n", ["--top-k=2"], "layer 0"),
        ("step,layer,expert,tokens,gpu\n1,0,0,4,1\n", ["--top-k=2"], "gpu"),
        ("step,layer,tokens\n1,0,4\n", ["--top-k=2"], "expert"),
        ("step,expert,tokens\n1,0,4\n", ["--top-k=2"], "layer"),
        ("step,layer,loss\n1,0,4\n", ["--top-k=2"], "tokens"),
        ("step,layer,e0,e1\n1,0,2,2\n1,0,2,2\n", ["--top-k=2"], "layer 0"),
        ("step,layer,e0,e1\n1,0,2,2\n1,1,0,0\n2,0,2,2\n2,1,2,2\n", ["--top-k=2"], "layer 1"),
        ("step,layer,e0,e1\n", ["--top-k=2"], "loads.csv"),
        (LONG + "2,0,0,0\n2,0,1,0\n", ["--top-k=2"], "step 2"),
        ("step,layer,expert,tokens\n1,0,1,2\n1,0,2,2\n", ["--top-k=2"], "--num-experts"),
        ("step,layer,expert,tokens\n1,0,1000000000000,4\n", ["--top-k=2"], "expert"),
        ("step,layer,rank_0,rank_1\n1,0,2,2\n", ["--top-k=2"], "tokens"),
        ("step,layer,expert,e0\n1,0,2,2\n", ["--top-k=2"], "tokens"),
        ("step,step,layer,e0,e1\n1,1,0,2,2\n", ["--top-k=2"], "twice"),
        ("step,layer,e0,e1\n1,0,2,2\n1,1,4,4\n", ["--top-k=2"], "layer 1"),
        ("step,layer,e0,e1\n1,0,2,2\n", ["--top-k=2", "--num-experts=4"], "--num-experts"),
        ("step,layer,e0,e1\n1,0,2,2\n", ["--top-k=2", "--ep=4"], "--ep"),
        ("step,layer,e0,e1\n1,0,3,3\n", ["--top-k=3"], "top_k"),
        ("step,layer,loss,e0,e1\n1,0,1.5,2,2\n1,1,2.5,2,2\n", ["--top-k=2"], "loss"),
        ("", ["--top-k=2"], "loads.csv"),
    ],
)
def test_wrong_input_is_refused_and_leaves_nothing(tmp_path, capsys, text, flags, named):
    (tmp_path / "loads.csv").write_text(text)
    assert named in refusal(capsys, tmp_path / "loads.csv", "-o", tmp_path / "run", *flags)
    assert not (tmp_path / "run/moe_load.arrow").exists()


@pytest.mark.parametrize(
    "name", ["none.csv", "loads.txt", "events.out.tfevents.1.host", "bad.parquet", "bad.npy"]
)
def test_wrong_files_are_refused(tmp_path, capsys, name):
    if name != "none.csv":
        (tmp_path / name).write_bytes(b"\x00 no loads")
    assert name in refusal(capsys, tmp_path / name, "-o", tmp_path / "run", "--top-k=2")


def test_a_run_is_not_overwritten(native, capsys, tmp_path):
    np.save(tmp_path / "loads.npy", native.counts_SME)
    run = native.path.parent
    assert str(run) in refusal(capsys, tmp_path / "loads.npy", "-o", run, f"--top-k={K}")
    assert lb.read_trace(run).steps.tolist() == STEPS.tolist()


def test_a_full_disk_leaves_nothing(native, capsys, tmp_path, monkeypatch):
    def full(self, message):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(StepFile, "_put", full)
    np.save(tmp_path / "loads.npy", native.counts_SME)
    run = tmp_path / "run"
    assert "space" in refusal(capsys, tmp_path / "loads.npy", "-o", run, f"--top-k={K}")
    assert not (run / "moe_load.arrow").exists()


def test_json_lines_may_have_a_loss_in_late_lines_only(tmp_path):
    """The first line with a loss is beyond the block of 1 MiB from which pyarrow takes the columns."""
    file, steps = tmp_path / "loads.jsonl", 2_000
    rows = ({"step": step, "layer": 0, "tokens": [2, 4] * 100} for step in range(1, steps))
    last = {"step": steps, "layer": 0, "tokens": [4, 2] * 100, "loss": 2}
    file.write_text("\n".join(map(json.dumps, [*rows, last])))
    assert file.stat().st_size > 2**20
    cli.main(["import", str(file), "-o", str(tmp_path / "run"), "--top-k", "2"])
    loss_S = lb.read_trace(tmp_path / "run").over_steps("loss")
    assert np.isnan(loss_S[:-1]).all() and loss_S[-1] == 2 and len(loss_S) == steps
