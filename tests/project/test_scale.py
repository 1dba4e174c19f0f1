"""The table of docs/evidence/scale.md: its exact columns, measured again and from closed formulas."""

from __future__ import annotations

import pytest

from tests.support.doc_examples import ROOT

PAGE = (ROOT / "docs" / "evidence" / "scale.md").read_text()
EXPERTS, BINS = 256, 1000
EXACT = [0, 1, 2, 3, 4, 6, 9]
"""Columns that no clock measures, and that do not change with each new metric."""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def measured(ranks: int) -> tuple[list[str], int, int]:
    """Rows of the table; layers of a rank, and micro-batches of a step."""
    from benchmarks import scale  # prepares its process for a host

    one = scale.Scale(ranks)
    return scale.of_methods(one, repeats=1), one.layers, scale.MICRO_BATCHES


@pytest.mark.parametrize("number", [8, 512, 16384])
def test_the_page_has_what_the_command_counts(ranks, number):
    ((lines, layers, micro_batches),) = ranks.run(1, measured, number)
    rows = [cells(line) for line in lines]
    on_page = {tuple(cells(line)[:3]): cells(line) for line in PAGE.splitlines() if "|" in line}
    for row in rows:
        page_row = on_page[tuple(row[:3])]
        assert [row[i] for i in EXACT] == [page_row[i] for i in EXACT]
    kib = {row[2]: int(row[4].replace(",", "")) for row in rows}
    counts = layers * EXPERTS * 8  # int64, summed in float64
    assert kib["metrics alone"] == 0
    assert kib["sign"] == round(counts / 1024)
    assert kib["quantile"] == round((counts + layers * EXPERTS * BINS * 4) / 1024)
    # A logged step: the counts of each micro-batch over the EP group, and metrics a layer.
    (logged,) = [int(row[7].replace(",", "")) for row in rows if row[2] == "sign"]
    of_micro_batches = micro_batches * counts / 1024
    assert of_micro_batches < logged < 1.06 * of_micro_batches
