"""Tests of the run folder: it is taken as long as the run is at work."""

from __future__ import annotations

import os

import pytest

from titan_moe_lb.errors import JobError
from titan_moe_lb.terminal import run_folder


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("2 nodes at x", "2 nodes at y")])
def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_work(first, second, tmp_path):
    """The lock belongs to an open file, so a second opening acts like a second process."""
    folder = str(tmp_path / "out")
    run_folder.claim(folder, first)
    run_folder.claim(folder, first)  # another node of it
    with pytest.raises(JobError, match="out .*--dump_folder"):
        run_folder.claim(folder, second)
    run_folder.claim(folder, first)


def test_a_folder_is_free_when_the_run_has_ended(tmp_path):
    process = os.fork()
    if not process:
        run_folder.claim(str(tmp_path), "earlier")
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    run_folder.claim(str(tmp_path), "later")
