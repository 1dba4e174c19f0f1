"""Check a job, then start its processes: ``titan-moe-lb train``, which ``run_train.sh`` calls.

Environment variables, the first five as in torchtitan's own script:

    NGPU: processes on this node.
    MODULE, CONFIG: defaults of ``--module`` and ``--config``.
    LOG_RANK: ranks to show; default: the rank that knows the loss.
    COMM_MODE: dry run in one process.
    NNODES, NODE_RANK, RDZV_ENDPOINT, RDZV_ID, RDZV_TIMEOUT (seconds): several nodes.
"""

from __future__ import annotations

import logging
import os
import sys

import torch

from titan_moe_lb import rules
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import catalog, job_config, model_help, own_flags
from titan_moe_lb.parallel import single_process
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.run import environment, rank_processes, train
from titan_moe_lb.terminal import run_folder
from titan_moe_lb.upstream import cpu


def main(arguments: list[str] | None = None) -> None:
    """Run the job, or print what ``--list``, ``--help`` or ``--print-config`` shows."""
    arguments = _with_environment(sys.argv[1:] if arguments is None else arguments)
    try:
        flags = own_flags.parse_command_line(arguments)
        if flags.list_models:
            catalog.show()
            return
        environment.check_mode()
        # Drop torchtitan's warnings about a config: it repeats them when it builds the model.
        logging.root.addHandler(logging.NullHandler())
        draft = job_config.draft(flags)
        if {"-h", "--help"} & set(flags.rest):
            model_help.show(draft.table.module)
        nodes = environment.positive("NNODES", 1)
        environment.check_nodes(nodes)
        run = environment.run_name()
        _check_restarts(draft.table, nodes)
        starts = not (flags.print_config or os.environ.get("COMM_MODE"))
        here = _processes_on_this_node(draft.table, nodes, starts=starts)
        environment.check_shown_ranks(here * nodes)
        job = draft.resolve(here * nodes)
        if not flags.print_config and job.config.comm.mode == "default":
            rules.validate_here(job)
            if nodes == 1:
                run_folder.claim(job.config.dump_folder, run)
            else:  # claimed once the nodes have met
                run_folder.check_free(job.config.dump_folder)
    except JobError as error:
        train.exit_with(error)
    if flags.print_config:
        print(job_config.render(draft.table, job.config), end="")
    elif (
        job.config.comm.mode in ("fake_backend", "local_tensor")
        or here * nodes == 1
        and not draft.table.max_restarts
    ):
        _run_here(job)
    else:
        rank_processes.run(job, arguments, run, here, nodes, draft.table.max_restarts)


def _with_environment(arguments: list[str]) -> list[str]:
    """Add the flags that MODULE, CONFIG and COMM_MODE stand for.

    The user's own flags and ``--job-config`` take precedence over MODULE and CONFIG.
    """
    named = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    added = []
    if "--job-config" not in named:
        for variable, flag in (("MODULE", "--module"), ("CONFIG", "--config")):
            if flag not in named and os.environ.get(variable):
                added += [flag, os.environ[variable]]
    mode = os.environ.get("COMM_MODE")
    dry_run = [f"--comm.mode={mode}", "--training.steps=1"] if mode else []
    # torchtitan's subcommands, such as activation-checkpoint:full, take no flags behind them.
    return [*added, *dry_run, *arguments]


def _check_restarts(table: job_config.JobTable, nodes: int) -> None:
    if table.max_restarts and nodes > 1:
        raise JobError(
            f"max_restarts is {table.max_restarts}, and NNODES={nodes}: only processes of one node "
            "are started again here; let the scheduler start every node again (sbatch --requeue), "
            "which goes on from the last checkpoint too"
        )


def _processes_on_this_node(table: job_config.JobTable, nodes: int, *, starts: bool) -> int:
    """Return NGPU; else the job's ``ranks`` per node; else the number of GPUs; else 1.

    If the processes start, this machine must be able to hold them.
    """
    devices = 0 if cpu.needed() else torch.accelerator.device_count()
    if os.environ.get("NGPU"):
        here = environment.positive("NGPU", 1)
        if starts and devices and here > devices:
            raise JobError(f"NGPU={here} but this node has {devices} GPU(s): set NGPU={devices}")
        return here
    if table.ranks is None:
        return devices or 1
    if table.ranks % nodes:
        raise JobError(f"[job] ranks {table.ranks} do not divide over NNODES={nodes}")
    here = table.ranks // nodes
    if starts and here > (devices or max(os.cpu_count() or 1, 8)):
        raise JobError(
            f"[job] ranks is {table.ranks}, which starts {here} processes on this node: set NNODES and "
            f"NGPU for the cluster, or COMM_MODE=fake_backend NGPU={table.ranks} to build one "
            "rank of it here"
        )
    return here


def _run_here(job: Job) -> None:
    """Run the job in this process: a single rank and a dry run need no launcher."""
    is_dry_run = job.config.comm.mode != "default"
    single_process.announce(world_size=job.layout.world_size if is_dry_run else None)
    train.run(job, alone=True)


def command(arguments: list[str] | None = None) -> None:
    """Run :func:`main`, then end the process as a program."""
    main(arguments)
    if cpu.needed():
        cpu.leave()
