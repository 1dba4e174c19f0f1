"""Make ``.venv`` with this project in it, unless it is there: ``python3 bootstrap.py [EXTRA ...]``."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
MINIMUM_PYTHON = (3, 11)
# Debian packages that the extra "test" needs and pip cannot install, and their programs.
PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "iproute2": ("ip",)}


def main() -> None:
    """Make or update the environment."""
    if sys.version_info < MINIMUM_PYTHON:
        stop(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: set PYTHON")
    extras = set(sys.argv[1:])
    try:
        if "test" in extras:
            install_programs()
        if not is_installed(extras):
            print("setting up .venv: minutes and 6 GB the first time", file=sys.stderr, flush=True)
            with open(ROOT / ".venv.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not is_installed(extras):  # the process that held the lock may have done it
                    install(extras | set(stamp()[1:]))
    except OSError as error:
        stop(f"{error}: copy the checkout to where you can write, or: pip install {ROOT}")


def stamp() -> list[str]:
    """Return the digest and the extras of the last installation; empty without an environment."""
    return STAMP.read_text().split() if STAMP.exists() and os.access(PYTHON, os.X_OK) else []


def is_installed(extras: set[str]) -> bool:
    """Return whether the stamp is of this project file and these extras."""
    return stamp()[:1] == [digest()] and extras <= set(stamp()[1:])


def digest() -> str:
    """Hash the requirements and the path of ``.venv``, which its scripts contain."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + bytes(VENV)).hexdigest()


def install(extras: set[str]) -> None:
    """Install the project with these extras, in a new environment unless one is complete."""
    if not stamp():
        run(sys.executable, "-m", "venv", "--clear", str(VENV))
    STAMP.unlink(missing_ok=True)
    target = f".[{','.join(sorted(extras))}]" if extras else "."  # pip refuses ".[]"
    run(str(PYTHON), "-m", "pip", "--log", str(VENV / "install.log"), "install", "-e", target)
    STAMP.write_text(" ".join([digest(), *sorted(extras)]))


def install_programs() -> None:
    """Install the programs of the tests that are missing, if this user can."""
    missing = [name for name, any_of in PROGRAMS.items() if not any(map(shutil.which, any_of))]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "--no-install-recommends", *missing)


def run(*command: str) -> None:
    """Run a command; if it fails, stop with the last error in its output."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines() or ["no output"]
        errors = [line for line in lines if line.lower().startswith(("error:", "e:"))]
        stop(f"{' '.join(command)}: {(errors or lines)[-1]}; then run the same command again")


def stop(text: str) -> None:
    """Exit with one line."""
    sys.exit(f"bootstrap: error: {text}")


if __name__ == "__main__":
    main()
