"""Folder of a user for refused commands, and the words of these commands."""

from __future__ import annotations

import os
import shlex
import socket
import stat
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from tests.support.job_processes import JOB_VARIABLES
from tests.support.synthetic_trace import run_info, write_run
from titan_moe_lb import cli
from titan_moe_lb.run import launch

_HELD = socket.create_server(("", 0))
WORDS = {
    "TINY": "--config deepseek_v3_tiny",
    "H100": "--hardware h100",
    "CHECKPOINT": "--checkpoint.enable",
    "FROM": "--checkpoint.initial_load_path",
    "ROWS": "--training.local_batch_size",
    "BATCH": "--training.global_batch_size",
    "PP": "--parallelism.pipeline_parallel_degree",
    "TP": "--parallelism.tensor_parallel_degree",
    "CP": "--parallelism.context_parallel_degree",
    "EP": "--parallelism.expert_parallel_degree",
    "SCHEDULE": "--parallelism.pipeline_parallel_schedule",
    "MICRO": "--parallelism.pipeline_parallel_microbatch_size",
    "LAYERS": "--parallelism.pipeline_parallel_layers_per_stage",
    "SPMD": "--parallelism.spmd_backend",
}
"""Further words: HERE is the folder of the scene, and HELD a port in use."""
TINY_JOB = '[job]\nmodule = "deepseek_v3"\nconfig = "deepseek_v3_tiny"\n'


def build(folder: Path) -> Path:
    """Write runs, jobs, checkpoints, and foreign files."""
    for name, info in {
        "run": run_info(),
        "twin": run_info(),
        "occupied": run_info(),
        "qwen": run_info(4, 16, model="qwen3"),
    }.items():
        write_run(folder / name, info, 2)
    files = {
        "notes.txt": "mine\n",
        "own.html": "<!doctype html><title>mine</title>",
        "empty.html": "",
        "occupied/report.html": "mine",
        "occupied/compare.html": "mine",
        "job.toml": TINY_JOB,
        "device.toml": 'name = "mine"\n',
        "bad.toml": "[job\n",
        "comment.toml": "# [job]\n",
        "no_model.toml": "[training]\nsteps = 1\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "latin1.toml").write_bytes('[job]\ndescription = "\xe9"\n'.encode("latin1"))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    for link, target in {
        "link_to_notes": "notes.txt",
        "link_to_trace": "run/moe_load.arrow",
        "link_to_device": "/dev/null",
        "loop": "loop",
    }.items():
        (folder / link).symlink_to(target)
    os.link(folder / "run/moe_load.arrow", folder / "hard_link_to_trace")
    for name in ("saved", "cut", "unfinished"):
        step = folder / name / "checkpoint" / "step-5"
        dcp.save({"of_another_model": torch.zeros(3, 4)}, checkpoint_id=step, no_dist=True)
    (folder / "unfinished/checkpoint/step-7").mkdir()
    weights = folder / "cut/checkpoint/step-5/__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-10])
    return folder


def state(folder: Path) -> dict[str, tuple]:
    """Describe every file by properties that a write would change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        times = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
        found[str(path)] = (status.st_mode, status.st_ino, *times)
    return found


def type_in(line: str, monkeypatch) -> None:
    """Run a user's line: variables, command, arguments."""
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    line = line.replace("HERE", os.getcwd()).replace("HELD", str(_HELD.getsockname()[1]))
    words = shlex.split(line)
    while words and words[0].partition("=")[0].isupper():
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    command, *arguments = words or [""]
    spelled = []
    for word in arguments:
        name, equals, value = word.partition("=")
        spelled += shlex.split(WORDS[name] + equals + value) if name in WORDS else [word]
    if command == "train":
        launch.main(spelled)
    else:
        cli.main([command, *spelled] if command else [])
