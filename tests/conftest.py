"""Fixtures of the tests, and their device: ``--device cpu`` (gloo on the host) or ``cuda``
(NCCL)."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Generator

import pytest
import torch.distributed

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait for each other by spinning take the cores from the tests beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.gpus import GPUS
from tests.support.rank_pool import RankPool

HOST_RANKS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where ranks compute: four on the host (default), or one on each GPU that is here. "
        "With cuda only the tests run that start ranks.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda":
        host_only = [item for item in items if "ranks" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=host_only)
        items[:] = [item for item in items if item not in host_only]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage in imports, and leave their objects out of later collections: a fifth of
    the time."""
    gc.disable()
    collected = yield
    gc.enable()
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton reports its frozen objects as leaks
    return collected


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every skipped case with its reason, because pytest folds cases with the same reason."""
    for report in terminalreporter.stats.get("skipped", ()):
        terminalreporter.write_line(f"{report.nodeid}: {report.longrepr[2]}")


@pytest.fixture(autouse=True, scope="module")
def no_process_group_outlives_its_module() -> Generator[None, None, None]:
    """Destroy the process group of an own loop, because later tests would count its ranks."""
    yield
    if torch.distributed.is_initialized():
        from tests.support import gone_meshes

        torch.distributed.destroy_process_group()
        gone_meshes.forget()


@pytest.fixture(autouse=True)
def environment_ends_with_its_test() -> Generator[None, None, None]:
    """Restore the environment.

    A job in this process sets variables of its ranks and launcher, which later tests would use.
    """
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


class Ranks(RankPool):
    """Pool that skips a test if it needs more ranks than there are GPUs."""

    def need(self, num_ranks: int) -> None:
        if self.gpus is not None and num_ranks > self.size:
            plural = "" if num_ranks == 1 else "s"
            pytest.skip(f"needs {num_ranks} GPU{plural}, {self.size} are here")
        super().need(num_ranks)


@pytest.fixture(scope="session")
def ranks(request):
    """Processes of the whole session; see :class:`RankPool`."""
    pool = Ranks(HOST_RANKS)
    if request.config.getoption("--device") == "cuda":
        pool = Ranks(len(GPUS), GPUS)
    with pool:
        yield pool


@pytest.fixture
def gpu_ranks(ranks):
    """Processes of the session, for tests that need a GPU."""
    if ranks.gpus is None:
        pytest.skip("needs a GPU: ./run_tests.sh --device cuda")
    return ranks
