"""Tests of several nodes: two network namespaces, a lost node, and SLURM's variables."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.support.job_processes import TINY, fork, last_step, read_to, until
from tests.support.network_namespaces import two_machines
from titan_moe_lb.run import environment
from titan_moe_lb.run.console import peers
from titan_moe_lb.run.console.cause import Cause
from titan_moe_lb.run.console.peers import Peers

SLURM_SCRIPT = Path(__file__).parents[2] / "scripts/slurm.sh"


def test_two_machines_train_and_one_is_lost(tmp_path):
    """Killing its launcher is all that is left to do: its rank ends with it.

    That node has the store of the run, and the other node shows the steps.
    """
    flags = [*TINY, "--training.steps=100000", "--parallelism.pipeline_parallel_degree=2"]
    with two_machines() as machines:
        endpoint = f"{machines[0].address}:29500"
        gone, left = (
            fork(
                tmp_path / str(node),
                *flags,
                network=machine.name,
                NNODES="2",
                NODE_RANK=str(node),
                NGPU="1",
                RDZV_ENDPOINT=endpoint,
                RDZV_ID="of both folders",
            )
            for node, machine in enumerate(machines)
        )
        steps = read_to(left, "step:  3  loss: ")
        assert sum("step:" in line for line in steps) == 3
        gone.kill()
        assert machines[0].is_idle()
        _out, err = left.communicate(timeout=60)
        assert left.returncode == 1 and err.count("\n") == 1, err
        assert "node 0" in err and "rank 0" in err and last_step(err)
        assert machines[1].is_idle()
        assert gone.communicate(timeout=60)[1] == ""


@pytest.fixture
def fast(monkeypatch):
    quick = {"_BEAT": 0.05, "_SILENCE": 1.0, "_SUSPICION": 0.5, "_GRACE": 0.1}
    for name, seconds in quick.items():
        monkeypatch.setattr(peers, name, seconds)


def process(node: int, store: TCPStore) -> dict[str, str]:
    """Variables of the first process of a node."""
    return {
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": "3",
        "RANK": str(2 * node),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
    }


@contextlib.contextmanager
def three_nodes():
    """Launchers without processes, with the losses of each so far."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    losses: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    with contextlib.ExitStack() as stack:
        nodes = []
        for node, lost in losses.items():
            nodes.append(stack.enter_context(Peers(lambda lost=lost: lost.append(True))))
            assert nodes[-1].meet(process(node, store), f"launcher {node}") == "launcher 0"
        until(lambda: all(node._exchanged for node in nodes))
        yield nodes, losses


def test_all_others_learn_why_a_node_has_ended(fast):
    with three_nodes() as (nodes, losses):
        nodes[1].tell(Cause(line="rank 3: a bug", status=1, has_traceback=True))
        until(lambda: losses[0] and losses[2])
        for other in (0, 2):
            loss = nodes[other].loss
            assert loss is not None and (loss.status, loss.has_traceback) == (1, False)
            for text in ("node 1", "rank 2", socket.gethostname(), "rank 3: a bug"):
                assert text in loss.line
            assert nodes[other].blame() == loss and losses[other] == [True]
        assert losses[1] == []


def test_a_silent_node_is_named_by_the_first_one_and_nobody_else_suspects_it(fast):
    with three_nodes() as (nodes, losses):
        assert nodes[0].blame() is None  # all are well
        nodes[2].__exit__()
        until(lambda: losses[0])
        assert "node 2 (from rank 4, " in nodes[0].loss.line
        assert losses[1] == []
        nodes[0].tell(nodes[0].loss)
        until(lambda: losses[1])
        assert "node 2 (from rank 4, " in nodes[1].loss.line


def test_gloo_takes_the_network_of_the_endpoint(monkeypatch):
    monkeypatch.setenv("RDZV_ENDPOINT", "127.0.0.1:29500")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    environment.choose_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    environment.choose_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == socket.if_indextoname(1)  # the loopback


def slurm(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the script as sbatch does, with substitutes for scontrol and srun, for two nodes in
    turn."""
    programs = folder / "programs"
    programs.mkdir()
    scontrol = '[ "$*" = "show hostnames n[07-08]" ] && printf "n07\\nn08\\n"'
    srun = 'for node in 0 1; do SLURM_NODEID=$node "$@"; done'
    for name, text in {"scontrol": scontrol, "srun": srun}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    variables = {
        "SLURM_JOB_NODELIST": "n[07-08]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "4321",
    }
    return subprocess.run(
        [str(SLURM_SCRIPT), *arguments],
        cwd=folder,
        env={"PATH": f"{programs}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_slurm_script_starts_each_node_with_its_number(tmp_path):
    train = tmp_path / "run_train.sh"
    train.write_text('#!/bin/sh\necho $NNODES $NODE_RANK $RDZV_ENDPOINT "$@"\n')
    train.chmod(0o755)
    done = slurm(tmp_path, "--job-config", "a job.toml")
    assert done.stdout.splitlines() == [
        "2 0 n07:29821 --job-config a job.toml",
        "2 1 n07:29821 --job-config a job.toml",
    ]
    assert done.returncode == 0 and done.stderr == ""


def test_slurm_script_is_refused_outside_of_its_folder(tmp_path):
    done = slurm(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "run_train.sh" in done.stderr
