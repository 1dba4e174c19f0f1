"""``titan-moe-lb study``: run the cells, then write and print the answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from titan_moe_lb.commands.answer import page, plain_data, terminal
from titan_moe_lb.commands.study import results
from titan_moe_lb.commands.study.answer import answer
from titan_moe_lb.commands.study.cell import CELLS, Cell, CellFolder, Record
from titan_moe_lb.commands.study.design import SEED, Prediction, Study, read_study
from titan_moe_lb.commands.study.progress import Display
from titan_moe_lb.commands.study.run import Runner, stop_leftovers
from titan_moe_lb.commands.study.search import Grid, Search
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.terminal import run_folder
from titan_moe_lb.terminal.heartbeat import Heartbeat

PAGE, NUMBERS = "study.html", "study.json"


def run_study(
    path: Path,
    *,
    output: Path | None = None,
    processes: int | None = None,
    retry_failed: bool = False,
) -> None:
    """Run the cells of a study that have no result yet, and write its page and numbers.

    The arguments are those of ``titan-moe-lb study``.

    Raises:
        JobError: the file, a job or the folder is wrong. Ended cells are kept.
    """
    study = read_study(path)
    folder = (output or Path("outputs") / path.stem).absolute()
    if processes is not None and processes < 1:
        raise JobError(f"--processes {processes} must be at least 1")
    run_folder.claim(str(folder), f"study {os.getpid()}", name="output", kind="study")
    stop_leftovers(folder / CELLS)
    output_file.check(folder / PAGE)
    found: list[CellFolder] = []
    search = Grid(study) if study.settings.sampler == "grid" else Search(study)
    check_jobs([cell for cell in search.known_cells if CellFolder(folder, cell).record() is None])
    if study.plan is not None:
        check_prediction(study.plan)
    with contextlib.closing(Display(search.total)) as display:

        def open_cells() -> Iterator[CellFolder]:
            for cell in search.cells():
                at = CellFolder(folder, cell)
                found.append(at)
                record = at.record()
                if record is None or (retry_failed and record.status != "done"):
                    if not search.known_cells:
                        check_jobs([cell])
                    yield at
                else:
                    display.known()
                    search.tell(at, record)

        def ended(at: CellFolder, record: Record) -> None:
            display.ended(at, record)
            search.tell(at, record)

        Runner(processes or study.settings.processes, study.settings.threads).run(
            open_cells(), began=display.began, ended=ended
        )
    _conclude(study, folder, found)


def _conclude(study: Study, folder: Path, folders: list[CellFolder]) -> None:
    cells = results.read_results(study, folders)
    if study.plan is not None:
        from titan_moe_lb.commands.study.predict import add_prediction

        add_prediction(study.plan, cells)
    found = answer(study, results.by_model(study, cells), folder.name)
    try:
        (folder / NUMBERS).write_text(plain_data.as_json(found, indent=1) + "\n")
    except OSError as error:
        raise JobError(f"{folder} cannot be written ({error.strerror}): make room") from None
    output_file.write(page.render(found), folder / PAGE)
    terminal.print_answer(found)
    print(f"{folder / PAGE}\n{folder / NUMBERS}")


def check_jobs(cells: list[Cell]) -> None:
    """Resolve the job of every setting once, so that a wrong key fails before any run starts.

    Raises:
        JobError: a job is invalid; the message names its cell.
    """
    from titan_moe_lb.commands.plan.building import silent_build

    settings = {
        tuple(word for word in cell.flags if not word.startswith(f"--{SEED}=")): cell
        for cell in cells
    }
    if not settings:
        return
    with silent_build(), Heartbeat(print, lambda seconds: f"reading the jobs: {seconds} s so far"):
        for cell in settings.values():
            _check_job(cell.flags, cell.ranks, f"cell {cell.name}")


def check_prediction(plan: Prediction) -> None:
    """Check a prediction before the runs.

    Raises:
        JobError: the device is unknown, or the planned job is invalid.
    """
    from titan_moe_lb.commands.plan.building import silent_build
    from titan_moe_lb.commands.plan.known_hardware import hardware

    try:
        hardware(plan.hardware)
    except JobError as error:
        raise JobError(f"[plan]: {error}") from None
    if plan.job:
        degree = f"--parallelism.expert_parallel_degree={plan.ep}"
        with silent_build():
            _check_job([*plan.job, degree], plan.ranks, "[plan]")


def _check_job(flags: list[str], ranks: int, where: str) -> None:
    from titan_moe_lb.job import job_config

    try:
        job_config.load([*flags, "--training.disable_cuda_graphs"], ranks)
    except JobError as error:
        raise JobError(f"{where}: {error}") from None
    except SystemExit as stop:
        reason = "of what is printed above" if stop.code else "--help trains nothing"
        raise JobError(f"{where}: the job is refused because {reason}") from None
