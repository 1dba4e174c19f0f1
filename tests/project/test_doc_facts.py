"""Tests of numbers and names in the documentation, against the code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from importlib import import_module

import pytest
import tomli
import torch

from model_registry.entry import defaults_of
from tests.balancing.test_parity import COMPILED, LAYOUTS
from tests.support.doc_examples import ROOT
from tests.support.telemetry_jobs import DeviceOperators, forward_and_backward, moe_layers
from tests.telemetry.test_telemetry import THREE_LOSSES, operators_of_a_router
from titan_moe_lb import toml_tables
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.commands.diagnose.checks import CHECKS
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.job.own_flags import OWN_FLAGS
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.metrics import Metric
from titan_moe_lb.telemetry.metrics.of_counts import OF_COUNTS
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor
from titan_moe_lb.traces.run_info import FORMAT_VERSION, RunInfo

REFERENCE = ROOT / "docs" / "reference"
LOSSES, RULES = ((REFERENCE / name).read_text() for name in ("losses.md", "bias_rules.md"))
REFUSED = "# refused: "
BLOCKS = re.findall(r"^```toml\n(.*?)^```$", LOSSES + RULES, re.MULTILINE | re.DOTALL)
ACCEPTED = [block for block in BLOCKS if not block.startswith(REFUSED)]
START = '[job]\nmodule = "deepseek_v3"\nflavor = "tiny"\n'


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """Read the first table below a heading: first cell of each row to the others."""
    table = re.search(r"(?:^\|.*\n)+", page.split(f"{heading}\n", 1)[1], re.MULTILINE)
    assert table is not None, heading
    lines = re.findall(r"^\| (.*) \|$", table[0], re.MULTILINE)[1:]
    cells = [re.split(r"(?<=[^\\]) \| ?|^\| ", line) for line in lines]
    return {row[0].strip("`"): [cell.strip() for cell in row[1:]] for row in cells}


def ours(family: type) -> dict[str, type]:
    kinds = family.kinds.items()
    return {name: kind for name, kind in kinds if kind.__module__.startswith("titan_moe_lb")}


# ---- Methods


def load(block: str, folder):
    path = folder / "my_job.toml"
    path.write_text(START + block)
    return job_config.load(["--job-config", str(path)]).config.model_spec


@pytest.mark.parametrize("block", ACCEPTED, ids=lambda text: re.findall('type = "(\\w+)"', text)[0])
def test_a_block_is_the_model_of_a_job(block, tmp_path):
    spec = load(block, tmp_path)
    for key, written in tomli.loads(block)["model"].items():
        taken = spec.arguments[key]
        one_by_one = zip(written, taken, strict=True) if key == "aux_losses" else [(written, taken)]
        for table, config in one_by_one:
            whole = {"type": config._owner.type_name, **toml_tables.dump(config)}
            assert whole | table == whole


def test_refused_block_has_its_message(tmp_path):
    (block,) = set(BLOCKS) - set(ACCEPTED)
    with pytest.raises(JobError) as error:
        load(block, tmp_path)
    assert block.startswith(f"{REFUSED}{error.value}\n")


@pytest.mark.parametrize(("family", "page"), [(AuxLoss, LOSSES), (ExpertBias, RULES)])
def test_every_method_has_a_section(family, page):
    sections = re.findall(r"^### (.*?)$(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    text = {name: body for head, body in sections for name in re.findall(r"`(\w+)`", head)}
    for name in ours(family):
        assert f'type = "{name}"' in text[name], name
        assert "Source: " in text[name] and "ixed point: " in text[name], name


def test_losses_are_logged_under_their_names():
    table = rows(LOSSES, "# Losses")
    names = {kind: f"`moe/{loss.metric_name}`" for kind, loss in ours(AuxLoss).items()}
    assert {kind: table[kind][-1] for kind in names} == names


def test_defaults_of_bias_rules():
    table = rows(RULES, "# Rules for the expert bias")
    for name, kind in ours(ExpertBias).items():
        told = dict(re.findall(r"`(\w+)` \(([\d.]+)\)", table[name][0]))
        defaults = {field.name: field.default for field in dataclasses.fields(kind.Config)}
        assert {key: float(value) for key, value in told.items()} == {
            key: defaults[key] for key in told
        }


def test_forced_strategies_and_their_defaults():
    page = (REFERENCE / "forced_routing.md").read_text()
    table = {row.split("`")[0]: cells for row, cells in rows(page, "# Forced routing").items()}
    kinds = ours(ForcedRouting)
    assert set(table) == set(kinds)
    for name, cells in table.items():
        defaults = {f.name: f.default for f in dataclasses.fields(kinds[name].Config)}
        for key, value in re.findall(r'(\w+) = ("\w+"|[\d.]+)', cells[-1]):
            assert str(defaults[key]) == value.strip('"'), (name, key)


# ---- Metrics, checks, files


def test_metrics():
    page = (REFERENCE / "metrics.md").read_text()
    named = set(re.findall(r"`moe/(\w+)`", page))
    losses = {loss.metric_name for loss in ours(AuxLoss).values()}
    assert named >= {*ours(Metric), *OF_COUNTS, *losses}
    assert {name for name in named if not name.startswith("replay_")} <= {
        *Metric.kinds,
        *OF_COUNTS,
        *losses,
    }


def test_reductions_of_metrics():
    page = (REFERENCE / "metrics.md").read_text()
    for name, kind in ours(Metric).items():
        over_ranks, over_layers = re.search(
            rf"^\| `moe/{name}` \|.*\| (\w+) \| (.+?) \| [^|]+ \|$", page, re.MULTILINE
        ).groups()
        assert over_ranks == kind.over_ranks.value, name
        assert over_layers == ("one of the step" if kind.of_step else kind.over_layers.value), name


def told_and_true(table: dict[str, list[str]], config: type) -> tuple[dict, dict]:
    values = {f.name: f.default for f in dataclasses.fields(config) if f.name in table}
    values |= {name: [] for name, value in values.items() if value is dataclasses.MISSING}
    shown = {
        name: "none" if value is None else toml_tables.inline(value)
        for name, value in values.items()
    }
    return {name: cells[0].strip("`") for name, cells in table.items()}, shown


def test_settings_of_metrics():
    table = rows((REFERENCE / "metrics.md").read_text(), "## Settings")
    told, true = told_and_true(table, LoadBalanceMetricsProcessor.Config)
    assert told == true
    own = set(LoadBalanceMetricsProcessor.Config.__annotations__)
    assert set(table) == own - LoadBalanceMetricsProcessor.filled_by_job


def test_keys_of_the_job_table():
    page = (REFERENCE / "job_keys.md").read_text()
    told, true = told_and_true(rows(page, "## `[job]`"), job_config.JobTable)
    assert told == true
    assert set(told) == {field.name for field in dataclasses.fields(job_config.JobTable)}


def test_metadata_of_a_trace():
    page = (REFERENCE / "trace_format.md").read_text()
    table = page.split("### Metadata")[1].split("### Damage")[0]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    fields = {field.name for field in dataclasses.fields(RunInfo)}
    assert named == fields
    assert f"of the format ({FORMAT_VERSION})" in table


def test_checks_of_diagnose():
    page = (REFERENCE / "diagnose_checks.md").read_text()
    kinds = [name.partition("`")[0] for name in rows(page, "# Checks of `diagnose`")]
    assert list(dict.fromkeys(kinds)) == [check.kind for check in CHECKS]


# ---- Evidence


def test_layouts_of_parity():
    """The page counts the layouts of every case of test_parity.py."""
    page = (ROOT / "docs" / "evidence" / "parity.md").read_text()
    told = {
        case: [int(number) for number in re.findall(r"(\d+) (?:eager|compiled)", cells[-1])]
        for cases, cells in rows(page, "over torchtitan's own router.\n").items()
        for case in re.findall(r"[\w ]+\w", cases)
    }
    true = {
        case: [len(table[case]) for table in (LAYOUTS, COMPILED) if case in table]
        for case in LAYOUTS
    }
    assert told == true


# ---- Flags


@pytest.mark.parametrize("command", ["plan", "place", "watch", "report", "diagnose", "study"])
def test_flags(command):
    """The section of a command lists exactly the flags of its ``--help``."""
    page = (REFERENCE / "commands.md").read_text()
    shown = subprocess.run(
        [sys.executable, "-m", "titan_moe_lb.cli", command, "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "200", "PATH": ""}, cwd=ROOT,
    ).stdout  # fmt: skip
    true = set(re.findall(r"(?<!\w)--[a-z][\w-]+(?=[ ,])", re.sub(r"--no-[\w-]+", "", shown)))
    section = next(part for part in page.split("\n## ") if f"`{command}`" in part.split("\n")[0])
    lines = section.splitlines()
    if section.startswith("`watch`"):
        lines = [line for line in lines if line.startswith(f"| `{command}`")]
    told = set(re.findall(r"^\|(?: `\w+` \|)? `(--[\w-]+)`", "\n".join(lines), re.MULTILINE))
    assert told == true - {"--help", "--training"}


def test_flags_of_train():
    page = (REFERENCE / "commands.md").read_text().split("## `train`")[1].split("\n## ")[0]
    told = set(re.findall(r"^\| `(--[\w.-]+)", page, re.MULTILINE))
    assert told == set(re.findall(r"^  (--[\w.-]+)", OWN_FLAGS, re.MULTILINE))


# ---- Costs


def hook_after_a_backward(layers) -> StepHook:
    hook = StepHook(layers, wire([layer.router for layer in layers], RankGroups()), RankGroups())
    forward_and_backward(layers)
    return hook


def step_end(layers) -> int:
    hook = hook_after_a_backward(layers)
    with DeviceOperators() as operators:
        hook.close_step()
    return operators.count


def in_router(layers) -> int:
    return operators_of_a_router(layers[0].router, torch.randn(2, 8, 64, requires_grad=True))


def test_operators():
    page = (ROOT / "docs" / "evidence" / "router_cost.md").read_text()
    numbers = [int(cells[0]) for cells in rows(page, "## Operators").values()]
    losses = ([], None, list(THREE_LOSSES))
    for one, told in zip(losses, numbers[1:4], strict=True):
        layers = moe_layers([0], one)
        end = step_end(layers)
        assert in_router(layers) == told
        assert one == [] or end == numbers[4 + (one is not None)]
    text = page.split("| bias rule, no loss |")[1].split("\n\n")[0]
    told_of_rules = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert {name for name, *_ in told_of_rules} == set(ours(ExpertBias)) - {"frozen"}
    for name, *told in told_of_rules:
        layers = moe_layers([0], [], expert_bias=name)
        assert [step_end(layers), in_router(layers)] == [int(number) for number in told], name


# ---- The map of the house


def test_map_of_the_house():
    """The rows of CONTRIBUTING.md and the layers of import-linter name the same folders, from the
    ground up."""
    layers = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (one for one in layers["contracts"] if one.get("exhaustive"))
    floors = [re.split(r" [:|] ", layer) for layer in reversed(contract["layers"])]
    floor_of = {name: floor for floor, names in enumerate(floors) for name in names}
    page = (ROOT / "CONTRIBUTING.md").read_text()
    table = page.split("| `titan_moe_lb/` |")[1].split("\n\n")[0]
    told = [
        [re.sub(r"/$|\.py$", "", name) for name in re.findall(r"`(.*?)`", cell)]
        for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    ]
    in_order = [floor_of[name] for row in told for name in sorted(row, key=floor_of.get)]
    assert in_order == sorted(in_order) and {name for row in told for name in row} == {*floor_of}
    named = re.findall(r"`(titan_moe_lb/[\w/.]+|docs/[\w/.]+|tests/[\w/.]+)`", page)
    assert named and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(
    ("title", "model", "flavor"),
    [
        ("DeepSeek-V2", "deepseek_v3", "236B"),
        ("DeepSeek-V2-Lite", "deepseek_v3", "16B"),
        ("DeepSeek-V3", "deepseek_v3", "671B"),
        ("Qwen3", "qwen3", "235B-A22B"),
    ],
)
def test_defaults_are_what_a_model_trained_with(title, model, flavor, tmp_path):
    """A change of speed late in training is no part of a default."""
    page = (REFERENCE / "trained_with.md").read_text()
    block = re.search(rf"^{title}\b[^\n-]*:\n\n```toml\n(.*?)```", page, re.M | re.S)[1]
    spec = load(re.sub(r", changes = \[.*?\]", "", block), tmp_path)
    defaults = import_module(f"model_registry.{model}").DEFAULTS
    for key, default in defaults_of(defaults, flavor).items():
        written, value = spec.arguments[key], default.value
        assert written == value, key
