"""Targets: files to damage, and their readers. A new kind of input is one more target."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import tomli
import tomli_w
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import strategies as st
from rich.console import Console
from torch.distributed.checkpoint.metadata import Metadata

from tests.fuzz.damage import HOSTILE_TEXT, MOMENTS, VALUES, damaged, trees
from tests.support.synthetic_trace import run_info, write_run
from titan_moe_lb import cli, rules
from titan_moe_lb.checkpoints.resume_point import read_metadata, start_of
from titan_moe_lb.commands.diagnose.command import diagnose
from titan_moe_lb.commands.plan.known_hardware import hardware, known_hardware
from titan_moe_lb.commands.study import command as study_command
from titan_moe_lb.commands.study import design
from titan_moe_lb.commands.study.cell import CELLS, CellFolder
from titan_moe_lb.commands.study.search import Search
from titan_moe_lb.commands.watch.command import watch
from titan_moe_lb.job import job_config, job_files
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules import checkpoint as checkpoint_rules
from titan_moe_lb.traces.routing_trace import FOLDER, RoutingTrace, RoutingTraceWriter
from titan_moe_lb.traces.trace import FILE_NAME


@dataclass(frozen=True)
class Target:
    """Kind of file."""

    cases: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any, Path], None]
    """Write a case into an empty folder and read it; it raises at most ``JobError``."""
    is_pickle: bool = False


def _toml(tree: dict[str, Any]) -> bytes:
    try:
        return tomli_w.dumps(tree).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):  # what TOML cannot say is another kind of damage
        return repr(tree).encode("utf-8", "surrogatepass")


def _tomls(sound: dict[str, Any]) -> st.SearchStrategy[bytes]:
    return trees(sound, VALUES | MOMENTS).map(_toml) | damaged(_toml(sound))


JOBS = ("deepseek_v3/debug", "deepseek_v3/fsdp2_ep2", "qwen3/pp2_zbv", "gpt_oss/debug")


def _jobs() -> st.SearchStrategy[bytes]:
    texts = [(job_files.CONFIGS / f"{name}.toml").read_text() for name in JOBS]
    rich = {
        "job": {"module": "deepseek_v3", "config": "deepseek_v3_tiny", "ranks": 2},
        "training": {"steps": 3, "local_batch_size": 2, "seq_len": 128},
        "parallelism": {"data_parallel_shard_degree": 2, "expert_parallel_degree": 2},
        "activation_checkpoint": {"type": "full"},
        "checkpoint": {"enable": True, "interval": 2},
        "model": {
            "expert_bias": {"type": "sign", "speed": {"type": "linear", "values": [1e-3, 0.0]}},
            "aux_losses": [{"type": "sequence_wise", "weight": 1e-4}, {"type": "z_loss"}],
        },
    }
    return st.one_of(_tomls(rich), *(_tomls(tomli.loads(text)) for text in texts))


def _read_job(content: bytes, folder: Path) -> None:
    file = folder / "job.toml"
    file.write_bytes(content)
    draft = job_config.draft(["--job-config", str(file), f"--dump_folder={folder}/outputs"])
    ranks = draft.table.ranks
    job = draft.resolve(1 if ranks is None else ranks)
    rules.validate_here(job)
    assert tomli.loads(job_config.render(draft.table, job.config))


def _read_hardware(content: bytes, folder: Path) -> None:
    file = folder / "device.toml"
    file.write_bytes(content)
    device = hardware(str(file)).derated(compute_efficiency=0.5, network_efficiency=0.5)
    seconds = device.all_to_all_time(num_bytes=1e6, ep_degree=np.array([1, 8, 64]))
    assert seconds.shape == (3,)


STUDIES = (
    {
        "study": {"job": ["--config=deepseek_v3_tiny", "--training.steps=3"], "processes": 2},
        "axis": [
            {
                "name": "method",
                "settings": {
                    "none": {"model.aux_losses": []},
                    "loss 1e-3": {"model.aux_losses": [{"type": "z_loss", "weight": 1e-3}]},
                },
            },
            {"key": "debug.seed", "values": [1, 2]},
        ],
        "plan": {"hardware": "h100", "ep": 8, "ranks": 8, "job": ["--config=deepseek_v3_tiny"]},
    },
    {
        "study": {
            "job": ["--module=qwen3", "--config=qwen3_tiny"],
            "sampler": "tpe",
            "trials": 3,
            "threads": 2,
        },
        "axis": [
            {"key": "model.expert_bias", "values": ["none", {"type": "sign", "speed": 1e-3}]},
            {"key": "training.local_batch_size", "name": "batch", "values": [1, 2]},
            {
                "key": "optimizer.param_groups.0.optimizer_kwargs.lr",
                "low": 1e-4,
                "high": 1e-2,
                "log": True,
            },
        ],
    },
)
MOST_CELLS = 3
"""Number of cells of a study that are checked as jobs."""


def _read_study(content: bytes, folder: Path) -> None:
    file = folder / "study.toml"
    file.write_bytes(content)
    study = design.read_study(file)
    all_cells = study.grid() if study.settings.sampler == "grid" else Search(study).cells()
    cells = list(itertools.islice(all_cells, MOST_CELLS))
    study_command.check_jobs(cells)
    if study.plan is not None:
        study_command.check_prediction(study.plan)
    for cell in cells:
        at = CellFolder(folder / "outputs", cell)
        assert at.record() is None
        at.clear()
    assert len(list((folder / "outputs" / CELLS).iterdir())) == len(cells)


@dataclass(frozen=True)
class TraceCase:
    content: bytes
    page: bool
    """Also make the whole report, which takes a second."""


def _sound(write: Callable[[Path], Any], name: str) -> bytes:
    with TemporaryDirectory() as folder:
        write(Path(folder))
        return Path(folder, name).read_bytes()


def _described(
    sound: bytes, table: dict[str, Any], renamed: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Batches of a sound file after another description of the run, without checksums."""
    reader = pa.ipc.open_stream(sound)
    fields = [field.with_name(renamed.get(field.name, field.name)) for field in reader.schema]
    schema = pa.schema(fields, metadata={b"titan_moe_lb": json.dumps(table).encode()})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in reader:
            writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    return sink.getvalue()[:-8]


def hostile_run(sound: bytes, words: list[str]) -> bytes:
    """Write a sound trace of a run with hostile names.

    Args:
        words: a few texts, which become every name and description.
    """
    table = _table_of(sound)
    renamed = {}
    for index, column in enumerate(table["columns"]):
        word = words[index % len(words)]
        renamed[column["name"]] = f"{index} {word}"
        column |= {"name": renamed[column["name"]], "description": word}
    table["losses"] = {renamed[name]: weight for name, weight in table["losses"].items()}
    for index, key in enumerate(("model", "flavor", "schedule", "expert_bias", "forced_routing")):
        table[key] = words[index % len(words)]
    table["started"] = table["version"] = words[-1]
    return _described(sound, table, renamed)


def _table_of(sound: bytes) -> dict[str, Any]:
    return json.loads(pa.ipc.open_stream(sound).schema.metadata[b"titan_moe_lb"])


def _traces() -> st.SearchStrategy[TraceCase]:
    sound = _sound(lambda folder: write_run(folder, run_info(2, 8), 12), FILE_NAME)
    table = _table_of(sound)
    words = st.lists(st.sampled_from(HOSTILE_TEXT), min_size=1, max_size=5)
    contents = (
        damaged(sound)
        | damaged(_described(sound, table))
        | trees(table).map(functools.partial(_described, sound))
        | words.map(functools.partial(hostile_run, sound))
    )
    pages = st.integers(0, 99).map(lambda number: number == 57)
    return st.builds(TraceCase, contents, pages)


def _read_trace(case: TraceCase, folder: Path) -> None:
    (folder / FILE_NAME).write_bytes(case.content)
    watch(folder, once=True, console=Console(file=io.StringIO(), width=100))
    with contextlib.redirect_stdout(io.StringIO()):
        diagnose([folder])
        diagnose([folder], as_json=True)
        if case.page:
            cli.report(folder)


def _write_routing(folder: Path) -> None:
    info = run_info(2, 8, world_size=1, global_batch_size=2, seq_len=16)
    writer = RoutingTraceWriter(folder, info, rank=0)
    ids = np.random.default_rng(0).integers(0, 8, (2, 16, 2))
    for step in (1, 2):
        for layer in info.layers:
            writer.write(
                step=step,
                layer=layer,
                first_sequence=0,
                token_slices=[(0, 16)],
                expert_ids_BLK=ids,
            )
    writer.close()


def _routings() -> st.SearchStrategy[bytes]:
    sound = _sound(_write_routing, f"{FOLDER}/rank_00000.arrow")
    described = trees(_table_of(sound)).map(functools.partial(_described, sound))
    return damaged(sound) | described


def _read_routing(content: bytes, folder: Path) -> None:
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "rank_00000.arrow").write_bytes(content)
    trace = RoutingTrace(folder)
    for step in trace.steps:
        for layer in trace.layers:
            trace.expert_ids(step, layer)


CHECKPOINT_JOB = ("--config=deepseek_v3_tiny", "--checkpoint.enable", "--training.steps=9")


@functools.cache
def _checkpoint() -> tuple[TemporaryDirectory, Job]:
    """Folder with a sound checkpoint of a step, and its job."""
    job = job_config.load(list(CHECKPOINT_JOB), 1)
    folder = TemporaryDirectory(prefix="titan_moe_lb-fuzz-")
    state = {
        name: torch.zeros_like(value, device="cpu") if torch.is_tensor(value) else value
        for name, value in job.meta_model.state_dict().items()
    }
    dcp.save({**state, "train_state": {"step": 2}}, checkpoint_id=folder.name, no_dist=True)
    return folder, job


def _checkpoints() -> st.SearchStrategy[bytes]:
    return damaged(Path(_checkpoint()[0].name, ".metadata").read_bytes())


def _read_checkpoint(content: bytes, folder: Path) -> None:
    sound, job = _checkpoint()
    step = folder / "checkpoint" / "step-2"
    step.mkdir(parents=True)
    for file in Path(sound.name).glob("*.distcp"):
        os.link(file, step / file.name)
    (step / ".metadata").write_bytes(content)
    job.config.dump_folder = str(folder)
    job = replace(job, start=start_of(job.config))
    for rule in (
        checkpoint_rules.checkpoint_is_there,
        checkpoint_rules.checkpoint_is_whole,
        checkpoint_rules.checkpoint_has_steps_to_go,
        checkpoint_rules.checkpoint_is_of_this_model,
        checkpoint_rules.checkpoint_has_router_state,
    ):
        rule(job)
    assert isinstance(read_metadata(step), Metadata)


TARGETS = {
    "job": Target(_jobs, _read_job),
    "study": Target(lambda: st.one_of(*map(_tomls, STUDIES)), _read_study),
    "hardware": Target(lambda: _tomls(known_hardware()["h100"]), _read_hardware),
    "trace": Target(_traces, _read_trace),
    "routing": Target(_routings, _read_routing),
    "checkpoint": Target(_checkpoints, _read_checkpoint, is_pickle=True),
}


def empty(folder: Path) -> None:
    """Remove the files of the previous case."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
