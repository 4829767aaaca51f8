"""From a comparison to its cells: each is one resolved run, or the reason why there is none."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gspo.core.errors import ConfigError, suggestion
from gspo.experiment.plan import make_plan
from gspo.experiment.run_file import nested
from gspo.experiment.saved_run import SavedRun
from gspo.experiment.spec import Spec
from gspo.lab.compare import CompareSpec, run_keys
from gspo.tasks import Task
from gspo.tasks.dataset import DatasetTask
from gspo.train.settings import resolve

CELLS = "cells"
_DEFAULTS = {"load.threads": 1, "keep_checkpoints": 1}
"""Defaults of a cell, which the base may change: one core, and one checkpoint on disk."""
_PROMPTS = {"task", "task_options", "dataset", "reward", "reward_weights", "data"}
"""Fields of a run that its task is made of."""
_FACTOR = re.compile(r"\*\s*(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*")

Status = Literal["pending", "running", "done", "failed", "refused"]
Level = tuple[Any, dict[str, Any]]
"""An arm, or one value of an axis: its label, and the keys of a run that it sets."""

Tasks = dict[str, Task | None]
"""By the fields of a run that they are made of."""


@dataclass
class Cell:
    """One run of the grid, and where it stands.

    Attributes:
        id: arm, stressors and seed, unique in the comparison.
        stress: axis -> value, or the label of a table.
        spec: the run; None if it is refused.
        error: why it failed, or why the arm has no meaning under these stressors.
        task: the run's; cells of the same prompts have the same one.
    """

    arm: str
    stress: dict[str, Any]
    spec: Spec | None
    status: Status = "pending"
    error: str | None = None
    seed: int = 0
    id: str = ""
    task: Task | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.spec is not None
        return self.spec.folder

    def is_finished(self) -> bool:
        """Whether the run has made its last step and evaluated it."""
        assert self.spec is not None
        run = SavedRun.of(self.folder)
        return run.steps == self.spec.steps and run.steps in run.values("val/reward")


def make_cells(compare: CompareSpec) -> list[Cell]:
    """All cells, resolved and checked before any of them runs; seed by seed.

    Raises:
        ConfigError: a misspelt key or value, two settings of the same key, or an arm or a stressor
            that is refused everywhere.
    """
    base = _DEFAULTS | run_keys(compare.base, "base")
    presets = [{"label": name, "train.algorithm": name} for name in compare.presets]
    arms = _levels("arm", [*presets, *compare.arms])
    labels = [label for label, _ in arms]
    if compare.baseline is not None and compare.baseline not in labels:
        near = suggestion(compare.baseline, labels)
        raise ConfigError(f"baseline = {compare.baseline!r} is no arm.{near} Arms: {labels}")
    axes: dict[str, list[Level]] = {}
    for axis, values in compare.stress.items():
        tables = [v if isinstance(v, dict) else {axis: v, "label": v} for v in values]
        axes[axis] = _levels(f"stress {axis}", tables)
    _check_collisions(arms, axes)
    cells: list[Cell] = []
    tasks: Tasks = {}
    for levels in itertools.product(*axes.values()):
        stress = {axis: label for axis, (label, _) in zip(axes, levels, strict=True)}
        cells += [_resolve(arm, stress, base | keys, levels, tasks) for arm, keys in arms]
    _check_refusals(cells)
    return [_with_seed(cell, seed, compare.path) for seed in compare.seeds for cell in cells]


def _levels(what: str, tables: list[dict[str, Any]]) -> list[Level]:
    levels: list[Level] = []
    for table in tables:
        keys = {key: value for key, value in table.items() if key != "label"}
        label = table.get("label", ", ".join(f"{key}={value}" for key, value in keys.items()))
        levels.append((label, run_keys(keys, f"{what} = {label!r}")))
    labels = [str(label) for label, _ in levels]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"{what}: the same value or label twice: {labels}")
    return levels


def _check_collisions(arms: list[Level], axes: dict[str, list[Level]]) -> None:
    """Two settings of one key would hide one another; a factor only scales."""
    axis_of: dict[str, str] = {}
    plain: set[str] = set()
    for axis, levels in axes.items():
        for key, value in ((key, value) for _, keys in levels for key, value in keys.items()):
            if axis_of.setdefault(key, axis) != axis:
                raise ConfigError(f"stress {axis!r} and stress {axis_of[key]!r} both set {key}")
            plain |= {key} if _factor(value) is None else set()
    for label, arm in arms:
        for key in (key for key in arm if key in plain):
            raise ConfigError(
                f"arm {label!r} sets {key}, which the stress {axis_of[key]!r} sets too: leave one "
                'out, or give the stressor as factors of the arm\'s value ("*0.5", "*2")'
            )


def _factor(value: Any) -> float | None:
    """The number of a factor such as "*0.3"; None for any other value."""
    match = _FACTOR.fullmatch(value) if isinstance(value, str) else None
    return float(match[1]) if match else None


def _resolve(
    arm: str, stress: dict[str, Any], keys: dict[str, Any], levels: tuple[Level, ...], tasks: Tasks
) -> Cell:
    """The cell without its seed, checked as `gspo train --dry-run` does.

    Args:
        tasks: those that are loaded: a dataset is read once, whatever the number of its cells.
    """
    for _, level in levels:
        for key, value in level.items():
            factor = _factor(value)
            keys[key] = value if factor is None else _scaled(key, factor, keys)
    try:
        spec = Spec(**nested(keys))
        prompts = spec.model_dump_json(include=_PROMPTS)
        task = tasks[prompts] if prompts in tasks else tasks.setdefault(prompts, spec.make_task())
        make_plan(spec := spec.with_steps(task), task)
    except ConfigError as error:
        return Cell(arm, stress, None, status="refused", error=str(error))
    if spec.eval_prompts == 0:
        raise ConfigError("eval_prompts = 0: arms are compared by their held-out reward")
    return Cell(arm, stress, spec, task=task)


def _scaled(key: str, factor: float, keys: dict[str, Any]) -> float:
    """`factor` times what the arm, the base or the default says."""
    value = keys.get(key)
    if value is None and key in Spec.model_fields:
        value = Spec.model_fields[key].default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f'"*{factor:g}" of {key}: there is no number to multiply; set it in base')
    return round(value * factor) if isinstance(value, int) else value * factor


def _check_refusals(cells: list[Cell]) -> None:
    """A preset may refuse some stressors; what is refused in every cell is a mistake."""
    reasons: dict[str, list[str | None]] = {}
    for cell in cells:
        settings = [f"stress {axis} = {value!r}" for axis, value in cell.stress.items()]
        for name in (f"arm {cell.arm!r}", *settings):
            reasons.setdefault(name, []).append(cell.error)
    for name, errors in reasons.items():
        if None not in errors:
            raise ConfigError(f"{name} is refused in every cell: {errors[0]}")


def _with_seed(cell: Cell, seed: int, path: str) -> Cell:
    settings = [f"{axis}={value}" for axis, value in cell.stress.items()]
    cell = replace(cell, seed=seed, id=" ".join([cell.arm, *settings, f"seed={seed}"]))
    if cell.spec is not None:
        train = cell.spec.train.model_copy(update={"seed": seed})
        place = {"seed": seed, "train": train, "path": path, "project": CELLS}
        spec = cell.spec.model_copy(update=place)
        cell.spec = spec.model_copy(update={"name": _run_name(spec, cell.task)})
        cell.status = "done" if cell.is_finished() else "pending"
    return cell


def _run_name(spec: Spec, task: Task | None) -> str:
    """By content: the same run has the same name, in whichever comparison it is a cell."""
    # A method's own number of minibatches is that number, given or not.
    minibatches = resolve(options=spec.train).minibatches
    train = spec.train.model_copy(update={"minibatches": minibatches})
    content = spec.model_copy(update={"train": train}).model_dump(
        mode="json", exclude_defaults=True, exclude={"name", "path", "project"}
    )
    if isinstance(task, DatasetTask):
        content["dataset"] = task.digest  # other rows are another run
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    method = spec.train.algorithm or "gspo"
    method = method if isinstance(method, str) else "own"
    source = spec.task or (Path(spec.dataset).stem if spec.dataset else "rollout")
    parts = (source, method, f"seed{spec.seed}", digest)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))
