"""A run's file: TOML, with overrides of the command line, and names of files beside it."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

from gspo.core.byname import beside
from gspo.core.errors import ConfigError, suggestion
from gspo.environments import FAMILIES
from gspo.experiment.spec import TABLES, Spec


def read_spec(path: Path, overrides: Iterable[str] = ()) -> Spec:
    """A spec from a TOML file, with `key=value` overrides (dotted keys, TOML values).

    Raises:
        ConfigError: no such file, not TOML, or an unknown key or value.
    """
    return Spec(**named_beside(override(read_toml(path), overrides), path.parent)).with_steps()


_NAMES = ("task", "rollout", "environment", "reward", "algorithm", "train.algorithm")
"""Keys whose value may be the `module:name` of the user's own code."""


_FILES = ("dataset", "heldout", "data.heldout")
"""Keys whose value may be a file or a folder beside the run's; else it is another thing's name."""


def named_beside(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a run; each `module:name` means the file of `folder`, if there is one.

    A comparison's keys may be dotted, or say `algorithm` for `train.algorithm`.
    """
    named = dict(run)
    for key, value in run.items():
        if key in _NAMES and isinstance(value, str) and value.partition(":")[0] not in FAMILIES:
            named[key] = beside(value, folder)
        elif key == "reward" and isinstance(value, list):
            named[key] = [beside(v, folder) if isinstance(v, str) else v for v in value]
        elif key in _FILES and isinstance(value, str):
            path = folder / expanduser(value)
            named[key] = str(path) if path.exists() else value
        elif key in ("train", "data") and isinstance(value, dict):
            named[key] = named_beside(value, folder)
    if isinstance(sft := run.get("sft"), dict) and isinstance(sft.get("data"), str):
        named["sft"] = sft | {"data": str(folder / expanduser(sft["data"]))}
    return named


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: its brackets are nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML in UTF-8: {error}") from None


def full_keys(name: str) -> list[str]:
    """The dotted keys of a run's fields of this name: in the run itself, and in its tables.

    >>> full_keys("steps"), full_keys("epsilon"), full_keys("seed")
    (['steps'], ['train.epsilon'], ['seed', 'train.seed'])
    """
    found = [name] if name in Spec.model_fields else []
    return found + [f"{table}.{name}" for table in TABLES if name in TABLES[table].model_fields]


def override(
    data: dict[str, Any], overrides: Iterable[str], keys: Collection[str] = Spec.model_fields
) -> dict[str, Any]:
    """`data` with each `a.b=value` put in its place; `keys` are their possible first parts.

    >>> override({"train": {"epochs": 1}}, ["train.epochs=2", "model=embedded:sort"])
    {'train': {'epochs': 2}, 'model': 'embedded:sort'}
    """
    for item in overrides:
        key, equals, text = map(str.strip, item.partition("="))
        if not equals:
            raise ConfigError(f"--set {item!r}: write key=value")
        first, *rest = parts = key.split(".")
        near = [full for full in full_keys(parts[-1]) if full.partition(".")[0] in keys]
        misplaced = len(rest) == 1 and first in TABLES and near and key not in near
        if first not in keys or misplaced:
            hint = f" Did you mean {near[0]!r}?" if near else suggestion(first, keys)
            if reason := Spec.refused.get(parts[-1]):
                hint = f" It is not supported: {reason}"
            raise ConfigError(f"--set {item!r}: unknown key {key!r}.{hint}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):  # no TOML: it is the text itself
            value = text
        data = put(data, parts, value)
    return data


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of options with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def put(table: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """A copy of the table, with the value at the keys. What is no table is replaced by one.

    >>> put({"steps": 5, "train": {"epochs": 2}}, ["train", "seed"], 1)
    {'steps': 5, 'train': {'epochs': 2, 'seed': 1}}
    """
    table = table if isinstance(table, dict) else {}
    first, *rest = keys
    return table | {first: put(table.get(first), rest, value) if rest else value}


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flat`.

    >>> nested({"steps": 5, "train.epochs": 2})
    {'steps': 5, 'train': {'epochs': 2}}
    """
    data: dict[str, Any] = {}
    for key, value in keys.items():
        data = put(data, key.split("."), value)
    return data
