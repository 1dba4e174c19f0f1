"""``titan-moe-lb``: train, plan, and look at a run.

Each subcommand is a function. It imports its module when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from titan_moe_lb import host_threads
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.errors import JobError
from titan_moe_lb.job.own_flags import OWN_FLAGS
from titan_moe_lb.run import parent_process
from titan_moe_lb.terminal.optional_flag import Switch, optional_flag
from titan_moe_lb.version import __version__

DESCRIPTION = """\
Balance the experts of MoE models in torchtitan, and see what imbalance costs.
  titan-moe-lb train --module deepseek_v3      train a small model on this machine
  titan-moe-lb check --job-config my_job.toml  test that its losses and biases act
  titan-moe-lb report outputs                  write an HTML page about that run
  titan-moe-lb diagnose outputs                find what to change
  titan-moe-lb plan --hardware h100            predict what imbalance costs

Help of a command: titan-moe-lb COMMAND --help; version: titan-moe-lb --version
"""
TRAIN_EXAMPLES = """\
Train a job on the GPUs of this machine, or on its CPU if it has none.

  titan-moe-lb train --module qwen3
  titan-moe-lb train --job-config deepseek_v3/fsdp2_ep2 --training.steps 20
  titan-moe-lb train --job-config my_job.toml --print-config
"""
CHECK_EXAMPLES = """\
Run some forwards and backwards of a job in one process, and test that every aux loss reaches its
gates, and that every expert bias moves and changes the choice. Status 1 if one does not.

  titan-moe-lb check --module qwen3
  titan-moe-lb check --job-config my_job.toml --config deepseek_v3_tiny
"""
RunDir = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
RunDirs = Annotated[
    tyro.conf.Positional[tuple[Path, ...]],
    tyro.conf.arg(metavar="RUN_DIR", help_behavior_hint="(one or more)"),
]


def train(flags: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Train a job on GPUs or on a CPU.

    Args:
        flags: Flags of the job; train --help shows them.
    """
    if flags in (("--help",), ("-h",)):
        print(f"usage: titan-moe-lb train [FLAGS]\n\n{TRAIN_EXAMPLES}\n{OWN_FLAGS}")
        print("All flags, with those of torchtitan: titan-moe-lb train --module NAME --help")
        return
    parent_process.end_with_launcher()  # if a study has started this process
    # The imports take seconds: Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    host_threads.wait_without_spinning()
    # Imports leave no garbage. To look for it takes a sixth of their time.
    gc.disable()
    try:
        from titan_moe_lb.run import launch
    finally:
        gc.enable()
    launch.command(list(flags))


def check(flags: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Test that every loss of a job reaches its gates, and that its biases act.

    Args:
        flags: Flags of the job, as for train.
    """
    if flags in (("--help",), ("-h",)):
        print(f"usage: titan-moe-lb check [FLAGS]\n\n{CHECK_EXAMPLES}\n{OWN_FLAGS}")
        return
    from titan_moe_lb.commands.check import command

    command.run(list(flags))


def report(
    run_dirs: RunDirs,
    output: Annotated[Path | None, optional_flag("FILE", "-o")] = None,
) -> None:
    """Write an HTML page about a run, or about several runs that it compares.

    Args:
        run_dirs: Runs, folders of runs, or quoted patterns as 'runs/*'.
        output: Page to write; default: report.html in the run's folder, compare.html for several.
    """
    from titan_moe_lb.commands.report.command import write_report

    _exit(write_report(run_dirs, output=output))


def watch(run_dir: RunDir, once: Switch = False) -> None:
    """Follow a run live in the terminal.

    Args:
        run_dir: Folder of the run, or its moe_load.arrow; it may not exist yet.
        once: Print one frame and exit; the default if the output is not a terminal.
    """
    from titan_moe_lb.commands.watch import command

    command.watch(run_dir, once=once)


def diagnose(
    run_dirs: RunDirs,
    json: Switch = False,
    fail_on: Literal["never", "note", "warning", "fault"] = "never",
) -> None:
    """Find what is wrong with the balance of a run, and the line of the job to change.

    Args:
        run_dirs: Runs, folders of runs, or quoted patterns as 'runs/*'. Several make a table.
        json: Print a JSON object instead of sentences.
        fail_on: Exit with status 1 if a finding is at least this severe, or the run is too short.
    """
    from titan_moe_lb.commands.diagnose import command

    _exit(command.diagnose(run_dirs, as_json=json, fail_on=fail_on))


def plan(
    arguments: Annotated[tyro.conf.OmitArgPrefixes[PlanArguments], tyro.conf.arg(name="")],
) -> None:
    """Predict step time and memory of a job under imbalance, by EP degree."""
    from titan_moe_lb.commands.plan import command

    command.run(arguments)


def place(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")],
    output: Annotated[Path, tyro.conf.arg(metavar="NEW", aliases=["-o"])],
    ep: Annotated[int | None, optional_flag("INT")] = None,
    from_run: Annotated[Path | None, optional_flag("RUN_DIR")] = None,
    groups: Annotated[str | None, optional_flag("INT[,INT]")] = None,
    placement: Annotated[Path | None, optional_flag("FILE")] = None,
    undo: Switch = False,
) -> None:
    """Reorder the experts of a checkpoint, so that EP ranks have even loads.

    Args:
        checkpoint: A distributed or Hugging Face checkpoint, or a run, for its newest step.
        output: New folder, of the same kind; or a .json file, to write only the placement.
        ep: Expert-parallel degree to balance for.
        from_run: Run with the loads to balance; default: the run of the checkpoint.
        groups: Numbers of expert groups that stay together, 1 for none; default: from the run.
        placement: A placement.json to apply, instead of one from the loads of a run.
        undo: Restore the order before the last placement.
    """
    from titan_moe_lb.commands.place import command

    for line in command.place(
        checkpoint,
        output=output,
        from_run=from_run,
        ep=ep,
        groups=groups,
        file=placement,
        undo=undo,
    ):
        print(line)


def study(
    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY.toml")],
    output: Annotated[Path | None, optional_flag("FOLDER", "-o")] = None,
    processes: Annotated[int | None, optional_flag("NUMBER")] = None,
    retry_failed: Switch = False,
) -> None:
    """Run a job under many settings, and compare their loss and balance.

    Args:
        study: File with the job and its axes (docs/howto/compare_settings.md).
        output: Folder of the runs and the page; default: outputs/ and the name of the file.
        processes: Number of runs at once; default: from the file.
        retry_failed: Repeat the runs that failed or diverged.
    """
    from titan_moe_lb.commands.study import command

    command.run_study(study, output=output, processes=processes, retry_failed=retry_failed)


def import_loads(
    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(one or more)"),
    ],
    output: Annotated[Path, tyro.conf.arg(metavar="RUN_DIR", aliases=["-o"])],
    top_k: Annotated[int | None, optional_flag("INT")] = None,
    num_experts: Annotated[int | None, optional_flag("INT")] = None,
    ep: Annotated[int | None, optional_flag("INT")] = None,
    micro_batches: Annotated[int | None, optional_flag("INT")] = None,
    model: Annotated[str | None, optional_flag("NAME")] = None,
    drops_tokens: Switch = False,
) -> None:
    """Make a run of the tokens per expert that another framework logged.

    Args:
        files: CSV, TSV, JSON lines, Parquet or numpy, in the order of their steps.
        output: Folder of the new run, for report, diagnose and plan --from-run.
        top_k: Experts that a token chooses. The counts do not tell it.
        num_experts: Experts of a layer; default: as many as the first step has.
        ep: Expert-parallel degree of the run; default: 1.
        micro_batches: Forwards of a step over all ranks; default: 1.
        model: Name of the model; default: name of the first file.
        drops_tokens: The counts leave out tokens over a capacity.
    """
    from titan_moe_lb.commands.import_loads import command

    for line in command.import_loads(
        files,
        output=output,
        top_k=top_k,
        num_experts=num_experts,
        ep=ep,
        micro_batches=micro_batches,
        model=model,
        drops_tokens=drops_tokens,
    ):
        print(line)


def doctor() -> None:
    """Check this machine: packages, devices, and what a job would lack."""
    from titan_moe_lb.commands import doctor

    doctor.main()


def _exit(status: int) -> None:
    if status:
        raise SystemExit(status)


SUBCOMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (train, check, report, watch, diagnose, plan, place, study, doctor)
} | {"import": import_loads}


def _refuse_job_flags(arguments: list[str]) -> None:
    """Refuse flags of the job in front of the ``--`` of a plan, which tyro does not know."""
    for word in arguments[: (*arguments, "--").index("--")]:
        name = word.partition("=")[0]
        if name.startswith("--") and ("." in name or name in ("--module", "--config")):
            raise JobError(
                f"{name} is a flag of the job: give it after --, as in titan-moe-lb plan --hardware "
                f"h100 -- {name} VALUE"
            )


def _run(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print(f"titan-moe-lb {__version__}")
        return
    with_flags_of_job = {"train": train, "check": check}  # which tyro does not know
    if arguments and arguments[0] in with_flags_of_job:
        with_flags_of_job[arguments[0]](tuple(arguments[1:]))
        return
    _refuse_empty(arguments)
    if arguments[:1] == ["plan"]:
        _refuse_job_flags(arguments)
    tyro.extras.subcommand_cli_from_dict(
        SUBCOMMANDS,
        prog="titan-moe-lb",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )


def _refuse_empty(arguments: list[str]) -> None:
    """Refuse empty words, as of a shell variable that is not set, before the flags of a job."""
    before = ""
    for word in arguments:
        if word == "--":
            return
        flag, is_set, value = word.partition("=")
        if not word or flag.startswith("--") and is_set and not value:
            name = flag or (
                before
                if before.startswith("-")
                else f"an argument of {arguments[0] or 'titan-moe-lb'}"
            )
            raise JobError(f"{name} is empty: give it a value, or leave it out")
        before = word


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise JobError("the working directory was removed: cd to one that exists") from None


def main(arguments: list[str] | None = None) -> None:
    """Run the program; print a user's mistake in one line and exit with status 2."""
    try:
        # Of a user's modules, as in the ranks, which python -m starts.
        if (folder := _working_folder()) not in sys.path:
            sys.path.append(folder)
        _run(sys.argv[1:] if arguments is None else arguments)
    except JobError as error:
        print(f"titan_moe_lb: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output has ended, as in "| head"
        sys.stderr.close()


if __name__ == "__main__":
    main()
