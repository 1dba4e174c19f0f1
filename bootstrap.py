"""Make, refresh or repair ``.venv``: ``python3 bootstrap.py [EXTRA ...]``. Standard library alone.

Does nothing when the environment already holds what ``pyproject.toml`` asks for. A package
that has gone since is installed again. An installation that was interrupted, or whose ``bin``
has gone, is started over, and one that another process is making is waited for. What pip says
is in ``.venv/install.log``. The extra ``test`` has parts that pip cannot install, a browser
and ``ip``: root on Debian or Ubuntu, as in a container of CI, gets them from apt-get; everyone
else is left to decide, and the tests that need them say so.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn, TextIO

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"
LOG = VENV / "install.log"
MINIMUM_PYTHON = (3, 11)
NEEDED_SPACE = 9e9  # of .venv 6.3 GB, and what pip unpacks meanwhile
SECONDS_BETWEEN_LINES = 15
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome", "chrome"),
    "iproute2": ("ip",),
}
"""Packages of Debian that the tests need, with the programs that make one unnecessary."""

# Run by the python of .venv: what each of its packages has beside the others and in bin.
INVENTORY = """
import importlib.metadata, json, os, sys
inventory = {}
for package in importlib.metadata.distributions():
    files = [file for file in package.files or () if "__pycache__" not in file.parts]
    places = {file if file.parts[0] == ".." else file.parts[0] for file in files}
    paths = sorted(os.path.normpath(package.locate_file(place)) for place in places)
    inventory[f"{package.name}=={package.version}"] = [
        os.path.relpath(path, sys.prefix) for path in paths if os.path.exists(path)
    ]
print(json.dumps(inventory))
"""

# The same: on every core what pip does on one. A file that is no Python of its version is left.
COMPILE = """
import compileall, sysconfig
compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0)
"""

# What stands behind pip's own words, and what helps.
CAUSES = {
    r"No space left on device": "the disk is full: make room",
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Network is unreachable|"
    r"Temporary failure in name resolution": "no package index can be reached: connect to the "
    "network, or name a mirror in PIP_INDEX_URL",
}


def main() -> None:
    extras = set(sys.argv[1:])
    if "test" in extras:
        _install_programs()
    if _installed(extras):
        return
    _check_python()
    with _lock() as lock:
        _wait_for(lock)
        # Another process may have finished the work meanwhile.
        if not _installed(extras):
            _install(extras | set(_stamp().get("extras", ())))


def _check_python() -> None:
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        names = [f"python3.{minor}" for minor in range(MINIMUM_PYTHON[1], 20)]
        newer = next(filter(shutil.which, names), None)
        remedy = f"set PYTHON={newer}" if newer else "set PYTHON to a newer interpreter"
        _stop(f"Python {wanted} or newer is needed, this is {sys.version.split()[0]}: {remedy}")
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python3.{sys.version_info.minor}-venv"
        _stop(f"this Python makes no environments: install {package}, or set PYTHON to another")


def _lock() -> TextIO:
    try:
        return open(ROOT / ".venv.lock", "a+")
    except OSError as error:
        _stop(
            f"{ROOT} cannot be written ({error.strerror}), and .venv goes there: copy the "
            "repository to a folder that can be written, and start from there"
        )


def _wait_for(lock: TextIO) -> None:
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
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    target = f".[{','.join(sorted(extras))}]" if extras else "."
    if not STAMP.exists() or not os.access(PYTHON, os.X_OK):
        # First use, or what is here cannot be trusted: an interrupted installation, no bin.
        free = shutil.disk_usage(ROOT).free
        if free < NEEDED_SPACE:
            _stop(
                f"{NEEDED_SPACE / 1e9:.0f} GB are needed under {ROOT}, and {free / 1e9:.1f} GB "
                "are free: make room, or put the repository on another disk"
            )
        _say("creating .venv")
        _run([sys.executable, "-m", "venv", "--clear", str(VENV)])
        _say("installing torch, torchtitan and the rest (about 6 GB the first time, minutes)")
    elif lost := _lost():
        _say(f"gone from .venv, and installed again: {', '.join(lost)}")
        others = [package for package in lost if not package.startswith("titan-moe-lb==")]
        if others:
            _run([*pip, "--force-reinstall", "--no-deps", *others])
    else:
        _say("refreshing .venv")
    STAMP.unlink(missing_ok=True)
    _run([*pip, "--no-compile", "-e", target])
    _run([str(PYTHON), "-I", "-c", COMPILE])
    inventory = subprocess.check_output([str(PYTHON), "-I", "-c", INVENTORY])
    stamp = {"digest": _digest(), "extras": sorted(extras), "packages": json.loads(inventory)}
    STAMP.write_text(json.dumps(stamp))
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
    """Run to the end; what it says goes to the log, and now and then its last line is shown."""
    said = [""]
    done = threading.Event()
    threading.Thread(target=_show_last, args=(said, done), daemon=True).start()
    try:
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout or ():
                said.append(line)
    except KeyboardInterrupt:
        _stop("interrupted: the same command starts the installation over", status=130)
    finally:
        done.set()
    if VENV.is_dir():
        with open(LOG, "a") as log:
            log.writelines([f"$ {' '.join(command)}\n", *said])
    if process.returncode:
        _stop(f"the installation did not finish: {_cause(said)}; then run the same command again")


def _show_last(said: list[str], done: threading.Event) -> None:
    started = time.monotonic()
    while not done.wait(SECONDS_BETWEEN_LINES):
        _say(f"{time.monotonic() - started:.0f} s: {said[-1].strip()[:100] or 'at work'}")


def _cause(said: list[str]) -> str:
    for pattern, remedy in CAUSES.items():
        if re.search(pattern, "".join(said)):
            return remedy
    lines = [line.strip() for line in said if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if line.startswith(("ERROR:", "E:", "Error:"))]
    return f"{(errors or lines)[-1]} ({LOG.relative_to(ROOT)} has all of it)"


def _stamp() -> dict:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _installed(extras: set[str]) -> bool:
    """A few hundred looks at the disk: a hundredth of a second."""
    stamp = _stamp()
    return (
        stamp.get("digest") == _digest()
        and extras <= set(stamp.get("extras", ()))
        and "packages" in stamp
        and os.access(PYTHON, os.X_OK)
        and not _lost()
    )


def _lost() -> list[str]:
    """Packages that were installed and of which something is gone, with their versions."""
    return [
        package
        for package, places in _stamp().get("packages", {}).items()
        if not all(os.path.exists(VENV / place) for place in places)
    ]


def _digest() -> str:
    """Of what is asked for, and where: scripts in .venv hold the path of their Python."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + bytes(VENV)).hexdigest()


def _say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def _stop(text: str, status: int = 1) -> NoReturn:
    _say(f"error: {text}")
    sys.exit(status)


if __name__ == "__main__":
    main()
