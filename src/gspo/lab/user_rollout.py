"""The rollout function that a spec names: in a file of the user's, or in an installed module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gspo.errors import ConfigError

_FORMS = "write 'module:function' or 'folder/file.py:function'"


def beside(name: str, folder: Path) -> str:
    """`name` with the file below `folder` that it means, if there is one.

    So a TOML file finds the functions beside it, from whatever folder the command is given.
    """
    module, colon, function = name.rpartition(":")
    if not colon or module.endswith(".py"):
        return name
    path = _file(module, folder)
    return name if path is None else f"{path}:{function}"


def check_rollout(name: str) -> None:
    """Look for the file or the module that `module:function` names, without running it.

    Raises:
        ConfigError: there is none, or the name has another form.
    """
    _locate(name)


def load_rollout(name: str) -> Callable[..., Awaitable[Any]]:
    """The function that `module:function` or `folder/file.py:function` names.

    A module is looked for in the working directory first, then among what is installed. Its
    folder and the working directory come last on `sys.path`: files there can be imported, and
    none takes the place of a library.

    Raises:
        ConfigError: no such module or function, a module that fails, or not an async function of
            two arguments.
    """
    found, function_name = _locate(name)
    module = _run(name, found)
    function = getattr(module, function_name, None)
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"rollout = {name!r}: {found} has no async function {function_name!r}")
    if len(inspect.signature(function).parameters) != 2:
        raise ConfigError(f"rollout = {name!r} must take two arguments: (model, scenario)")
    return function


def _locate(name: str) -> tuple[Path | str, str]:
    """A file, or the name of an installed module; and the name of the function."""
    module, colon, function = name.rpartition(":")
    if not colon or not function.isidentifier():
        raise ConfigError(f"rollout = {name!r}: {_FORMS}")
    if module.endswith(".py"):
        if not Path(module).is_file():
            raise ConfigError(f"rollout = {name!r}: there is no file {Path(module).absolute()}")
        return Path(module), function
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"rollout = {name!r}: {module!r} is not the name of a module. {_FORMS}")
    path = _file(module, Path())
    if path is not None:
        return path, function
    try:
        installed = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        installed = None
    if installed is None:
        tail = module.replace(".", "/") + ".py"
        raise ConfigError(
            f"rollout = {name!r}: cannot import {module}: there is no {tail} beside the TOML file "
            f"or in {Path.cwd()}, and no installed module of that name"
        )
    return module, function


def _file(module: str, folder: Path) -> Path | None:
    base = folder.joinpath(*module.split("."))
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _run(name: str, found: Path | str) -> ModuleType:
    try:
        return importlib.import_module(found) if isinstance(found, str) else _from_file(found)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"rollout = {name!r}: {found} fails when it is imported: {what}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    top = path.parent if path.name == "__init__.py" else path
    parts = [top.stem]
    while (top.parent / "__init__.py").is_file():  # inside a package: it may import relatively
        top = top.parent
        parts.insert(0, top.name)
    for folder in (str(top.parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    if len(parts) > 1:
        return importlib.import_module(".".join(parts))
    loaded = sys.modules.get(parts[0])
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    # A library of that name keeps it.
    taken = loaded is not None or not _leads_to(parts[0], path)
    spec = importlib.util.spec_from_file_location("gspo_rollout_" * taken + parts[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _leads_to(name: str, path: Path) -> bool:
    """Whether `import name` would load this file."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path
