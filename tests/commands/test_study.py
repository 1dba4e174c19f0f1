"""Tests of studies: cells that run, cells that do not run again, and the numbers."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support import browser
from tests.support.synthetic_trace import run_info
from titan_moe_lb import cli
from titan_moe_lb.commands.study import command, measure, results, run
from titan_moe_lb.commands.study.answer import in_words
from titan_moe_lb.commands.study.cell import Cell, CellFolder, Record
from titan_moe_lb.commands.study.charts import charts
from titan_moe_lb.commands.study.design import flag, read_study
from titan_moe_lb.commands.study.verdict import verdict
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.domain_trace import DomainLoad, DomainTraceWriter, read_domain_trace
from titan_moe_lb.traces.trace import read_trace

AXES = """
[[axis]]
key = "seconds"
values = [0, 0.01]

[[axis]]
key = "debug.seed"
values = [1, 2]
"""


def use_quick_cells(monkeypatch) -> None:
    """Run processes of tests.support.study_cells as cells, with flags that no job has."""

    def of_cell(folder: CellFolder) -> list[str]:
        flags = [*folder.cell.flags, f"--dump_folder={folder.path}"]
        return [sys.executable, "-m", "tests.support.study_cells", *flags]

    monkeypatch.setattr(run, "command", of_cell)
    monkeypatch.setattr(command, "check_jobs", lambda cells: None)


@pytest.fixture
def quick(monkeypatch):
    use_quick_cells(monkeypatch)


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """Output of a study of two settings and two seeds."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_quick_cells(monkeypatch)
        command.run_study(write(folder, AXES), output=folder / "out")
    return folder / "out"


def write(folder: Path, text: str, name: str = "study") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def starts(output: Path) -> list[str]:
    """Names of the started cells, in order."""
    return (output / "cells" / "starts").read_text().split()


def test_runs_every_combination_once(tmp_path, quick, capsys):
    path, output = write(tmp_path, AXES), tmp_path / "out"
    command.run_study(path, output=output)
    assert starts(output) == ["0_1", "0_2", "0.01_1", "0.01_2"]
    first = (output / "study.json").read_text()
    said = capsys.readouterr().out
    assert "4/4 0.01_2" in said and str(output / "study.html") in said
    command.run_study(path, output=output)
    assert len(starts(output)) == 4, "what has ended is not run again"
    assert (output / "study.json").read_text() == first
    # Another value: its cells alone are run.
    command.run_study(write(tmp_path, AXES.replace("0.01]", "0.01, 0.02]")), output=output)
    assert starts(output)[4:] == ["0.02_1", "0.02_2"]
    settings = json.loads((output / "study.json").read_text())["settings"]
    assert [one["setting"] for one in settings] == ["0", "0.01", "0.02"]
    assert all(one["cells"] == 2 for one in settings)


def test_the_numbers_are_those_of_the_runs(studied):
    content = json.loads((studied / "study.json").read_text())
    for cell in content["cells"]:
        name = "_".join(cell["labels"].values())
        trace = read_trace(studied / "cells" / name)
        counts = trace.counts_SME[-10:].astype(float)
        expected = (counts.max(-1) / counts.mean(-1) - 1).mean()
        assert cell["numbers"]["max_violation"] == pytest.approx(expected, rel=1e-12)
        assert cell["numbers"]["training_loss"] == pytest.approx(
            trace.step_columns["loss"][-4:].mean(), rel=1e-12
        )
    for setting in content["settings"]:
        of_cells = [
            cell["numbers"]["validation_loss"]
            for cell in content["cells"]
            if cell["labels"]["seconds"] == setting["setting"]
        ]
        spread = setting["numbers"]["validation_loss"]
        assert spread["mean"] == pytest.approx(sum(of_cells) / 2)
        assert (spread["low"], spread["high"]) == (min(of_cells), max(of_cells))


FAILING = """
[[axis]]
name = "way"
[axis.settings.good]
seconds = 0
[axis.settings.bad]
fail = true
[axis.settings.lost]
nan = true
"""


def test_a_cell_that_fails_is_shown_and_stops_nothing(tmp_path, quick, capsys):
    path, output = write(tmp_path, FAILING), tmp_path / "out"
    command.run_study(path, output=output)
    said = capsys.readouterr().out
    assert "2/3 bad: failed: it was told to fail" in said
    assert "3/3 lost: its loss is not a number" in said
    assert re.search(r" bad .* 1 failed ", said) and re.search(r" lost .* 1 diverged ", said)
    page = (output / "study.html").read_text()
    assert re.search(r">bad</th><td>it was told to fail<", page)
    command.run_study(path, output=output)
    assert len(starts(output)) == 3
    command.run_study(path, output=output, retry_failed=True)
    assert starts(output)[3:] == ["bad", "lost"]


KILLED = """
import signal, sys
from pathlib import Path
from titan_moe_lb.commands.study import command, run
run.command = lambda folder: [
    sys.executable, "-m", "tests.support.study_cells", *folder.cell.flags, f"--dump_folder={folder.path}"
]
command.check_jobs = lambda cells: None
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
command.run_study(Path(sys.argv[1]), output=Path(sys.argv[2]))
"""


def test_a_study_that_was_killed_goes_on_where_it_was(tmp_path, quick):
    """After SIGKILL in the second cell, ended cells are kept and its orphan is stopped."""
    slow = AXES.replace("[0, 0.01]", "[2.5]")
    path, output, undisturbed = write(tmp_path, slow), tmp_path / "out", tmp_path / "undisturbed"
    arguments = [sys.executable, "-c", KILLED, str(path), str(output)]
    study = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (output / "cells" / "starts").exists() or len(starts(output)) < 2:
        assert study.poll() is None and time.monotonic() < deadline, study.stderr.read()
        time.sleep(0.05)
    study.send_signal(signal.SIGKILL)
    study.wait()
    command.run_study(path, output=output)
    assert starts(output) == ["2.5_1", "2.5_2", "2.5_2"], "the unfinished cell alone is repeated"
    command.run_study(path, output=undisturbed)
    found, expected = (
        json.loads((folder / "study.json").read_text())["settings"]
        for folder in (output, undisturbed)
    )
    assert found == expected


def test_ctrl_c_stops_the_cells(tmp_path):
    path = write(tmp_path, AXES.replace("[0, 0.01]", "[30]"))
    output = tmp_path / "out"
    arguments = [sys.executable, "-c", KILLED, str(path), str(output)]
    study = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (output / "cells" / "starts").exists():
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    study.send_signal(signal.SIGINT)
    begun = time.monotonic()
    study.wait(20)
    assert time.monotonic() - begun < 10
    assert not list((output / "cells").glob("*/cell.json"))
    flag_of_cells = f"--dump_folder={output}/cells/".encode()
    left = [
        pid for pid in os.listdir("/proc") if pid.isdigit() and flag_of_cells in _command_line(pid)
    ]
    assert not left


def _command_line(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_cell_of_another_user_is_one_line(tmp_path, monkeypatch):
    """Root may end any process, so the test makes the system's refusal itself."""

    def refuse(process):
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "kill", refuse)
    asleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    cell = subprocess.Popen([*asleep, f"--dump_folder={tmp_path}/cells/0"])
    try:
        run.stop_leftovers(tmp_path / "elsewhere")
        with pytest.raises(JobError, match=f"process {cell.pid}.*--output"):
            run.stop_leftovers(tmp_path / "cells")
    finally:
        cell.terminate()


SEARCH = """
[study]
sampler = "tpe"
trials = 6

[[axis]]
key = "seconds"
low = 1e-4
high = 1e-2
log = true
"""


def test_a_sampler_chooses_its_cells_and_remembers_them(tmp_path, quick):
    path, output = write(tmp_path, SEARCH), tmp_path / "out"
    command.run_study(path, output=output)
    chosen = starts(output)
    assert len(chosen) == 6
    values = [float(name) for name in chosen]
    assert all(1e-4 <= value <= 1e-2 for value in values)
    command.run_study(write(tmp_path, SEARCH.replace("trials = 6", "trials = 8")), output=output)
    assert len(starts(output)) == 8, "the first six are told to the sampler, not run again"


BAD = {
    "": "nothing varies: add an axis",
    "[studi]\nx = 1": "'studi' is no part of a study",
    "[study]\nprocess = 2" + AXES: "[study] has no key 'process'; did you mean 'processes'",
    '[[axis]]\nkey = "a"': "axis 'a' needs either key and values",
    "[[axis]]\nvalues = [1]": "axis '' needs either key and values",
    '[[axis]]\nkey = "a"\nvalues = [1, 1]': "axis 'a' has one value twice",
    '[[axis]]\nkey = "a"\nlow = 1.0\nhigh = 2.0': "is a range, of which a grid has no points",
    '[study]\nsampler = "tpe"\ntrials = 1\n[[axis]]\nkey = "a"\nlow = 2.0\nhigh = 1.0': "a finite high",
    '[study]\nsampler = "tpe"\n[[axis]]\nkey = "a"\nlow = 0.5\nhigh = 1.0': "trials is 0; at least 1",
    '[[axis]]\nkey = "a"\nvalues = [1]\n' * 2: "two axes are called 'a'",
    '[[axis]]\nname = "m"\nsettings = {"x 1" = {a = 1}, "x_1" = {a = 2}}': "two cells are called 'x_1'",
    '[study]\nsampler = "tpe"\ntrials = 1\n[[axis]]\nkey = "a"\nlow = 1.0\nhigh = nan': "a finite high",
    '[study]\nsampler = "tpe"\ntrials = 1\n[[axis]]\nkey = "a"\nlow = -1e308\nhigh = 1e308': "a finite",
    '[[axis]]\nkey = "a"\nvalues = [{b = 2026-01-02}]': "2026-01-02 is a date or a time",
    '[[axis]]\nkey = "a"\nvalues = ["\\u0000"]': "no command line can have the character 0",
    f'[[axis]]\nkey = "a"\nvalues = ["{"n" * 300}"]': "has more than 200 letters",
    "".join(
        f'[[axis]]\nkey = "k{i}"\nvalues = {list(range(50))}\n' for i in range(9)
    ): "more than 10,000",
    "[plan]\nhardware = 'h100'\nep = 2\nranks = 0" + AXES: "[plan] ranks is 0; at least 1",
    '[[axis]]\nkey = "ranks"\nvalues = ["two"]': "ranks is 'two'; it must be an integer of at least 1",
    "[plan]\nhardware = 'h100'\nep = 2" + AXES: "[plan] needs 'ranks'",
}


@pytest.mark.parametrize("text", BAD)
def test_a_file_that_is_no_study_is_refused_in_a_line(tmp_path, text):
    with pytest.raises(JobError) as error:
        read_study(write(tmp_path, text))
    assert BAD[text] in str(error.value)
    assert "\n" not in str(error.value) and "study.toml" in str(error.value)


def test_the_folder_of_a_cell_is_its_own(tmp_path):
    """Values that a path would read as other folders, found by fuzzing."""
    names = ["..", ".", "../..", "/", ".hidden", "a/../.."]
    cells = [Cell(labels={"m": name}, seed=None, flags=[], ranks=1) for name in names]
    for cell in cells:
        path = CellFolder(tmp_path, cell).path
        assert path.parent == tmp_path / "cells" and not path.name.startswith(".")


def test_bad_input_of_the_command(tmp_path, quick, capsys):
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["study", *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    path, output = write(tmp_path, AXES), tmp_path / "out"
    assert "there is no such file" in said(str(tmp_path / "other.toml"))
    assert "--processes 0 must be at least 1" in said(str(path), "--processes", "0")
    command.run_study(path, output=output)
    other = write(tmp_path, f'[study]\njob = ["--x=1"]\n{AXES}', "other")
    line = said(str(other), "-o", str(output))
    assert "0_1 contains a cell of another study" in line and "--x=1" in line and "--output" in line
    (output / "cells" / "0_1" / "cell.json").write_text("{")
    assert "cell.json is damaged: delete" in said(str(path), "-o", str(output))
    (output / "study.html").write_text("mine")
    assert "study.html exists and is not a page of titan_moe_lb" in said(
        str(path), "-o", str(output)
    )


@pytest.mark.parametrize(
    ("job", "key", "named"),
    [
        ("", "training.step", "--training.step"),
        ("", "optimizer.lr", "--optimizer.lr"),
        ("--help", "training.steps", "--help"),
    ],
)
def test_a_job_that_does_not_hold_is_found_before_anything_starts(
    tmp_path, capsys, job, key, named
):
    flags = ["--config=deepseek_v3_tiny", *filter(None, [job])]
    text = f"[study]\njob = {flags}\n[[axis]]\nkey = {key!r}\nvalues = [1]"
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", str(write(tmp_path, text)), "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and named in said and "cell 1: " in said
    assert not (tmp_path / "out" / "cells").exists()


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
from titan_moe_lb import cli
"""


def test_a_full_disk_is_one_line(tmp_path, quick):
    """No file may exceed 6,000 bytes: records of cells can be written, the page cannot."""
    path, output = write(tmp_path, AXES), tmp_path / "out"
    arguments = [sys.executable, "-c", f"{FULL}{KILLED}", str(path), str(output)]
    study = subprocess.run(arguments, capture_output=True, text=True)
    assert "cannot be written (File too large)" in study.stderr.splitlines()[-1]
    assert len(list((output / "cells").glob("*/cell.json"))) == 4
    begun = len(starts(output))
    command.run_study(path, output=output, retry_failed=True)
    assert len(starts(output)) <= 2 * begun and (output / "study.html").exists()


def test_flags_of_keys():
    assert flag("model.aux_losses", [{"type": "z_loss", "weight": 0.1}]) == [
        '--model.aux_losses=[{type = "z_loss", weight = 0.1}]'
    ]
    assert flag("model.expert_bias", "none") == ["--model.expert_bias=none"]
    assert flag("checkpoint.enable", True) == ["--checkpoint.enable"]
    assert flag("checkpoint.enable", False) == ["--checkpoint.no-enable"]
    assert flag("metrics.record_routing_steps", [1, 2]) == [
        "--metrics.record_routing_steps",
        "1",
        "2",
    ]
    assert flag("job_config", "a.toml") == ["--job-config=a.toml"]


# Numbers by hand.


def test_until_balanced_by_hand(tmp_path):
    steps = np.array([10, 20, 30, 40])
    for violation, expected in (
        ([0.9, 0.4, 0.6, 0.4], 40),
        ([0.4, 0.4, 0.4, 0.4], 10),
        ([0.9, 0.4, 0.4, 0.4], 20),
        ([0.4, 0.4, 0.4, 0.5], math.inf),
    ):
        assert measure.until_balanced(steps, np.array(violation), 0.5) == expected


def test_domains_by_hand(tmp_path):
    """Both domains use the same two experts in the first layer, and two of their own in the second.

    So the distances are 0 and 1, and 2 experts are effective.
    """
    info = run_info(num_layers=2, num_experts=4)
    writer = DomainTraceWriter(tmp_path, info)
    a, b = [[5, 5, 0, 0], [5, 5, 0, 0]], [[5, 5, 0, 0], [0, 0, 5, 5]]
    for step in (1, 2):
        writer.write(
            step,
            {
                "a": DomainLoad(loss=step + 0.5, counts_ME=np.array(a)),
                "b": DomainLoad(loss=step + 1.5, counts_ME=np.array(b)),
            },
        )
    writer.close()
    found = read_domain_trace(tmp_path)
    assert found is not None and found.domains == ("a", "b")
    np.testing.assert_array_equal(found.loss_VD, [[1.5, 2.5], [2.5, 3.5]])
    np.testing.assert_array_equal(found.counts_VDME[1], [a, b])
    assert measure.of_domains(found) == pytest.approx(
        {
            "specialisation": 0.5,
            "loss_of_a": 2.5,
            "loss_of_b": 3.5,
            "effective_experts_of_a": 2.0,
            "effective_experts_of_b": 2.0,
        }
    )


def group_of(**settings: list[tuple[float, float]]) -> results.Group:
    """Make settings from (validation loss, MaxVio) by seed."""

    def result(name: str, seed: int, loss: float, violation: float) -> results.Result:
        cell = Cell(labels={"method": name}, seed=seed, flags=[], ranks=1)
        record = Record(
            labels=cell.labels, seed=seed, flags=[], ranks=1, status="done", seconds=1, error=""
        )
        numbers = {
            "validation_loss": loss,
            "training_loss": loss,
            "max_violation": violation,
            "steps_until_balanced": 10.0,
            f"effective_experts_of_{name}": 2.0,  # each setting has a domain of its own
        }
        course = measure.Course(
            steps=np.array([1, 2]),
            violation_S=np.array([1.0, violation]),
            loss_S=np.array([7.0, loss]),
        )
        return results.Result(
            folder=CellFolder(Path("/study"), cell), record=record, numbers=numbers, course=course
        )

    return results.Group(
        name="",
        settings=tuple(
            results.Setting(
                name=name,
                results=tuple(result(name, s, *numbers) for s, numbers in enumerate(seeds)),
            )
            for name, seeds in settings.items()
        ),
    )


def test_front_and_paragraph_by_hand():
    """Setting b has the lowest loss and d the most even load; b beats c in both; the seeds of a
    overlap with b."""
    group = group_of(
        a=[(5.0, 0.4), (5.2, 0.4)],
        b=[(5.0, 0.5), (5.1, 0.5)],
        c=[(5.4, 0.6), (5.5, 0.6)],
        d=[(5.3, 0.1), (5.4, 0.1)],
    )
    assert [setting.name for setting in group.front("max_violation")] == ["d", "a", "b"]
    said = verdict(group)
    assert "Lowest loss on held-out text: b (5.05, 5 to 5.1 over 2 seeds)." in said
    assert "Most even load: d (MaxVio 0.1," in said
    assert "a and it do not differ clearly" in said
    assert "a loss higher by 0.3" in said
    one_seed = verdict(group_of(a=[(5.0, 0.4)], b=[(5.1, 0.5)]))
    assert "One seed each" in one_seed


def test_perfect_balance_is_drawn():
    """A logarithmic axis cannot show it."""
    for violation, scale in ((0.1, "log"), (0.0, None)):
        group = group_of(a=[(5.0, violation)], b=[(5.1, 2.0)])
        figure = charts([group], 0.5)[0].panels[0].figure
        assert figure.layout.xaxis.type == scale
        assert [curve.x[0] for curve in figure.data if curve.name == "a"] == [violation]


def test_settings_may_have_other_domains():
    """An axis over data sets: a setting has no bar for a domain that it lacks."""
    made = charts([group_of(a=[(5.0, 0.1)], b=[(5.1, 2.0)])], 0.5)
    (panel,) = next(chart for chart in made if chart.title == "Load by domain").panels
    bars = {bar.name: [y if y == y else None for y in bar.y] for bar in panel.figure.data}
    assert bars == {"a": [2.0, None], "b": [None, 2.0]}


def test_table_in_words():
    spread = results.Spread

    def words(*values: float) -> tuple[str, str]:
        cell = in_words(spread.of(values))
        return cell.text, cell.note

    assert words(1.0, 2.0) == ("1.5", "1 to 2")
    assert words(math.inf, math.inf) == ("never", "")
    assert words(20.0, math.inf) == ("20 or never", "")
    assert words() == ("–", "")
    assert words(5.31123, 0.12345) == ("2.717", "0.1235 to 5.311")


def test_the_tables_of_the_docs_are_of_its_file():
    """Every row of docs/evidence/study.md equals the means and ranges in its JSON."""
    docs = Path(__file__).parents[2] / "docs" / "evidence"
    rows = re.findall(
        r"^\| ([a-z][^|]+) \|(.+)\|$", (docs / "study.md").read_text().split("## Limits")[0], re.M
    )
    settings = json.loads((docs / "study.json").read_text())["settings"]
    rows = [(name, cells) for name, cells in rows if name != "method"]
    assert [name for name, _cells in rows] == [setting["setting"] for setting in settings]
    columns = ("validation_loss", "max_violation", "steps_until_balanced", "specialisation")
    for (_name, cells), setting in zip(rows, settings, strict=True):
        numbers = [setting["numbers"][name] for name in (*columns, "step_slowdown")]
        for cell, number, digits in zip(cells.split("|"), numbers, (3, 2, 0, 2, 2), strict=True):
            low, mean, high = (number[name] for name in ("low", "mean", "high"))
            if high is None:  # JSON has no infinity: never, in some seed
                assert cell.strip() == ("never" if low is None else f"{low:.0f} or never")
            else:
                expected = f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
                assert cell.strip() == expected


def test_the_page_draws_in_a_browser(studied):
    seen = browser.act(
        studied / "study.html",
        """
        await until(() => document.querySelectorAll(".plot .main-svg").length > 10);
        return {
          rows: [...document.querySelector("table").querySelectorAll("tbody tr")].map((r) => r.cells[1].textContent),
          charts: [...document.querySelectorAll("section h2")].map((h) => h.textContent),
          wide: document.documentElement.scrollWidth <= window.innerWidth,
        };
        """,
    )
    assert seen["rows"] == ["0", "0.01"]
    assert "Loss against imbalance" in seen["charts"] and "Load by domain" in seen["charts"]
    assert seen["wide"]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            "hardware = 'h101'\nep = 1\nranks = 1",
            "[plan]: --hardware 'h101' is unknown; did you mean",
        ),
        (
            "hardware = 'h100'\nep = 3\nranks = 2\njob = ['--config=deepseek_v3_tiny']",
            "[plan]: parallelism.expert_parallel_degree 3 must divide",
        ),
    ],
)
def test_a_prediction_that_cannot_be_made_is_found_before_anything_starts(
    tmp_path, capsys, plan, said
):
    text = f"[study]\njob = ['--config=deepseek_v3_tiny']\n[plan]\n{plan}\n"
    text += '[[axis]]\nkey = "debug.seed"\nvalues = [1]'
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", str(write(tmp_path, text)), "-o", str(tmp_path / "out")])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.slow
def test_real_cells(tmp_path, capsys):
    """Two jobs of two steps have held-out domains and a step time of a planned job."""
    text = """
    [study]
    job = ["--config=deepseek_v3_tiny", "--training.steps=2", "--training.seq_len=64",
           "--training.local_batch_size=4", "--dataloader.dataset=python_mixed",
           "--validator.enable", "--validator.freq=2", "--validator.steps=1"]
    processes = 2
    [plan]
    hardware = "h100"
    ep = 2
    ranks = 2
    [[axis]]
    key = "model.expert_bias"
    values = ["none", { type = "quantile" }]
    """
    output = tmp_path / "out"
    cli.main(["study", str(write(tmp_path, text)), "-o", str(output)])
    content = json.loads((output / "study.json").read_text())
    assert [cell["status"] for cell in content["cells"]] == ["done", "done"], capsys.readouterr()
    for cell in content["cells"]:
        numbers = cell["numbers"]
        assert 7 < numbers["validation_loss"] < 8
        assert numbers["step_slowdown"] >= 1 and numbers["step_seconds"] > 0
        assert set(numbers) >= {
            "loss_of_python_english_held_out",
            "effective_experts_of_python_code_held_out",
        }
        name = "_".join(cell["labels"].values())
        assert name in ("none", '{type = "quantile"}')
