"""A smoke set with another release of torch: ``python -m tests.other_torch 2.14.0``.

The release gets an environment of its own beside ``.venv`` (about 6 GB, minutes, once).
What follows the version goes to pytest, in place of the smoke set.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARITY = "tests/balancing/test_parity.py::test_gradient_does_not_depend_on"
SMOKE = (
    "tests/balancing/test_functional.py",
    "tests/balancing/test_router.py",
    "tests/telemetry/test_telemetry.py",
    "tests/run/test_resume.py",
    f"{PARITY}_the_layout[whole-pp=2,schedule=ZBVZeroBubble,dp_shard=2]",
    f"{PARITY}_the_layout[whole-tp=2,ep=2,spmd_backend=partial_dtensor]",
    f"{PARITY}_the_layout[whole-dp_shard=4,ep=4]",
    f"{PARITY}_the_layout[whole-cp=2]",
    f"{PARITY}_the_layout[whole-ac=selective]",
    f"{PARITY}_compilation[whole-pp=2,schedule=ZBVZeroBubble,dp_shard=2,compile=true]",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.other_torch", description=__doc__)
    parser.add_argument("version", help="of torch, for example 2.14.0")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments of pytest")
    arguments = parser.parse_args()
    folder = ROOT / f".venv-torch-{arguments.version}"
    python = str(folder / "bin" / "python")
    if not folder.exists():
        venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*install, "-e", ".[test]", f"torch=={arguments.version}"])
    print(f"torch {arguments.version} in {folder.name}", flush=True)
    # A compiled kernel of one release is nothing for another.
    cache = str(folder / "inductor")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    _run([python, "-m", "pytest", *(arguments.pytest or SMOKE)], environment)


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
