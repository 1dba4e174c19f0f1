"""``titan-moe-lb``: train, plan, and look at a run.

Subcommands are listed here; each lives in a module of its own that is imported when
it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from titan_moe_lb import host_threads
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.job.own_flags import OWN_FLAGS
from titan_moe_lb.run import parent_process


def _optional(metavar: str, *aliases: str) -> Any:
    """A flag that may be left out, without None in its help."""
    return tyro.conf.arg(metavar=metavar, aliases=aliases, help_behavior_hint="")


RunDir = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a job, as run_train.sh does."""

    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """Flags of the job; train --help shows them."""

    def run(self) -> None:
        if self.flags in (("--help",), ("-h",)):
            print(f"usage: titan-moe-lb train [FLAGS]\n\n{OWN_FLAGS}")
            print("Every flag, those of torchtitan too: titan-moe-lb train --module NAME --help")
            return
        parent_process.end_with_launcher()  # that of a cell is its study
        # The imports take seconds: Ctrl-C ends them without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        host_threads.wait_without_spinning()
        from titan_moe_lb.run import launch

        launch.command(list(self.flags))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run: load of every expert, overload, losses."""

    run_dir: RunDir
    """Folder of the run, or its moe_load.arrow."""
    compare: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], _optional("RUN_DIR")] = ()
    """Another run of the same model, shown beside the first; give it once for each."""
    output: Annotated[Path | None, _optional("FILE", "-o")] = None
    """File to write; default: report.html in the run's folder, compare.html for several."""

    def run(self) -> None:
        from titan_moe_lb.commands.report.command import write_report

        print(write_report(self.run_dir, compare=self.compare, output=self.output))


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Follow a live run in the terminal."""

    run_dir: RunDir
    """Folder of the run, or its moe_load.arrow; it may not exist yet."""
    once: bool = False
    """Print one frame and exit, as when the output is not a terminal."""

    def run(self) -> None:
        from titan_moe_lb.commands.watch.command import watch

        watch(self.run_dir, once=self.once)


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say what is wrong with the balance of a run, and what to change."""

    run_dir: RunDir
    """Folder of the run, or its moe_load.arrow."""
    json: bool = False
    """Print an object instead of sentences."""
    fail_on: Literal["never", "note", "warning", "fault"] = "never"
    """Status 1 where something at least as bad is found, or the run is too short to say."""

    def run(self) -> None:
        from titan_moe_lb.commands.diagnose.command import diagnose

        status = diagnose(self.run_dir, as_json=self.json, fail_on=self.fail_on)
        if status:
            raise SystemExit(status)


@dataclass(frozen=True, kw_only=True)
class Plan(PlanArguments):
    """Plan a job before it runs: what imbalance costs in time and memory, by EP degree."""

    def run(self) -> None:
        from titan_moe_lb.commands.plan.command import run

        run(self)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Write a checkpoint with its experts in the order that balances the ranks."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A distributed or Hugging Face checkpoint, or a run, whose newest step is taken."""
    output: Annotated[Path, tyro.conf.arg(metavar="NEW", aliases=["-o"])]
    """Folder to make, of the same kind; or a .json file for the placement alone."""
    ep: Annotated[int | None, _optional("INT")] = None
    """Expert-parallel degree to balance for."""
    from_run: Annotated[Path | None, _optional("RUN_DIR")] = None
    """Run whose loads are balanced; default: that of the checkpoint."""
    groups: Annotated[str | None, _optional("INT[,INT]")] = None
    """How many groups of experts stay together, 1 for none; default: as the run says."""
    placement: Annotated[Path | None, _optional("FILE")] = None
    """A placement.json, instead of one from the loads of a run."""
    undo: bool = False
    """Put the experts back where they were."""

    def run(self) -> None:
        from titan_moe_lb.commands.place.command import place

        for line in place(
            self.checkpoint,
            output=self.output,
            from_run=self.from_run,
            ep=self.ep,
            groups=self.groups,
            file=self.placement,
            undo=self.undo,
        ):
            print(line)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Run a job under many settings, and show what each costs and brings."""

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY.toml")]
    """The job and its axes; docs/studies.md describes the file."""
    output: Annotated[Path | None, _optional("FOLDER", "-o")] = None
    """Where the runs and the page go; default: outputs/ and the name of the file."""
    processes: Annotated[int | None, _optional("NUMBER")] = None
    """Runs at once; default: as the file says."""
    retry_failed: bool = False
    """Run again what failed or diverged."""

    def run(self) -> None:
        from titan_moe_lb.commands.study.command import run_study

        run_study(
            self.study,
            output=self.output,
            processes=self.processes,
            retry_failed=self.retry_failed,
        )


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what is here, how a job would run on it, and what is missing."""

    def run(self) -> None:
        from titan_moe_lb.commands import doctor

        doctor.main()


SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "plan": Plan,
    "place": Place,
    "watch": Watch,
    "report": Report,
    "diagnose": Diagnose,
    "study": Study,
    "doctor": Doctor,
}


def _command(arguments: list[str]) -> Any:
    if arguments[:1] == ["train"]:  # whose flags are those of its job
        return Train(flags=tuple(arguments[1:]))
    ours = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    if arguments and arguments[0] in SUBCOMMANDS:
        _check_flags(SUBCOMMANDS[arguments[0]], ours)
    command = tyro.extras.subcommand_cli_from_dict(
        SUBCOMMANDS,
        prog="titan-moe-lb",
        description="Train with balanced experts, plan a job, look at a run.",
        args=arguments,
    )
    if isinstance(command, Plan) and list(command.job_flags) != arguments[len(ours) + 1 :]:
        raise JobError(
            f"{command.job_flags[0]!r} is not expected here: a list is written with commas, as in "
            "--ep 16,32, and the flags of a job come last, after --"
        )
    return command


def _check_flags(command: Any, arguments: list[str]) -> None:
    """Name an unknown flag: tyro reports a missing argument instead where one is missing too."""
    fields = dataclasses.fields(command)
    names = [field.name.replace("_", "-") for field in fields]
    names += [f"no-{field.name}" for field in fields if isinstance(field.default, bool)]
    valid = [f"--{name}" for name in (*names, "help")]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if not flag.startswith("--") or flag.replace("_", "-") in valid:
            continue
        if command is Plan and (flag in ("--module", "--config") or "." in flag):
            raise JobError(
                f"the flags of a job come last, after --, as in: plan --hardware h100 -- {flag} ..."
            )
        raise JobError(f"there is no flag {flag}; {nearest(flag, valid)}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the program. A mistake of the user is one line and status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _command(arguments).run()
    except JobError as error:
        print(f"titan_moe_lb: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output, as in "| head", has what it wants
        sys.stderr.close()


if __name__ == "__main__":
    main()
