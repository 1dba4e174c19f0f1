"""Tests of every code block of README.md, CONTRIBUTING.md and docs/, up to the start if that is
slow.

A job is resolved and checked in a user's folder, and not started. A plan is read, and its jobs are
not built. A block without a rule fails.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli
import torchtitan.models.deepseek_v3
import tyro
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer

import titan_moe_lb
from model_registry import recipes
from model_registry.entry import Default, registry_entry
from tests import soak
from tests.chaos import __main__ as chaos
from tests.fuzz import __main__ as fuzz
from tests.parity import __main__ as parity
from tests.parity.layout import parse
from tests.support import doc_examples
from tests.support.doc_examples import ROOT, Block
from tests.support.job_processes import JOB_VARIABLES
from tests.support.place_jobs import saved
from tests.support.synthetic_trace import run_info, write_run
from titan_moe_lb import cli
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import AuxLoss, GlobalBatchAuxLoss
from titan_moe_lb.commands.check import command as check_command
from titan_moe_lb.commands.plan import arguments as plan_arguments
from titan_moe_lb.commands.plan import command as plan_command
from titan_moe_lb.commands.plan.known_hardware import hardware
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.study import command as study_command
from titan_moe_lb.commands.study.design import read_study
from titan_moe_lb.commands.study.search import Search
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.run import launch
from titan_moe_lb.traces.routing_trace import RoutingTraceWriter

BLOCKS = doc_examples.blocks()
# One program, from the top of the first page to the bottom of the second.
OWN_LOOPS = ("docs/howto/own_loop.md", "docs/howto/replay_routing.md")
START = """
[job]
module = "deepseek_v3"
flavor = "tiny"
ranks = 2
[parallelism]
expert_parallel_degree = 2
"""
PROMPT = "$ "
# Files that pages name, and the first line of the block that holds each.
FILES = {
    "my_job.py": "# my_job.py\n",
    "my_job.toml": "# my_job.toml\n",
    "my_cluster.toml": 'name = "my cluster"\n',
    "my_study.toml": "# my_study.toml\n",
}
COPIES = {"other_layout.toml": "my_job.toml"}
RUNS = ("outputs", "outputs_b", "RUN_DIR", "runs/with", "runs/without")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Clone with the files and runs that the pages name."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("configs", "titan_moe_lb", "tests", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for name, start in FILES.items():
        (text,) = {block.text for block in BLOCKS if block.text.startswith(start)}
        (folder / name).write_text(text)
    for name, source in COPIES.items():
        (folder / name).symlink_to(source)
    for name in RUNS:
        write_run(folder / name, run_info(5, 8, 3), 3)
    write_run(folder / "runs/uneven", run_info(2, expert_groups=()), 20)
    saved(folder / "runs/uneven/checkpoint/step-20")
    record_routing(folder / "outputs")
    loads = ["step,layer,expert,tokens", *(f"{s},1,{e},8" for s in range(20) for e in range(8))]
    (folder / "loads.csv").write_text("\n".join(loads))
    write_run(folder / "example", run_info(48, 128, 8, model="qwen3", flavor="30B-A3B"), 1)
    return folder


def record_routing(run: Path) -> None:
    """Record one step of the job of README.md: eight sequences of 256 tokens."""
    info = run_info(5, 8, 3, world_size=1)
    writer = RoutingTraceWriter(run, info, rank=0)
    shape = (info.global_batch_size, info.seq_len, info.top_k)
    ids_BLK = np.broadcast_to(np.arange(info.top_k), shape)
    for layer in info.layers:
        whole = [(0, info.seq_len)]
        writer.write(
            step=1, layer=layer, first_sequence=0, token_slices=whole, expert_ids_BLK=ids_BLK
        )
    writer.close()


@pytest.fixture
def at_home(home, monkeypatch):
    """Run in that folder, with every example imported, and start nothing."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_run_here", lambda *job, **more: None)
    monkeypatch.setattr(launch.rank_processes, "run", lambda *job: None)
    # Or one block would hold the folder of the next.
    monkeypatch.setattr(launch.run_folder, "claim", lambda folder, run: None)
    monkeypatch.setattr(check_command, "run", read_check)
    monkeypatch.setattr(plan_command, "run", read_plan)
    monkeypatch.setattr(study_command, "run_study", check_study)
    with contextlib.ExitStack() as stack:
        for name in doc_examples.names():
            stack.enter_context(doc_examples.imported(name))
        yield monkeypatch


def read_plan(question: PlanArguments) -> None:
    follows = plan_arguments.follows_ranks(question)
    draft = job_config.draft(plan_arguments.with_flags(question.job_arguments, follows))
    draft.resolve(question.ranks or draft.table.ranks or 1)
    hardware(question.hardware)
    assert question.from_run is None or question.from_run.is_dir()


def read_check(arguments: list[str]) -> None:
    draft = job_config.draft(arguments)
    draft.resolve(draft.table.ranks or 1)


def check_study(path: Path, **_options) -> None:
    study_command.check_jobs(read_study(path).grid())


def run_cli(arguments: list[str], monkeypatch) -> None:
    try:
        if arguments[:1] == ["train"]:
            launch.main(arguments[1:])
        elif arguments[:1] == ["doctor"]:
            assert arguments == ["doctor"]
        else:
            cli.main([*arguments, "--once"] if arguments[0] == "watch" else arguments)
    except SystemExit as stop:
        found = arguments[0] == "diagnose" and stop.code == 1
        if stop.code and not found:  # 0 or None: --help, a completion
            raise


def run_pytest(arguments: list[str], _monkeypatch) -> None:
    while arguments:
        first = arguments.pop(0)
        if first == "--device":
            assert arguments.pop(0) in ("cpu", "cuda")
        elif first in ("-k", "-n"):
            assert arguments.pop(0)
        else:
            path, _, test = first.partition("::")
            name = test.partition("[")[0]
            assert first == "-q" or f"def {name}" in (ROOT / path).read_text(), first


def run_parity(arguments: list[str], _monkeypatch) -> None:
    read = tyro.cli(parity.Arguments, args=arguments)
    parse(read.layout)
    assert set(read.loss.split(",")) <= set(AuxLoss.kinds)


def run_with(arguments_of: type) -> Callable[[list[str], pytest.MonkeyPatch], None]:
    """Check only the flags of a long program of ours."""

    def run(arguments: list[str], _monkeypatch) -> None:
        tyro.cli(arguments_of, args=arguments)

    return run


def run_torchrun(arguments: list[str], _monkeypatch) -> None:
    """Check the config function that torchtitan's own start names."""
    start = arguments.index("-m")
    assert arguments[start + 1] == "torchtitan.train"
    config, _rest = ConfigManager()._load_config(arguments[start + 2 :])
    assert isinstance(config, Trainer.Config)


def run_benchmark(name: str) -> Callable[[list[str], pytest.MonkeyPatch], None]:
    def run(_arguments: list[str], _monkeypatch) -> None:
        assert importlib.util.find_spec(name), name

    return run


def run_pip(arguments: list[str], _monkeypatch) -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"\[(.*?)\]", " ".join(arguments))
    assert arguments[0] in ("install", "wheel")
    for extra in ",".join(named).split(",") if named else ():
        assert extra in project["optional-dependencies"], extra


def run_sbatch(arguments: list[str], monkeypatch) -> None:
    options = list(itertools.takewhile(lambda word: word.startswith("--"), arguments))
    script, *job = arguments[len(options) :]
    assert (ROOT / script).is_file()
    run_cli(["train", *job], monkeypatch)


def run_mkdocs(arguments: list[str], _monkeypatch) -> None:
    assert arguments[0] in ("build", "serve") and (ROOT / "mkdocs.yml").is_file()


def run_tool(arguments: list[str], _monkeypatch) -> None:
    """Accept ruff, mypy and lint-imports, which other tests and CI start."""
    assert set(arguments) <= {"check", "format", "."}


PROGRAMS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "./run_train.sh": lambda arguments, patch: run_cli(["train", *arguments], patch),
    "titan-moe-lb": run_cli,
    "./run_tests.sh": run_pytest,
    "python -m pytest": run_pytest,
    "python -m tests.parity": run_parity,
    "python -m tests.fuzz": run_with(fuzz.Arguments),
    "python -m tests.chaos": run_with(chaos.Arguments),
    "python -m tests.soak": run_with(soak.Arguments),
    "python -m pip": run_pip,
    "mkdocs": run_mkdocs,
    "sbatch": run_sbatch,
    "torchrun": run_torchrun,
    "ruff": run_tool,
    "mypy": run_tool,
    "lint-imports": run_tool,
}


def run_command(line: str, monkeypatch) -> None:
    """Run one command line, parsed as by a shell."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    words[0] = words[0].removeprefix(".venv/bin/")
    if ">" in words:
        words = words[: words.index(">")]
    if words[:2] == ["python", "-m"]:
        words = [" ".join(words[:3]), *words[3:]]
    program, *arguments = words
    if program.startswith("python -m benchmarks."):
        run_benchmark(program.removeprefix("python -m "))(arguments, monkeypatch)
        return
    assert program in PROGRAMS, f"no rule for {program}"
    with monkeypatch.context() as patch:
        for name in JOB_VARIABLES:
            if name not in line:
                patch.delenv(name, raising=False)
        PROGRAMS[program](arguments, patch)


def commands(text: str) -> list[str]:
    """Join lines that end in a backslash with the next."""
    joined = text.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


def run_bash(block: Block, monkeypatch, _capsys) -> None:
    for line in commands(block.text):
        run_command(line, monkeypatch)


def run_console(block: Block, monkeypatch, capsys) -> None:
    """Run the commands of a block, and compare an error with the printed line."""
    lines = commands(block.text)
    assert lines[0].startswith(PROMPT), "it begins with a command: $ ..."
    for line, answer in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith(PROMPT):
            continue
        if not answer.startswith("titan_moe_lb: error: "):
            run_command(line.removeprefix(PROMPT), monkeypatch)
            continue
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(line.removeprefix(PROMPT), monkeypatch)
        assert stop.value.code == 2 and capsys.readouterr().err == f"{answer}\n"


def run_toml(block: Block, monkeypatch, _capsys) -> None:
    """Load a job, a part of a job for a small model, or a device."""
    path = Path("of_a_page.toml")
    if {"study", "axis", "plan"} & tomli.loads(block.text).keys():
        run_study_toml(block, path)
        return
    whole = "[job]" in block.text or "bf16_flops" in block.text
    path.write_text(block.text if whole else f"{block.text}\n{START}")
    if "bf16_flops" in block.text:
        hardware(str(path))
        return
    ranks = tomli.loads(path.read_text())["job"].get("ranks", 1)
    refused = re.match(r"# refused: (.*)\n", block.text)
    with pytest.raises(JobError, match=re.escape(refused[1])) if refused else nothing():
        job_config.load(["--job-config", str(path)], ranks)


def run_study_toml(block: Block, path: Path) -> None:
    """Load a study, or a part of one."""
    text, tables = block.text, tomli.loads(block.text)
    if "axis" not in tables:
        text += '[[axis]]\nkey = "debug.seed"\nvalues = [1]\n'
    searches = any("low" in axis for axis in tables.get("axis", ()))
    if searches:
        text += '[study]\nsampler = "tpe"\ntrials = 2\n'
    path.write_text(text)
    study = read_study(path)
    study_command.check_jobs(list(Search(study).cells()) if searches else study.grid())


def nothing() -> contextlib.nullcontext:
    return contextlib.nullcontext()


def run_python(block: Block, _monkeypatch, _capsys) -> None:
    """Run a block with the names that its page introduced; examples are imported already."""
    if block.example:
        assert block.example in doc_examples.names()
        return
    if block.page in OWN_LOOPS:  # needs a process group: test_loops_of_ones_own
        return
    spec = torchtitan.models.deepseek_v3.model_registry("debugmodel")
    names: dict = {
        "BaseDataLoader": BaseDataLoader,
        "Default": Default,
        "GlobalBatchAuxLoss": GlobalBatchAuxLoss,
        "ModelSpec": object,
        "PADDING": 0,
        "SignBias": SignBias,
        "config": recipes.debug(copy.deepcopy(spec)),
        "my_torchtitan_spec": lambda flavor: copy.deepcopy(spec),
        "recipes": recipes,
        "registry_entry": registry_entry,
        "spec": spec,
        "titan_moe_lb": titan_moe_lb,
    }
    exec(compile(block.text, str(block), "exec"), names)
    if "debug_config" in names:
        names[names["debug_config"]]()


def read_text(block: Block, _monkeypatch, _capsys) -> None:
    """Check that a formula or an output contains no command."""
    for line in block.text.splitlines():
        first = line.removeprefix(PROMPT).removeprefix(".venv/bin/").partition(" ")[0]
        assert not line.startswith(PROMPT) and first not in PROGRAMS, line


RULES = {
    "bash": run_bash,
    "console": run_console,
    "python": run_python,
    "text": read_text,
    "toml": run_toml,
}


def run_together(program: str) -> None:
    """Run the program on one rank."""
    exec(compile(program, OWN_LOOPS[0], "exec"), {})


def test_loops_of_ones_own(ranks):
    pages = [[b for b in BLOCKS if b.page == page and b.language == "python"] for page in OWN_LOOPS]
    texts = [block.text for blocks in pages for block in blocks]
    assert len(texts) == 4
    ranks.run(1, run_together, "\n".join(texts))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block, at_home, capsys):
    assert block.language in RULES, "name its language: " + ", ".join(RULES)
    RULES[block.language](block, at_home, capsys)


@pytest.mark.parametrize(
    "block",
    [
        Block("page", 1, "", "x"),
        Block("page", 1, "sh", "./run_train.sh"),
        Block("page", 1, "bash", "./run_trian.sh --module deepseek_v3\n"),
        Block("page", 1, "bash", "./run_train.sh --module deepseek_v3 --training.stpes 3\n"),
        Block("page", 1, "bash", "titan-moe-lb plan --hardware nothing --ep 8\n"),
        Block("page", 1, "bash", "./run_tests.sh tests/test_nothing.py\n"),
        Block("page", 1, "console", "step: 1\n"),
        Block("page", 1, "text", "$ ./run_train.sh\n"),
        Block("page", 1, "toml", "[training]\nstpes = 3\n"),
        Block("page", 1, "python", "import titan_moe_lb\ntitan_moe_lb.blanced\n"),
    ],
    ids=lambda block: f"{block.language}-{block.text[:20].strip()}",
)
def test_a_wrong_block_fails(block, at_home, capsys):
    with pytest.raises((AssertionError, SystemExit, JobError, AttributeError, OSError)):
        test_block(block, at_home, capsys)
