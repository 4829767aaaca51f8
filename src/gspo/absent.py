"""What ART has and gspo has not, see absent.toml: each use says why, and what there is instead."""

from __future__ import annotations

import functools
import inspect
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gspo.core.errors import check_names, suggestion

P = ParamSpec("P")
T = TypeVar("T")


def _named(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with a key of its own for each name."""
    return {name: value for names, value in table.items() for name in names.split(", ")}


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
REASONS: Mapping[str, dict[str, str]] = _named({k: _named(v) for k, v in _TABLES.items()})
"""What lacks names -> name -> the reason and the remedy."""


def of_options(title: str) -> Mapping[str, str]:
    """Why a function or a set of options lacks names, which ART or another trainer has.

    >>> of_options("TrainConfig")["beta"]
    'use kl_penalty_coef, of dev.TrainConfig or [train].'
    """
    return REASONS["other trainers"] | REASONS.get(title, {})


def refusal(owner: str, name: str, lacks: str, names: Iterable[str] = ()) -> AttributeError:
    """What `owner.__getattr__` raises for a name that it has not.

    Args:
        lacks: whose names in absent.toml are meant.
        names: those that it has.

    >>> str(refusal("gspo", "TinkerBackend", "gspo"))
    "gspo has no 'TinkerBackend': gspo trains on this machine: use gspo.LocalBackend."
    """
    if name in REASONS[lacks]:
        return AttributeError(f"{owner} has no {name!r}: {REASONS[lacks][name]}", name=name)
    near = suggestion(name, names, cutoff=0.7)
    return AttributeError(f"{owner} has no attribute {name!r}{near and '.'}{near}", name=name)


def refusing(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function: an argument that it lacks is a `ConfigError` with reason or likely name.

    >>> refusing(lambda model: None)(modle=1)
    Traceback (most recent call last):
    gspo.core.errors.ConfigError: <lambda>: unknown argument 'modle'. Did you mean 'model'? \
Known arguments: model.
    """
    title = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        check_names(title, kwargs, known, of_options(title))
        return function(*args, **kwargs)

    return checked


class _Finder:
    """Python asks it last, for modules that nobody else has found: absent ones say why."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        root, _, rest = name.partition(".")
        if root == "gspo" and (why := REASONS["modules"].get(rest)):
            raise ModuleNotFoundError(f"gspo has no module {rest!r}: {why}", name=name)


sys.meta_path.append(_Finder())  # pyright: ignore[reportArgumentType]
