"""What a comparison is: a TOML file of a base run, arms, stressors and seeds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from gspo import dev
from gspo.core.errors import ConfigError, check_names, suggestion
from gspo.core.options import Options
from gspo.experiment.run_file import flat, full_keys, named_beside, override, read_toml
from gspo.experiment.spec import TABLES, FolderName, FolderPath, Spec

QUICK = Path(__file__).with_name("quick.toml")
"""The comparison of `gspo compare --quick`."""
_DECIDED: dict[str, str] = {
    **dict.fromkeys(("name", "project"), "each cell has its own folder"),
    **dict.fromkeys(("seed", "train.seed"), "give seeds, beside [base]"),
    "path": "give the comparison's path, beside [base]",
}
"""Keys of a run that the comparison decides."""


class CompareSpec(Options, title="gspo compare"):
    """A grid: each arm under each combination of stressors, with each seed.

    >>> CompareSpec(base={"task": "sort"}, presets=["gspo", "grpo"], seeds=3).seeds
    (0, 1, 2)
    """

    name: FolderName = "comparison"
    """Names the folder `<path>/<name>`."""
    path: FolderPath = ".gspo/compare"
    """Runs lie in `<path>/cells`: comparisons of one path share the cells that they have in
    common."""
    base: dict[str, Any] = Field(default_factory=dict)
    """The fields of a run, as in a file for `gspo train`."""
    presets: tuple[dev.Algorithm, ...] = ()
    """Arms that are a named method and nothing else."""
    arms: tuple[dict[str, Any], ...] = ()
    """Arms with a `label` and the keys that they set."""
    baseline: str | None = None
    """Compare each arm with this one only. None: all pairs of arms."""
    stress: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
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

    @model_validator(mode="after")
    def _has_arms(self) -> CompareSpec:
        if not self.presets and not self.arms:
            raise ValueError("give presets = [...] or [[arms]]: there is nothing to compare")
        for arm in self.arms:
            if not isinstance(arm.get("label"), str) or not arm["label"]:
                raise ValueError(f"[[arms]] {arm}: give it a label")
        if self.name == "cells":
            raise ValueError("name = 'cells': that folder has the runs; give another name")
        return self

    @property
    def folder(self) -> Path:
        """Where comparison.json and report.html go."""
        return Path(self.path) / self.name


def read_compare_spec(path: Path | None, overrides: Iterable[str] = ()) -> CompareSpec:
    """A comparison from a TOML file, with `key=value` overrides (dotted keys, TOML values).

    Without a file it is the quick one. What the base, the arms and the stressors name as
    `module:name` is looked for beside the file first.

    Raises:
        ConfigError: no such file, not TOML, or an unknown key or value.

    >>> read_compare_spec(None, ["seeds=1"]).seeds
    (0,)
    """
    path = path or QUICK
    data = {"name": path.stem} | read_toml(path)
    spec = CompareSpec(**override(data, overrides, CompareSpec.model_fields))
    folder = path.parent
    stress = {
        axis: [_level_beside(axis, value, folder) for value in values]
        for axis, values in spec.stress.items()
    }
    arms = tuple(named_beside(arm, folder) for arm in spec.arms)
    update = {"base": named_beside(spec.base, folder), "arms": arms, "stress": stress}
    return spec.model_copy(update=update)


def _level_beside(axis: str, value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return named_beside(value, folder)
    level = named_beside({axis: value}, folder)
    # The table and the report show what the file says, not the path that it means.
    return value if level[axis] == value else level | {"label": value}


def full_key(key: str, where: str) -> str:
    """The dotted key of a run's field; a bare one is looked up in the run, `train` and `load`.

    Raises:
        ConfigError: no such field, or one that the comparison decides.

    >>> full_key("epsilon", "arm"), full_key("rollout_dtype", "arm"), full_key("steps", "arm")
    ('train.epsilon', 'load.rollout_dtype', 'steps')
    """
    first = key.partition(".")[0]
    if first not in Spec.model_fields:
        if not (found := full_keys(key)):
            names = [*Spec.model_fields, *(n for t in TABLES.values() for n in t.model_fields)]
            if key in dev.TrainConfig.refused:
                check_names("dev.TrainConfig", [key], [], dev.TrainConfig.refused)
            raise ConfigError(f"{where}: unknown key {key!r}.{suggestion(first, names)}")
        key = found[0]
    if key in _DECIDED:
        raise ConfigError(f"{where}: {key!r} is not free here: {_DECIDED[key]}")
    return key


def run_keys(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Nested tables as dotted keys of a run.

    >>> run_keys({"steps": 5, "train": {"epochs": 2}}, "base")
    {'steps': 5, 'train.epochs': 2}
    """
    return {full_key(key, where): value for key, value in flat(data).items() if value != {}}
