"""What a user names as `module:name` or `folder/file.py:name`: a rollout, a task, an algorithm."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gspo.errors import ConfigError, suggestion


def load_object(name: str, what: str) -> Any:
    """The object that `name` means.

    A module is looked for in the working directory first, then among what is installed. Its folder
    comes last on `sys.path`: files there can be imported, and none takes the place of a library.

    Args:
        name: `module:name` or `folder/file.py:name`, as the user wrote it.
        what: the option that it was given to, for errors.

    Raises:
        ConfigError: another form, no such file or module, one that fails, or no such object in it.

    >>> load_object("math:pi", "task")
    3.141592653589793
    """
    module_name, colon, object_name = name.rpartition(":")
    if not colon or not module_name or not object_name.isidentifier():
        raise ConfigError(f"{what} = {name!r}: write 'module:name' or 'folder/file.py:name'")
    try:
        module = _module(module_name, Path())
    except ImportError as error:
        raise ConfigError(
            f"{what} = {name!r}: cannot import {module_name}: {error}. Looked beside the TOML "
            f"file, in {Path.cwd()}, and among the installed modules"
        ) from None
    if not hasattr(module, object_name):
        near = suggestion(object_name, vars(module))
        raise ConfigError(f"{what} = {name!r}: {module_name} has no {object_name!r}.{near}")
    return getattr(module, object_name)


def beside(name: str, folder: Path) -> str:
    """`name` with the file below `folder` that it means, if there is one.

    So a TOML file finds what stands beside it, from whatever folder the command is given.
    """
    module, colon, object_name = name.rpartition(":")
    if not colon or module.endswith(".py"):
        return name
    path = _file(module, folder)
    return name if path is None else f"{path}:{object_name}"


def _file(module: str, folder: Path) -> Path | None:
    base = folder.joinpath(*module.split("."))
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _module(name: str, folder: Path) -> ModuleType:
    path = Path(name) if name.endswith(".py") else _file(name, folder)
    if path is None:
        return importlib.import_module(name)
    path = path.resolve()
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    loaded = sys.modules.get(path.stem)
    if getattr(loaded, "__file__", None) == str(path):
        assert loaded is not None
        return loaded
    # A library of that name keeps it.
    spec = importlib.util.spec_from_file_location("gspo_user_" * bool(loaded) + path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
