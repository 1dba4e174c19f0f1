"""The command ``titan-moe-lb doctor``: check packages and devices for a job.

The module imports only the standard library, so ``python -m titan_moe_lb.commands.doctor`` runs in
a broken environment.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import titan_moe_lb

DISTRIBUTION = "titan-moe-lb"
MINIMUM_PYTHON = (3, 11)


@dataclass(frozen=True)
class Finding:
    """Result of one check, printed as a line. If not ``ok``, a job lacks something."""

    what: str
    text: str
    ok: bool = True

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'MISSING':8}{self.what:12}{self.text}"


def main() -> None:
    """Print all findings, and exit with status 1 if something is missing, else 0."""
    print(f"titan_moe_lb {titan_moe_lb.__version__} in {Path(titan_moe_lb.__file__).parent}")
    whole = True
    for finding in findings():
        print(finding)
        whole &= finding.ok
    raise SystemExit(0 if whole else 1)


def findings() -> Iterator[Finding]:
    """Run all checks. A check that raises becomes a finding that is not ``ok``."""
    is_new = sys.version_info >= MINIMUM_PYTHON
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    needs = f"in {sys.prefix}" if is_new else f"is too old: {wanted} or newer is needed"
    yield Finding("python", f"{platform.python_version()} {needs}", ok=is_new)
    yield from packages(DISTRIBUTION)
    for what, look in _LOOKS.items():
        try:
            yield Finding(what, look())
        except Exception as error:  # a broken installation can raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield Finding(what, f"{reason}: install {DISTRIBUTION} again", ok=False)


def packages(distribution: str) -> Iterator[Finding]:
    """Check all requirements of a distribution, direct and indirect."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("packages", "packaging is not installed: pip install packaging", ok=False)
        return
    waiting = [Requirement(distribution)]
    seen: dict[str, str] = {}
    problems = []
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install '{wanted}'")
            continue
        if not wanted.specifier.contains(found.version, prereleases=True):
            problems.append(f"{name} is {found.version}: pip install '{wanted}'")
        if name in seen:
            continue
        seen[name] = found.version
        modules = [file for file in found.files or () if file.suffix in (".py", ".so")]
        if lost := sum(not os.path.exists(str(found.locate_file(file))) for file in modules):
            remedy = f"pip install --force-reinstall --no-deps '{name}=={found.version}'"
            problems.append(f"{lost} files of {name} are missing: {remedy}")
        extras = {"", *wanted.extras}
        waiting += [
            need
            for need in map(Requirement, found.requires or ())
            if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    yield from (Finding("packages", problem, ok=False) for problem in problems)
    if not problems:
        main_ones = [f"{name} {seen[name]}" for name in ("torch", "torchtitan") if name in seen]
        yield Finding("packages", f"all {len(seen)} are whole: {', '.join(main_ones)}")


def _devices() -> str:
    import psutil
    import torch

    from titan_moe_lb.upstream import cpu

    if cpu.needed():
        memory = psutil.virtual_memory().total / 2**30
        return f"no accelerator: {os.cpu_count()} CPU cores, {memory:.0f} GiB"
    count = torch.accelerator.device_count()
    return f"{count} x {torch.get_device_module().get_device_name(0)}"


def _processes() -> str:
    import torch.distributed

    from titan_moe_lb.upstream import cpu

    backend = "gloo"
    if not cpu.needed():
        device = torch.accelerator.current_accelerator(check_available=True)
        backend = torch.distributed.get_default_backend_for_device(str(device))
    if not torch.distributed.is_backend_available(backend):
        raise RuntimeError(f"this torch has no {backend}")
    return f"communicate over {backend}"


def _attention() -> str:
    from titan_moe_lb.upstream import cpu

    return "FlexAttention's mask, evaluated densely" if cpu.needed() else "FlexAttention"


def _trainer() -> str:
    from titan_moe_lb.upstream import cpu

    cpu.prepare()
    from titan_moe_lb.job import module_lookup

    models = module_lookup.registered_models()
    for model in models:
        module_lookup.config_registry(model)
    return f"models that load: {', '.join(models)}"


def _compiler() -> str:
    from titan_moe_lb.rules import machine

    found = machine.cpp_compiler()
    return (
        found or f"no C++ compiler, which --compile.enable alone needs: {machine.COMPILER_REMEDY}"
    )


def _data() -> str:
    from titan_moe_lb.data import TOKENIZER_PATH, documents
    from titan_moe_lb.job import job_files

    jobs = job_files.names()
    if not jobs or not (Path(TOKENIZER_PATH) / "tokenizer.json").is_file():
        raise FileNotFoundError("tokenizer or job files")
    return f"{len(documents())} texts, their tokenizer, {len(jobs)} job files"


_LOOKS: dict[str, Callable[[], str]] = {
    "devices": _devices,
    "processes": _processes,
    "attention": _attention,
    "trainer": _trainer,
    "compiler": _compiler,
    "data": _data,
}

if __name__ == "__main__":
    main()
