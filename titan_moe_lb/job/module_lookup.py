"""Lookup of the functions that ``--module`` and ``--config`` name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from titan_moe_lb.errors import JobError, nearest


def registered_models() -> list[str]:
    """Return the models of ``model_registry``: its packages with a ``config_registry.py``."""
    import model_registry

    return sorted(
        package.name
        for folder in model_registry.__path__
        for package in Path(folder).iterdir()
        if (package / "config_registry.py").is_file()
    )


def config_registry(module: str) -> ModuleType:
    """Import the module with the config functions of ``module``.

    Args:
        module: a model of ``model_registry``, else one of torchtitan's models, else any
            importable path.
    """
    for candidate in (
        f"model_registry.{module}.config_registry",
        f"torchtitan.models.{module}.config_registry",
        f"{module}.config_registry",
        module,
    ):
        if _exists(candidate):
            try:
                return importlib.import_module(candidate)
            except ModuleNotFoundError as error:
                raise _needs_package(candidate, error) from None
    names = registered_models()
    raise JobError(
        f"--module {module!r} is neither a model ({nearest(module, names)}) nor an importable path"
    )


def config_function(registry: ModuleType, name: str) -> Callable:
    """Return the config function ``name``."""
    names = config_names(registry)
    if name not in names:
        models = registered_models()
        others = [model for model in models if name in config_names(config_registry(model))]
        where = f"it is of --module {others[0]}" if others else nearest(name, names)
        raise JobError(f"{registry.__name__} has no config {name!r}; {where}")
    return getattr(registry, name)


def config_names(registry: ModuleType) -> list[str]:
    """List the functions without arguments that the registry module itself defines."""
    return [
        name
        for name, member in vars(registry).items()
        if callable(member)
        and not isinstance(member, type)
        and not name.startswith("_")
        and getattr(member, "__module__", None) == registry.__name__
        and getattr(getattr(member, "__code__", None), "co_argcount", 1) == 0
    ]


def config_of_flavor(registry: ModuleType, flavor: str) -> str:
    """Return the name of the config function that ends in the flavor; ``-`` counts as ``_``."""
    names = config_names(registry)
    ending = "_" + flavor.lower().replace("-", "_")
    for name in names:
        if name.lower().endswith(ending):
            return name
    flavors = getattr(model_package(registry), "FLAVORS", names)
    raise JobError(
        f"{registry.__name__} has no config for flavor {flavor!r}; {nearest(flavor, flavors)}"
    )


def import_all(modules: list[str], folder: Path, where: str) -> None:
    """Import a user's modules, which may be files of a folder."""
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
    for module in modules:
        if not _exists(module):
            raise JobError(
                f"{where} imports {module!r}, which is neither a file {module}.py in {folder} nor an "
                "importable path"
            )
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise _needs_package(module, error) from None


def entry_point(registry: ModuleType) -> Callable | None:
    """Return the function ``model_registry`` of the config functions' package, or None."""
    return getattr(model_package(registry), "model_registry", None)


def model_package(registry: ModuleType) -> ModuleType:
    """Import the package of the config functions, or the registry module if it has none."""
    return importlib.import_module(registry.__name__.removesuffix(".config_registry"))


def _exists(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{path}.".startswith(f"{error.name}."):
            raise _needs_package(path, error) from None
        return False
    except (ImportError, ValueError):
        return False


def _needs_package(path: str, error: ModuleNotFoundError) -> JobError:
    package = (error.name or str(error)).partition(".")[0]
    return JobError(f"{path} needs the package {package!r}, which is not installed")
