"""Wrong first contacts, as they are typed: one line, status 2, and no file touched."""

from __future__ import annotations

import os
import shlex
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.run.test_launch import JOB_VARIABLES
from tests.support.synthetic_trace import run_info, write_run
from titan_moe_lb import cli
from titan_moe_lb.costmodel.jobs import read_job, read_served
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config, renamed_keys
from titan_moe_lb.pages import output_file
from titan_moe_lb.run import launch, processes
from titan_moe_lb.terminal import run_folder

HELD = socket.create_server(("", 0))
# TINY stands for the flags of a small model, HERE for the folder that all this is in, HELD for
# a port that is not free.
OPTIMIZER = """\
[job]
config = "deepseek_v3_tiny"
[[optimizer.param_groups]]
pattern = ".*"
optimizer_name = "{}"
optimizer_kwargs = {{lr = 0.1}}
"""
WRONG_OUTPUT = {
    "report run -o run/moe_load.arrow": "run/moe_load.arrow is an input of this command",
    "report run/moe_load.arrow -o run/moe_load.arrow": "is an input of this command",
    "report run --compare twin -o twin/moe_load.arrow": "is an input of this command",
    "report run -o link_to_trace": "link_to_trace is an input of this command",
    "report run -o hard_link_to_trace": "is an input of this command",
    "report run -o notes.txt": "notes.txt exists and is not a page of titan_moe_lb: name another",
    "report run -o own.html": "own.html exists and is not a page of titan_moe_lb",
    "report run -o empty.html": "empty.html exists and is not a page",
    "report run -o link_to_notes": "link_to_notes exists and is not a page",
    "report run -o folder": "folder is a folder: name another file with --output",
    "report run -o fifo": "fifo is not a plain file",
    "report run -o /dev/null": "/dev/null is not a plain file",
    "report run -o link_to_device": "link_to_device is not a plain file",
    "report run -o loop": "loop is a symlink that ends nowhere",
    "report run -o nowhere/page.html": "nowhere/page.html cannot be written (No such file",
    "report run -o notes.txt/page.html": "cannot be written (Not a directory)",
    "report run -o /proc/page.html": "/proc/page.html cannot be written",
    f"report run -o {'n' * 300}.html": "cannot be written (File name too long)",
    "report run --output ''": " is a folder: name another file",
    "report occupied": "occupied/report.html exists and is not a page",
    "report occupied --compare run": "occupied/compare.html exists and is not a page",
    "plan --hardware h100 -o notes.txt": "notes.txt exists and is not a page",
    "plan --hardware h100 --job-config job.toml -o job.toml": "job.toml is an input",
    "plan --hardware device.toml -o device.toml": "device.toml is an input",
    "plan --hardware h100 --from-run run -o run/moe_load.arrow": "is an input",
    "plan --hardware h100 -o /dev/null": "/dev/null is not a plain file",
    "plan --hardware h100 -o folder": "folder is a folder",
}
WRONG_COMMAND = {
    "report nowhere": "nowhere: there is no such folder or file: name the folder of a run",
    "report folder": "folder has no moe_load.arrow",
    "report notes.txt": "notes.txt",
    "report run --compare nowhere": "nowhere: there is no such folder or file",
    "report run --compare qwen": "take two runs of one model",
    "report run --compare twin --compare qwen": "take two runs of one model",
    "diagnose nowhere": "nowhere: there is no such folder or file: name the folder of a run",
    "watch nowhere --once": "nowhere: there is no such folder or file",
    "watch folder --once": "folder has no moe_load.arrow",
    "watch notes.txt --once": "notes.txt",
}
WRONG_PLAN = {
    "plan --hardware h10": "did you mean 'h100'?",
    "plan --hardware nothing.toml": "--hardware nothing.toml: there is no such file",
    "plan --hardware bad.toml": "--hardware bad.toml: not valid TOML",
    "plan --hardware job.toml": "job.toml: no figure 'job'",
    "plan --hardware h100 --ranks 0": "--ranks 0 must be at least 1",
    "plan --hardware h100 --ep two": "--ep two must be whole numbers",
    "plan --hardware h100 --ep 8 --ranks 4 -- TINY": "--ep 8 is above the job's 4 rank(s)",
    "plan --hardware h100 --imbalance much": "'much' is neither a number nor 'worst'",
    "plan --hardware h100 --imbalance 0.5": "--imbalance 0.5 is below 1, which is balance",
    "plan --hardware h100 --imbalance 4.5 -- TINY": "--imbalance 4.5 is above 4, the worst of layer",
    "plan --hardware h100 --hot-experts 0": "--hot-experts 0 must be at least 1",
    "plan --hardware h100 --hot-experts 3 -- TINY": "--hot-experts 3 is above the 2 experts that a",
    "plan --hardware h100 --compute-efficiency 1.5": "--compute-efficiency 1.5 must be above 0",
    "plan --hardware h100 --from-run nowhere": "nowhere: there is no such folder or file",
    "plan --hardware h100 --ranks 6 --ep 1,3 -- TINY": "does not divide the 8 experts of layer 1",
    "plan --hardware h100 --from-run run --redundant-experts 3 --ranks 2 --ep 2 -- TINY": "no multiple",
    "plan --hardware h100 --serve --from-run qwen -- TINY": "take a run of the job's model",
    "plan --hardware h100 --from-run qwen -- TINY": "take a run of the job's model",
    "plan --hardware h100 --job-config none.toml": "--job-config none.toml: there is no such file",
    "plan --hardware h100 --job-config deepseek_v3/debgu": "did you mean 'deepseek_v3/debug'?",
    "NGPU=two plan --hardware h100": "NGPU=two must be a whole number",
    "plan --hardware h100 -- --module llama3 --config llama3_debugmodel": "has no MoE layers",
    "plan --hardware h100 --tokens 1,8": "--tokens is of a deployment: give --serve as well",
    "plan --hardware h100 --context 4096": "--context is of a deployment: give --serve as well",
    "plan --hardware h100 --dispatcher low_latency": "low_latency is of kernels without a backward",
    "plan --hardware h100 --serve --tokens some": "--tokens some must be whole numbers of at least 1",
    "plan --hardware h100 --serve --context 0": "--context 0 must be at least 1",
    "plan --hardware h100 --serve --ranks 8": "--ranks is of a training; a deployment has the devices",
    "plan --hardware h100 --serve --ep 3 -- TINY": "--ep 3 does not divide the 8 experts of layer 1",
    "plan --hardware h100 --serve --redundant-experts 8": "--redundant-experts is answered from the",
    "plan --hardware h100 --serve --from-run run --drop-share 0.1": "--drop-share is about the buffers",
}
WRONG_PLACE = {
    "place nowhere -o new": "nowhere: there is no such folder: name a checkpoint, or a run that has",
    "place run -o new --ep 2": "run has no checkpoint: neither .metadata nor *.safetensors nor",
    "place saved -o new --ep 2": "saved/checkpoint/step-5 cannot be placed: it has no MoE layer",
    "place cut -o new --ep 2": "cut/checkpoint/step-5/__0_0.distcp is cut",
    "place saved -o folder": "folder exists: name a new folder with --output",
    "place saved -o nowhere/new": "nowhere/new cannot be made: nowhere is no folder",
}
WRONG_JOB = {
    "train --module deepseek_v4": "did you mean 'deepseek_v3'?",
    "train --module": "--module needs a value",
    "train --config deepseek_v3_tinny": "did you mean 'deepseek_v3_tiny'?",
    "train --flavor 16B": "--flavor is a key of [job] in a job file; here --config chooses it",
    "train TINY --lr 1": "no flag --lr; the key is optimizer.param_groups.0.optimizer_kwargs.lr",
    "train TINY --optimizer.lr=1": "the key is optimizer.param_groups.0.optimizer_kwargs.lr",
    "train TINY --steps 5": "there is no flag --steps; the key is training.steps",
    "train TINY --load_balance_coeff 3": "the key is model.expert_bias",
    "train TINY --training.num-tokens-per-train-step 5": "the key is training.global_batch_size",
    "train TINY --activation_checkpoint.mode full": "the key is activation_checkpoint, as in activa",
    "train TINY --max-restarts two": "--max-restarts is 'two'; it must be a whole number",
    "NNODES=2 NODE_RANK=1 RDZV_ENDPOINT=localhost:9 train TINY --max-restarts 1": "max_restarts is 1, and NNODES=2",
    "train TINY --training.steps 0": "training.steps is 0; it must be at least 1",
    "train TINY --model.aux_loses []": "has no key 'aux_loses'; did you mean 'aux_losses'?",
    "train TINY --model.aux_losses '[{'": "--model.aux_losses '[{': not a TOML value",
    "train TINY --model.expert_bias sing": "did you mean 'sign'?",
    "train TINY --debug.seed -1": "debug.seed is -1; it must be at least 0",
    "train TINY --dataloader.dataset c5": "dataloader.dataset 'c5' does not exist; did you mean 'c4",
    "train TINY --hf_assets_path nowhere": "hf_assets_path 'nowhere' is not a folder",
    "train TINY --training.enable_cpu_offload": "training.enable_cpu_offload needs a GPU",
    "train TINY --checkpoint.enable --checkpoint.async_mode async_with_pinned_mem": "checkpoint.async_m",
    "train TINY --checkpoint.enable --checkpoint.exclude_from_loading dataloder": "exclude_from_loading"
    " 'dataloder' is no part of a checkpoint; did you mean 'dataloader'?",
    "NGPU=2 train TINY --parallelism.context_parallel_degree 2 --training.seq_len 192": "training.seq_"
    "len 192 is not divisible by 256",
    "train --job-config sgd.toml": "optimizer.param_groups[0].optimizer_name is 'SGD'",
    "train --job-config muon.toml": "optimizer.param_groups[0].optimizer_name is 'DistMuon'",
    "train TINY --lr_scheduler.warmup_steps -3": "lr_scheduler.warmup_steps is -3; it must be at le",
    "train TINY --dataloader.num_workers -1": "dataloader.num_workers is -1; it must be at least 0",
    "train TINY --training.gc_freq -1": "training.gc_freq is -1; it must be at least 1",
    "train TINY --comm.init_timeout_seconds 0": "comm.init_timeout_seconds is 0; it must be at lea",
    "train TINY --comm.train_timeout_seconds -5": "comm.train_timeout_seconds is -5; it must be at",
    "train TINY --validator.freq 0": "validator.freq is 0; it must be at least 1",
    "train TINY --validator.enable --validator.steps 0": "validation steps must be positive or -1",
    "train TINY --profiler.profile_freq 0": "profiler.profile_freq is 0; it must be at least 1",
    "train TINY --lr_scheduler.decay_ratio 3": "lr_scheduler.decay_ratio is 3.0; it must be from 0",
    "train TINY --lr_scheduler.min_lr_factor -1": "lr_scheduler.min_lr_factor is -1.0; it must be",
    "train TINY --training.seq_len 100000": "exceeds attention RoPE maximum supported sequence length",
    "train TINY --hf_assets_path folder": "hf_assets_path 'folder' holds no tokenizer: none of toke",
    "train TINY --print-config=yes": "--print-config takes no value, not even 'yes'",
    "train --module os": "--module os has no debug job: name a config with --config; there is none",
    "train --job-config none.toml": "--job-config none.toml: there is no such file",
    "train --job-config deepseek_v3/debgu": "no such file, and no job of that name; did you mean 'deep",
    "train --job-config folder": "--job-config folder: cannot be read",
    "train --job-config bad.toml": "--job-config bad.toml: not valid TOML",
    "train --job-config latin1.toml": "--job-config latin1.toml: cannot be read",
    "train --job-config empty.html": "--job-config empty.html names no model",
    "train --job-config comment.toml": "--job-config comment.toml names no model",
    "train --job-config typo.toml": "typo.toml: [training] has no key 'stpes'; did you mean 'steps'?",
}
WRONG_START = {
    "NGPU=two train TINY": "NGPU=two must be a whole number of at least 1",
    "NGPU=0 train TINY": "NGPU=0 must be a whole number of at least 1",
    "NNODES=2 train TINY": "NNODES=2 needs RDZV_ENDPOINT=HOST:PORT",
    "NNODES=2 RDZV_ENDPOINT=localhost:0 train TINY": "RDZV_ENDPOINT=localhost:0 must be HOST:PORT",
    "NNODES=2 RDZV_ENDPOINT=localhost:x train TINY": "RDZV_ENDPOINT=localhost:x must be HOST:PORT",
    "RDZV_ENDPOINT=localhost:70000 train TINY": "RDZV_ENDPOINT=localhost:70000 must be HOST:PORT",
    "RDZV_ENDPOINT=http://localhost:1 train TINY": "must be HOST:PORT, as in node0:29500",
    "NNODES=2 RDZV_ENDPOINT=:29500 train TINY": "RDZV_ENDPOINT=:29500 must be HOST:PORT",
    "NODE_RANK=1 train TINY": "NODE_RANK=1 must be the number of this node, from 0 to 0",
    "NODE_RANK=first train TINY": "NODE_RANK=first must be the number of this node",
    "NNODES=2 NODE_RANK=2 RDZV_ENDPOINT=localhost:1 train TINY": "from 0 to 1 with NNODES=2",
    "LOG_RANK=all train TINY": "LOG_RANK=all must be ranks with commas between them",
    "LOG_RANK=1 train TINY": "LOG_RANK=1: there is no rank 1; the job has 1 process(es)",
    "LOG_RANK=0,4 NGPU=4 train TINY": "LOG_RANK=0,4: there is no rank 4",
    "COMM_MODE=fake train TINY": "COMM_MODE=fake does not exist; did you mean 'fake_backend'?",
    "NGPU=3 train TINY --parallelism.pipeline_parallel_degree 2": "set NGPU=2",
    "NGPU=8 train TINY --parallelism.pipeline_parallel_degree 8": "makes 8 stages of a model of 4 lay",
    "NGPU=4 train TINY --parallelism.pipeline_parallel_degree 4 "
    "--parallelism.pipeline_parallel_schedule Interleaved1F1B": "makes 8 stages of a model of 4 layers",
    "NGPU=3 train TINY --parallelism.expert_parallel_degree 3": "does not divide the 8 experts of lay",
    "NGPU=2 train --module llama4 --parallelism.pipeline_parallel_degree 16": "set NGPU=16",
    "train TINY --dump_folder ''": "dump_folder is empty: name a folder",
    "train TINY --dump_folder notes.txt": "dump_folder notes.txt cannot be written",
    "train TINY --dump_folder notes.txt/out": "notes.txt/out cannot be written (Not a directory)",
    "train TINY --dump_folder /proc/out": "dump_folder /proc/out cannot be written",
    "CXX=/nowhere/g++ train TINY --compile.enable": "compile.enable needs a C++ compiler on the host, "
    "and none is here: install one (apt-get install g++), or name it in CXX",
    "NNODES=2 RDZV_ENDPOINT=[::1 train TINY": "must be HOST:PORT, as in node0:29500 or [::1]:29500",
    "NNODES=2 RDZV_ENDPOINT=::1:29500 train TINY": "must be HOST:PORT, as in node0:29500 or [::1]",
    "NNODES=2 RDZV_ENDPOINT=[::1]:0 train TINY": "RDZV_ENDPOINT=[::1]:0 must be HOST:PORT",
    "RDZV_TIMEOUT=soon train TINY": "RDZV_TIMEOUT=soon must be a whole number of at least 1",
    "NGPU=2 RDZV_ENDPOINT=localhost:HELD train TINY": "the port cannot be opened here (Address alr",
    "NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=localhost:HELD train TINY": "stop what holds it, or take",
    "NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=[::1]:HELD train TINY": "the port cannot be opened here",
    "train TINY --checkpoint.enable --dump_folder unfinished": "unfinished/checkpoint/step-5 has no",
    "NGPU=2 train TINY --checkpoint.enable --checkpoint.create_seed_checkpoint": "needs one process",
    "train TINY --checkpoint.create_seed_checkpoint": "needs checkpoint.enable = true",
    "train TINY --override.imports nope.f": "override.imports nope.f: No module named 'nope'",
    "train TINY --override.imports os.path.nope": "os.path has no 'nope'",
    "train TINY --override.imports nope": "override.imports nope",
    "train TINY --dataloader.dataset_path /nowhere": "dataloader.dataset_path /nowhere: there is no",
    "train TINY --training.local_batch_size 1000000000": "GiB for their ids alone, and this machine",
    "train TINY --checkpoint.enable --checkpoint.initial_load_path /nowhere": "load_path "
    "/nowhere: there is no such folder",
    "train TINY --checkpoint.enable --checkpoint.load_step 7": "has no such step; it has: none",
    "train TINY --checkpoint.enable --checkpoint.initial_load_path HERE/folder": "folder/.metadata is mis",
    "train TINY --checkpoint.enable --checkpoint.initial_load_path HERE/saved/checkpoint/step-5": "has no "
    "tok_embeddings.weight, which has shape",
    "train TINY --checkpoint.enable --dump_folder saved --training.steps 5": "saved/checkpoint/step-5 "
    "has done 5",
    "train TINY --checkpoint.enable --dump_folder saved": "is of another model or flavor",
    "train TINY --checkpoint.enable --dump_folder cut": "cut/checkpoint/step-5/__0_0.distcp is cut",
    "train TINY --checkpoint.enable --checkpoint.initial_load_in_hf "
    "--checkpoint.initial_load_path HERE/folder": "folder' holds no *.safetensors file",
}
REFUSED_BY_TYRO = {
    "": "diagnose",
    "reprot run": "reprot",
    "report": "RUN_DIR",
    "report run --compare": "--compare",
    "report run twin": "twin",
    "report run -x": "-x",
    "report run --ouput page.html": "--output",
    "watch folder --onec": "--once",
    "plan --hardwrae h100": "--hardwrae",
    "plan --hardware h100 --training.steps 3": "--training.steps",
    "plan --hardware h100 --module qwen3": "--module",
    "plan --hardware h100 --ep 1 2 -- TINY": " 2 ",
    "place saved -o new --grops 4": "--groups",
    "doctor now": "now",
    "watch": "RUN_DIR",
    "diagnose": "RUN_DIR",
    "diagnose run --fail-on eror": "--fail-on",
    "watch run --once=yes": "yes",
    "plan": "--hardware",
    "plan --hardware": "--hardware",
    "plan --hardware h100 --ranks two": "--ranks",
    "plan --hardware h100 --network-efficiency half": "--network-efficiency",
    "plan --hardware h100 -- --training.stpes 3": "--training.stpes",
    "place": "CHECKPOINT",
    "place saved": "-o",
    "place saved -o new --ep two": "--ep",
    "place saved -o new --undo=yes": "yes",
    "train TINY --training.stpes 3": "--training.stpes",
    "train TINY -s 3": "-s",
    "train TINY --training.steps ten": "--training.steps",
    "train TINY --training.steps": "--training.steps",
    "train TINY --training.max-norm x": "--training.max-norm",
    "train TINY --training.dtype float31": "--training.dtype",
    "train TINY --compile.enable=maybe": "maybe",
    "train TINY --compile.enable yes": "yes",
    "train TINY extra": "extra",
    "train TINY activation-checkpoint:ful": "activation-checkpoint:ful",
    "train TINY --debug.seed x": "--debug.seed",
    "train TINY --checkpoint.keep_latest_k 1": "checkpoint",
    "train TINY --lr_scheduler.decay_type foo": "--lr-scheduler.decay-type",
    "train TINY --parallelism.pipeline_parallel_microbatch_size 0": "pipeline_parallel_microbatch_size",
    "train TINY --model 3": "--model",
    "train TINY activation-checkpoint:full --activation-checkpoint.preserv_rng_state": "preserv",
}
"""In a box, with the part that is wrong."""
WRONG = WRONG_OUTPUT | WRONG_COMMAND | WRONG_PLAN | WRONG_PLACE | WRONG_JOB | WRONG_START


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A user's folder: runs, jobs, checkpoints, and files that are none of ours."""
    folder = tmp_path_factory.mktemp("scene")
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
        "job.toml": '[job]\nmodule = "deepseek_v3"\nconfig = "deepseek_v3_tiny"\n',
        "device.toml": 'name = "mine"\n',
        "sgd.toml": OPTIMIZER.format("SGD"),
        "muon.toml": OPTIMIZER.format("DistMuon"),
        "bad.toml": "[job\n",
        "comment.toml": "# [job]\n",
        "typo.toml": "[training]\nstpes = 3\n",
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
    """Every file and what would change if it were written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        times = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
        found[str(path)] = (status.st_mode, status.st_ino, *times)
    return found


def type_in(line: str, monkeypatch) -> None:
    """Run what a user typed: variables, command, arguments."""
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    line = line.replace("TINY", "--config deepseek_v3_tiny").replace("HERE", os.getcwd())
    line = line.replace("HELD", str(HELD.getsockname()[1]))
    words = shlex.split(line)
    while words and words[0].partition("=")[0].isupper():
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[:1] == ["train"]:
        launch.main(words[1:])
    else:
        cli.main(words)


def no_start(*_arguments, **_more) -> None:
    raise AssertionError("the job was started or built")


@pytest.fixture
def refuse(scene, monkeypatch, capsys):
    """What is said of a command line that is refused before anything starts or is written."""

    def refused(line: str) -> str:
        monkeypatch.chdir(scene)
        monkeypatch.setattr(launch, "_run_here", no_start)
        monkeypatch.setattr(processes, "run", no_start)
        for build in (read_job, read_served):  # minutes for a large model
            monkeypatch.setattr(build, build.__name__.rpartition(".")[2], no_start)
        before = state(scene)
        with pytest.raises(SystemExit) as stop:
            type_in(line, monkeypatch)
        assert stop.value.code == 2
        assert state(scene) == before
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize("line", WRONG)
def test_one_line_and_nothing_touched(line, refuse):
    said = refuse(line)
    assert said.count("\n") == 1, said
    assert said.startswith("titan_moe_lb: error: ") and WRONG[line] in said
    for internal in ("model_spec", "imbalance_factor", "num_hot_experts", "Traceback"):
        assert internal not in said


@pytest.mark.parametrize("line", REFUSED_BY_TYRO)
def test_tyro_names_what_is_wrong(line, refuse):
    said = refuse(line)
    assert REFUSED_BY_TYRO[line] in said and "Traceback" not in said


@pytest.mark.parametrize("module", ["deepseek_v3", "gpt_oss", "llama4", "qwen3"])
def test_the_other_name_of_a_key_is_one_that_a_job_has(module):
    config = job_config.load(["--module", module]).config
    for key in renamed_keys.RENAMED.values():
        found: Any = config
        for name in key.partition(",")[0].split("."):
            if name == "model":  # whose keys are the arguments of the registry entry
                found = job_config.model_keys(job_config.balanced)
                continue
            found = found[int(name)] if name.isdecimal() else _part(found, name)


def _part(found: Any, name: str) -> Any:
    return found[name] if isinstance(found, dict) else getattr(found, name)


def test_our_own_page_is_replaced_also_through_a_symlink(tmp_path):
    run = write_run(tmp_path / "run", run_info(), 2)
    (tmp_path / "link.html").symlink_to("page.html")
    for _again in range(2):
        cli.main(["report", str(run), "-o", str(tmp_path / "link.html")])
        assert (tmp_path / "link.html").is_symlink()
        assert output_file.MARK in (tmp_path / "page.html").read_text()[:1024]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "page.html", "run"]


def test_a_write_that_fails_leaves_the_earlier_page(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    output_file.write(output_file.MARK, page)

    def fail(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(JobError, match="page.html cannot be written .No space left on device"):
        output_file.write(output_file.MARK + "more", page)
    assert page.read_text() == output_file.MARK
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("2 nodes at x", "2 nodes at y")])
def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_work(first, second, tmp_path):
    """The lock is that of an open file: a second opening is like a second process."""
    folder = str(tmp_path / "out")
    run_folder.claim(folder, first)
    run_folder.claim(folder, first)  # another node of it
    with pytest.raises(JobError, match="out is that of a run at work: .*--dump_folder"):
        run_folder.claim(folder, second)
    run_folder.claim(folder, first)


def test_a_folder_is_free_when_the_run_has_ended(tmp_path):
    process = os.fork()
    if not process:
        run_folder.claim(str(tmp_path), "earlier")
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    run_folder.claim(str(tmp_path), "later")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('[job]\nconfig = "deepseek_v3_tiny"\n', encoding="utf-8-sig")
    assert job_config.draft(["--job-config", str(file)]).table.config == "deepseek_v3_tiny"
