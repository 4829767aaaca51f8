"""What a user names as `module:name` or `folder/file.py:name`: a rollout, a task, an algorithm."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from gspo.core.errors import ConfigError, MissingDependencyError, check_names, suggestion

T = TypeVar("T")

_FORMS = "write 'module:name' or 'folder/file.py:name'"


def beside(name: str, folder: Path) -> str:
    """`module:name` as `folder/module.py:name`, if there is such a file; else as it is.

    So a TOML file finds what lies beside it, whatever the working directory.
    """
    module, colon, object_name = name.rpartition(":")
    if not colon or module.endswith(".py"):
        return name
    path = _file(module, folder)
    return name if path is None else f"{path}:{object_name}"


def find_module(name: str, what: str) -> tuple[Path | str, str]:
    """Look for what `module:name` names, without running it.

    Args:
        name: `module:name` or `folder/file.py:name`, as the user wrote it.
        what: the option that it was given to, for errors.

    Returns:
        A file, or the name of an installed module; and the name of the object in it.

    Raises:
        ConfigError: another form, or no such file or module.
    """
    module, colon, object_name = name.rpartition(":")
    if not colon or not object_name.isidentifier():
        raise ConfigError(f"{what} = {name!r}: {_FORMS}")
    if module.endswith(".py"):
        if not Path(module).is_file():
            raise ConfigError(f"{what} = {name!r}: there is no file {Path(module).absolute()}")
        return Path(module), object_name
    path = _file(module, Path())
    if path is not None:
        return path, object_name
    try:
        installed = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        installed = None
    if installed is None:
        tail = module.replace(".", "/") + ".py"
        raise ConfigError(
            f"{what} = {name!r}: cannot import {module}: there is no {tail} beside the TOML file "
            f"or in {Path.cwd()}, and no installed module of that name. {_FORMS.capitalize()}"
        )
    return module, object_name


def optional(module: str, package: str, extra: str, purpose: str) -> Any:
    """A module of a package that is not always installed.

    Args:
        extra: of gspo, which installs the package; none: it is installed without its needs.
        purpose: what needs it, for the error.

    Raises:
        MissingDependencyError: it cannot be imported, and which module is missing.

    >>> optional("math", "math", "none", "a circle").pi
    3.141592653589793
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(package, extra, f"{purpose} ({error})") from error


def load_object(name: str, what: str) -> Any:
    """The object that `module:name` or `folder/file.py:name` names.

    A module is looked for in the working directory first, then among what is installed. Its
    folder and the working directory come last on `sys.path`: files there can be imported, and
    none takes the place of a library.

    Args:
        name, what: see `find_module`.

    Raises:
        ConfigError: see `find_module`; a module that fails, or that has no such object.

    >>> load_object("math:pi", "task")
    3.141592653589793
    """
    place, object_name = find_module(name, what)
    try:
        module = importlib.import_module(place) if isinstance(place, str) else _from_file(place)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{what} = {name!r}: {place} fails when it is imported: {why}") from error
    if not hasattr(module, object_name):
        near = suggestion(object_name, vars(module))
        raise ConfigError(f"{what} = {name!r}: {place} has no {object_name!r}.{near}")
    return getattr(module, object_name)


def load_class(name: str, what: str, base: type[T]) -> Callable[..., T]:
    """The class that `module:Class` names, which derives from `base`.

    Raises:
        ConfigError: see `load_object`; or it is no such class.
    """
    kind = load_object(name, what)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        home = base.__module__.rpartition(".")[0]
        raise ConfigError(
            f"{what} = {name!r} must be a class that derives from {home}.{base.__name__}"
        )
    return kind


def made_of(kind: Callable[..., T], what: str, name: str, options: Mapping[str, Any]) -> T:
    """An object of what the option `what` names, from its table of options.

    Raises:
        ConfigError: an option that the constructor doesn't have or lacks, an abstract class, or
            what the constructor raises.
    """
    known = inspect.signature(kind).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        check_names(f"{what}_options of {name!r}", options, known, {})
    try:
        return kind(**options)
    except (ConfigError, MissingDependencyError):
        raise
    except Exception as error:  # an argument or a method is missing, or the user's code fails
        why = f"with options {dict(options)}: {type(error).__name__}: {error}"
        raise ConfigError(f"{what} = {name!r} {why}") from error


def _file(module: str, folder: Path) -> Path | None:
    base = folder.joinpath(*module.split("."))
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    top = path.parent if path.name == "__init__.py" else path
    name = top.stem
    while (top.parent / "__init__.py").is_file():  # inside a package: it may import relatively
        top = top.parent
        name = f"{top.name}.{name}"
    for folder in (str(top.parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path:
        return importlib.import_module(name)
    # A library of that name keeps it.
    spec = importlib.util.spec_from_file_location(f"gspo_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
