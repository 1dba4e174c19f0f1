"""Make or refresh ``.venv``: ``python3 bootstrap.py [EXTRA ...]``. Standard library alone.

Does nothing when the environment already holds what ``pyproject.toml`` asks for.
An installation that was interrupted is started over, and one that another process
is making is waited for. The extra ``test`` has parts that pip cannot install, a browser
and ``ip``: root on Debian or Ubuntu, as in a container of CI, gets them from apt-get;
everyone else is left to decide, and the tests that need them say so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.json"
MINIMUM_PYTHON = (3, 11)
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome", "chrome"),
    "iproute2": ("ip",),
}
"""Packages of Debian that the tests need, with the programs that make one unnecessary."""


def main() -> None:
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        sys.exit(
            f"bootstrap: error: Python {wanted} or newer is needed, this is "
            f"{sys.version.split()[0]}: set PYTHON to a newer interpreter"
        )
    extras = set(sys.argv[1:])
    if "test" in extras:
        _install_programs()
    if _installed(extras):
        return
    with open(ROOT / ".venv.lock", "a+") as lock:
        _wait_for(lock)
        # Another process may have finished the work meanwhile.
        if not _installed(extras):
            _install(extras | _stamp().get("extras", set()))


def _wait_for(lock) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        _say(f"process {owner} is setting up .venv; waiting for it to finish")
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()


def _install(extras: set[str]) -> None:
    started = time.monotonic()
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    if not STAMP.exists():
        # No stamp: first use, or an interrupted installation that cannot be trusted.
        _say("creating .venv")
        _run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    STAMP.unlink(missing_ok=True)
    target = f".[{','.join(sorted(extras))}]" if extras else "."
    _say("installing torch, torchtitan and the rest (about 6 GB the first time, minutes)")
    _run([*pip, "install", "--disable-pip-version-check", "-e", target])
    STAMP.write_text(json.dumps({"digest": _digest(), "extras": sorted(extras)}))
    _say(f"ready after {time.monotonic() - started:.0f} s")


def _install_programs() -> None:
    missing = [name for name, any_of in PROGRAMS.items() if not any(map(shutil.which, any_of))]
    if not missing or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    _say(f"installing {' and '.join(missing)}, for the tests")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update", "-qq"], quiet)
    _run(["apt-get", "install", "-qq", "--no-install-recommends", *missing], quiet)


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    except KeyboardInterrupt:
        status = 130
    if status:
        sys.exit(
            "bootstrap: error: the installation did not finish; its reason stands above. "
            "Run the same command again to start over"
        )


def _stamp() -> dict:
    try:
        stamp = json.loads(STAMP.read_text())
        return {"digest": stamp["digest"], "extras": set(stamp["extras"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _installed(extras: set[str]) -> bool:
    stamp = _stamp()
    return stamp.get("digest") == _digest() and extras <= stamp["extras"]


def _digest() -> str:
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def _say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
