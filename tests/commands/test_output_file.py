"""Tests of output files: our own file is replaced, and a failed write changes nothing."""

from __future__ import annotations

import os

import pytest

from tests.support.synthetic_trace import run_info, write_run
from titan_moe_lb import cli
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file


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
    with pytest.raises(JobError, match="page.html.*No space left on device"):
        output_file.write(output_file.MARK + "more", page)
    assert page.read_text() == output_file.MARK
    assert list(tmp_path.iterdir()) == [page]
