"""``titan-moe-lb``: what to do with a run once it has left a trace.

Subcommands are listed here; each lives in a module of its own that is imported when
it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from titan_moe_lb.errors import JobError


def _optional(metavar: str, *aliases: str) -> Any:
    """A flag that may be left out, without None in its help."""
    return tyro.conf.arg(metavar=metavar, aliases=aliases, help_behavior_hint="")


RunDir = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run: load of every expert, overload, losses."""

    run_dir: RunDir
    """Folder of the run, or its moe_load.arrow."""
    compare: Annotated[Path | None, _optional("RUN_DIR")] = None
    """A second run of the same model, shown beside the first."""
    output: Annotated[Path | None, _optional("FILE", "-o")] = None
    """File to write; default: report.html in the run's folder."""

    def run(self) -> None:
        from titan_moe_lb.report.command import write_report

        print(write_report(self.run_dir, compare=self.compare, output=self.output))


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Follow a live run in the terminal."""

    run_dir: RunDir
    """Folder of the run, or its moe_load.arrow; it may not exist yet."""
    once: bool = False
    """Print one frame and exit, as when the output is not a terminal."""

    def run(self) -> None:
        from titan_moe_lb.watch.command import watch

        watch(self.run_dir, once=self.once)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan a job before it runs: what imbalance costs in time and memory, by EP degree."""

    hardware: str
    """h100, h200, b200, gb200_nvl72, mi300x, tpu_v5p, host (measured), or a TOML file."""
    job_config: str | None = None
    """The job's TOML file, as for run_train.sh; without it, the default debug job."""
    job_flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """Other flags of the job, after --, as in: -- --training.local_batch_size 4"""
    ranks: int | None = None
    """Ranks of the job; default: NGPU, else the [job] ranks of its file, else 1."""
    imbalance: str = "1.0,1.5,2.0,worst"
    """Load of the most loaded expert over the mean, each in [1, E/K]; worst is E/K."""
    hot_experts: int = 1
    """How many experts are that loaded, at most top_k; the others share the rest evenly."""
    ep: str | None = None
    """Expert-parallel degrees, as in 8,16,32; default: the job's own and those near it."""
    from_run: Path | None = None
    """Folder of a run of the same model: plan with its measured load too."""
    compute_efficiency: float = 0.5
    """Share of the peak FLOP/s that matrix products reach."""
    network_efficiency: float = 0.8
    """Share of the link bandwidth that an all-to-all reaches."""
    json: bool = False
    """Print JSON instead of a table."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write an HTML page with plots to this file too."""

    def run(self) -> None:
        from titan_moe_lb.plan.command import run

        run(self)


SUBCOMMANDS: dict[str, Callable[..., Any]] = {"report": Report, "watch": Watch, "plan": Plan}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the program. A mistake of the user is one line and status 2."""
    command = tyro.extras.subcommand_cli_from_dict(
        SUBCOMMANDS,
        prog="titan-moe-lb",
        description="Reports, live view and planning from the trace of a run.",
        args=arguments,
    )
    try:
        command.run()
    except JobError as error:
        print(f"titan_moe_lb: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output, as in "| head", has what it wants
        sys.stderr.close()


if __name__ == "__main__":
    main()
