"""From a comparison to its cells: one resolved run each, or the reason why there is none."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gspo.core.errors import ConfigError, suggestion
from gspo.experiment.plan import make_plan
from gspo.experiment.spec import Spec
from gspo.lab.compare.spec import CompareSpec, flat, nested
from gspo.tasks import load_task
from gspo.train.settings import resolve

CELLS = "cells"
_DEFAULTS = {"load.threads": 1, "keep_checkpoints": 1}
"""Of cells, where the base doesn't say otherwise: one core each, and little disk."""
_FACTOR = re.compile(r"\*\s*(\d.*)")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        id: arm, stressors and seed, unique in the comparison.
        stress: axis -> value, or the label of a table.
        spec: the run; None where it is refused.
        refused: why the arm has no meaning under these stressors.
    """

    id: str
    arm: str
    stress: dict[str, Any]
    seed: int
    spec: Spec | None
    refused: str | None = None

    @property
    def sequences(self) -> int:
        """Rollouts of the whole run, evaluations included."""
        if self.spec is None:
            return 0
        spec = self.spec
        evaluations = 2 + (spec.steps - 1) // spec.eval_every if spec.eval_every else 2
        trained = spec.steps * spec.prompts * spec.completions
        return trained + evaluations * spec.eval_prompts * spec.eval_completions

    @property
    def longest(self) -> int:
        """Most tokens of a completion."""
        assert self.spec is not None
        task = load_task(self.spec.task, self.spec.task_options) if self.spec.task else None
        return self.spec.max_tokens or (task.max_tokens if task else 256)


@dataclass(frozen=True)
class _Setting:
    """An arm, or one value of an axis: dotted keys of a run, under a label."""

    label: Any
    keys: dict[str, Any]


def make_cells(compare: CompareSpec) -> list[Cell]:
    """Every cell, resolved and checked before any of them runs; seed by seed.

    Raises:
        ConfigError: a misspelt key or value, two settings of the same key, or an arm or a stressor
            that nothing accepts.
    """
    base = _DEFAULTS | flat(compare.base, "base")
    arms = _arms(compare)
    axes = {axis: _axis(axis, values) for axis, values in compare.stress.items()}
    _check_collisions(arms, axes)
    resolved: list[tuple[str, dict[str, Any], Spec | None, str | None]] = []
    for levels in itertools.product(*axes.values()):
        stress = dict(zip(axes, (level.label for level in levels), strict=True))
        for arm in arms:
            spec, reason = _resolve(base, arm, levels)
            resolved.append((arm.label, stress, spec, reason))
    _check_refusals(resolved)
    return [
        _cell(compare, arm, stress, seed, spec, reason)
        for seed in compare.seeds
        for arm, stress, spec, reason in resolved
    ]


def _arms(compare: CompareSpec) -> list[_Setting]:
    arms = [_Setting(name, {"train.algorithm": name}) for name in compare.presets]
    for given in compare.arms:
        label = given.get("label")
        if not isinstance(label, str) or not label:
            raise ConfigError(f"[[arms]] {given}: give it a label")
        rest = {key: value for key, value in given.items() if key != "label"}
        arms.append(_Setting(label, flat(rest, f"arm {label!r}")))
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"two arms are called {label!r}: give one another label")
    if compare.baseline is not None and compare.baseline not in labels:
        near = suggestion(compare.baseline, labels)
        raise ConfigError(f"baseline = {compare.baseline!r} is no arm.{near} Arms: {labels}")
    return arms


def _axis(axis: str, values: list[Any]) -> list[_Setting]:
    where = f"stress {axis!r}"
    out = []
    for value in values:
        if isinstance(value, dict):
            rest = {key: v for key, v in value.items() if key != "label"}
            keys = flat(rest, where)
            shown = ", ".join(f"{key}={v}" for key, v in rest.items())
            out.append(_Setting(value.get("label", shown), keys))
        else:
            out.append(_Setting(value, flat({axis: value}, where)))
    labels = [str(level.label) for level in out]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"{where} has the same value or label twice: {labels}")
    return out


def _check_collisions(arms: list[_Setting], axes: dict[str, list[_Setting]]) -> None:
    """Two settings of one key would hide one another; a factor only scales."""
    owners: dict[str, str] = {}
    for axis, levels in axes.items():
        for key in {key for level in levels for key in level.keys}:
            if key in owners:
                raise ConfigError(f"stress {axis!r} and {owners[key]} both set {key}")
            owners[key] = f"stress {axis!r}"
    for arm in arms:
        for key in arm.keys:
            axis = next((a for a in axes if owners.get(key) == f"stress {a!r}"), None)
            given = [] if axis is None else [level.keys.get(key) for level in axes[axis]]
            if any(value is not None and _factor(value) is None for value in given):
                raise ConfigError(
                    f"arm {arm.label!r} sets {key}, which the stress {axis!r} sets too: leave one "
                    'out, or give the stressor as factors of the arm\'s value ("*0.5", "*2")'
                )


def _factor(value: Any) -> float | None:
    """0.3 of "*0.3"; None of anything else."""
    match = _FACTOR.fullmatch(value) if isinstance(value, str) else None
    try:
        return float(match[1]) if match else None
    except ValueError:
        return None


def _resolve(
    base: dict[str, Any], arm: _Setting, levels: tuple[_Setting, ...]
) -> tuple[Spec | None, str | None]:
    """The run without its seed, checked as `gspo train --dry-run` does; or why there is none."""
    keys = base | arm.keys
    for level in levels:
        for key, value in level.keys.items():
            factor = _factor(value)
            keys[key] = value if factor is None else _scaled(key, factor, keys)
    try:
        spec = Spec(**nested(keys))
        make_plan(spec)
    except ConfigError as error:
        return None, str(error)
    if spec.eval_prompts == 0:
        raise ConfigError("eval_prompts = 0: arms are compared by their held-out reward")
    return spec, None


def _scaled(key: str, factor: float, keys: dict[str, Any]) -> float:
    """`factor` times what the arm, the base or the default says."""
    value = keys.get(key)
    if value is None and key in Spec.model_fields:
        value = Spec.model_fields[key].default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f'"*{factor:g}" of {key}: there is no number to multiply; set it in base')
    return round(value * factor) if isinstance(value, int) else value * factor


def _check_refusals(resolved: list[tuple[str, dict[str, Any], Spec | None, str | None]]) -> None:
    """A preset may refuse some stressors; what everything refuses is a mistake."""
    groups: dict[str, list[str | None]] = {}
    for arm, stress, _, reason in resolved:
        names = [f"arm {arm!r}", *(f"stress {axis} = {value!r}" for axis, value in stress.items())]
        for name in names:
            groups.setdefault(name, []).append(reason)
    for name, reasons in groups.items():
        if all(reason is not None for reason in reasons):
            raise ConfigError(f"{name} is refused in every cell: {reasons[0]}")


def _cell(
    compare: CompareSpec,
    arm: str,
    stress: dict[str, Any],
    seed: int,
    spec: Spec | None,
    reason: str | None,
) -> Cell:
    id = " ".join([arm, *(f"{axis}={value}" for axis, value in stress.items()), f"seed={seed}"])
    if spec is None:
        return Cell(id, arm, stress, seed, None, reason)
    train = spec.train.model_copy(update={"seed": seed})
    place = {"seed": seed, "train": train, "path": compare.path, "project": CELLS}
    spec = spec.model_copy(update=place)
    return Cell(id, arm, stress, seed, spec.model_copy(update={"name": _run_name(spec)}))


def _run_name(spec: Spec) -> str:
    """By content: the same run has the same name, in whichever comparison it is a cell."""
    # A method's own number of minibatches is that number, given or not.
    minibatches = resolve(options=spec.train).minibatches
    train = spec.train.model_copy(update={"minibatches": minibatches})
    spec = spec.model_copy(update={"train": train})
    content = spec.model_dump(mode="json", exclude_defaults=True)
    for key in ("name", "path", "project"):
        content.pop(key, None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    method = spec.train.algorithm or "gspo"
    method = method if isinstance(method, str) else "own"
    parts = (spec.task or "rollout", method, f"seed{spec.seed}", digest)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))


def by_group(cells: list[Cell]) -> Iterator[tuple[str, dict[str, Any], list[Cell]]]:
    """Arm, stress and the cells of its seeds, in the order of the grid."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps([cell.arm, cell.stress], default=str), []).append(cell)
    for own in groups.values():
        yield own[0].arm, own[0].stress, own
