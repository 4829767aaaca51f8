"""What a comparison is: a TOML file of a base run, arms, stressors and seeds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from gspo.core.errors import ConfigError, suggestion
from gspo.core.options import Options, check_names
from gspo.dev import Algorithm, InternalModelConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.experiment.spec import Spec, folder_name, named_beside, override, read_toml

_DECIDED = {
    "name": "every cell has a folder of its own",
    "project": "every cell has a folder of its own",
    "path": "give the comparison's path, beside [base]",
    "seed": "give seeds, beside [base]",
    "train.seed": "give seeds, beside [base]",
}
"""Keys of a run that the comparison decides."""


class CompareSpec(Options):
    """A grid: every arm under every combination of stressors, with every seed.

    >>> CompareSpec(base={"task": "sort"}, presets=["gspo", "grpo"], seeds=3).seeds
    (0, 1, 2)
    """

    name: str = "comparison"
    """Names the folder `<path>/<name>`."""
    path: str = ".gspo/compare"
    """Runs lie in `<path>/cells`: comparisons of one path share the cells that they have in
    common."""
    base: dict[str, Any] = Field(default_factory=dict)
    """The fields of a run, as in a file for `gspo train`."""
    presets: tuple[Algorithm, ...] = ()
    """Arms that are a named method and nothing else."""
    arms: tuple[dict[str, Any], ...] = ()
    """Arms with a `label` and keys of their own."""
    baseline: str | None = None
    """Compare each arm with this one alone. None: every two arms."""
    stress: dict[str, list[Any]] = Field(default_factory=dict)
    """Axes, crossed with each other. A list of values belongs to the key that names it; a list of
    tables sets several keys at once, under a `label`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A number of seeds, from 0 on, or a list of them."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _number_of_seeds(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError("at least one seed is needed")
            return tuple(range(value))
        if isinstance(value, list | tuple) and len(set(map(str, value))) != len(value):
            raise ValueError("a seed is given twice")
        return value

    @field_validator("name", "path")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        return folder_name(value)

    @field_validator("stress")
    @classmethod
    def _axes_have_values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for axis, values in value.items():
            if not values:
                raise ValueError(f"the axis {axis!r} has no values")
        return value

    @model_validator(mode="after")
    def _has_arms(self) -> CompareSpec:
        if not self.presets and not self.arms:
            raise ValueError("give presets = [...] or [[arms]]: there is nothing to compare")
        for part in (self.name, self.path):
            if not part:
                raise ValueError("name and path cannot be empty")
        if self.name in ("cells", ".", "..") or set(self.name) & set("/\\\0"):
            raise ValueError(f"name = {self.name!r} cannot be the comparison's folder")
        return self

    @property
    def folder(self) -> Path:
        """Where comparison.json and report.html go."""
        return Path(self.path) / self.name


def read_compare_spec(path: Path, overrides: Iterable[str] = ()) -> CompareSpec:
    """A comparison from a TOML file, with `key=value` overrides (dotted keys, TOML values).

    Raises:
        ConfigError: no such file, not TOML, or an unknown key or value.
    """
    data = read_toml(path)
    data.setdefault("name", path.stem)
    data = override(data, overrides, CompareSpec.model_fields)
    return CompareSpec(**_beside(data, path.parent))


def _beside(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with `named_beside` of the base, the arms and the stressors."""

    def keys(run: Any) -> Any:
        return named_beside(run, folder) if isinstance(run, dict) else run

    def level(axis: str, value: Any) -> Any:
        if isinstance(value, dict):
            return keys(value)
        named = keys({axis: value})
        # The table and the report show what the file says, not the path that it means.
        return value if named[axis] == value else named | {"label": value}

    found = dict(data)
    if "base" in data:
        found["base"] = keys(data["base"])
    if isinstance(data.get("arms"), list):
        found["arms"] = [keys(arm) for arm in data["arms"]]
    if isinstance(data.get("stress"), dict):
        found["stress"] = {
            axis: [level(axis, value) for value in values] if isinstance(values, list) else values
            for axis, values in data["stress"].items()
        }
    return found


def with_overrides(spec: CompareSpec, overrides: Iterable[str]) -> CompareSpec:
    """The same comparison with `key=value` overrides."""
    data = spec.model_dump(exclude_unset=True)
    return CompareSpec(**override(data, overrides, CompareSpec.model_fields))


def full_key(key: str, where: str) -> str:
    """The dotted key of a run's field; a bare one is looked up in the run, `train` and `load`.

    Raises:
        ConfigError: no such field, or one that the comparison decides.

    >>> full_key("epsilon", "arm"), full_key("rollout_dtype", "arm"), full_key("steps", "arm")
    ('train.epsilon', 'load.rollout_dtype', 'steps')
    """
    first, dot, rest = key.partition(".")
    tables = {"train": DevTrainConfig, "load": InternalModelConfig}
    found = key
    if not dot and key not in Spec.model_fields:
        homes = [table for table, options in tables.items() if key in options.model_fields]
        if not homes:
            if key in DevTrainConfig.refused:
                check_names(DevTrainConfig, {key: None})
            known = [*Spec.model_fields, *(n for t in tables.values() for n in t.model_fields)]
            raise ConfigError(f"{where}: unknown key {key!r}.{suggestion(key, known)}")
        found = f"{homes[0]}.{key}"
    elif first in tables and dot:
        check_names(tables[first], {rest.partition(".")[0]: None})
    elif first not in Spec.model_fields:
        raise ConfigError(f"{where}: unknown key {key!r}.{suggestion(first, Spec.model_fields)}")
    if found in _DECIDED:
        raise ConfigError(f"{where}: {key!r} is not free here: {_DECIDED[found]}")
    return found


def flat(data: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys of a run.

    >>> flat({"steps": 5, "train": {"epochs": 2}}, "base")
    {'steps': 5, 'train.epochs': 2}
    """
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= flat(value, where, f"{prefix}{key}.")
        else:
            out[full_key(prefix + key, where)] = value
    return out


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `flat`.

    >>> nested({"steps": 5, "train.epochs": 2})
    {'steps': 5, 'train': {'epochs': 2}}
    """
    out: dict[str, Any] = {}
    for key, value in keys.items():
        *tables, last = key.split(".")
        place = out
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = value
    return out
