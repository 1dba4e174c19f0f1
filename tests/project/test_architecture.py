"""Tests of the import layers in pyproject.toml: no import goes up, and none is circular."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 350
MOST_FILES_WITH_TORCHTITAN = 55
PRIVATE = re.compile(
    r"\b(from|import) (torch|torchtitan|spmd_types)\S*\._"  # a private module
    r"|\bfrom (torch|torchtitan|spmd_types)\S* import .*\b_[a-z]"
    r"|\b(torch|torchtitan|spmd_types|dist|DTensor)(\.\w+)*\._(?!foreach_)[a-zA-Z]"
)


def test_imports_follow_the_contract_in_pyproject():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def files() -> dict[str, str]:
    """Read every file of the package and the registry, by path."""
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("titan_moe_lb", "model_registry")
        for path in (ROOT / folder).rglob("*.py")
    }


def test_no_file_of_the_package_is_long():
    lengths = {name: len(text.splitlines()) for name, text in files().items()}
    assert {name: n for name, n in lengths.items() if n >= LONGEST_FILE} == {}


def test_private_names_of_torch_and_torchtitan_are_in_upstream_alone():
    found = {
        f"{name}: {line.strip()}"
        for name, text in files().items()
        for line in text.splitlines()
        if PRIVATE.search(line) and not name.startswith("titan_moe_lb/upstream/")
    }
    assert found == set()


def test_few_files_import_torchtitan():
    """A newer torchtitan may need a change in each of these files."""
    found = [
        n for n, text in files().items() if re.search(r"(?m)^\s*(from|import) torchtitan", text)
    ]
    assert len(found) <= MOST_FILES_WITH_TORCHTITAN
