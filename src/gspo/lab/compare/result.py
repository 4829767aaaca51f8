"""From the runs of a comparison to comparison.json: curves, summaries and paired differences."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gspo.backend.metrics_file import read_metrics
from gspo.core.files import explained, strict_json, write_whole
from gspo.core.intervals import Interval, share_interval
from gspo.lab.compare.grid import Cell, by_group
from gspo.lab.compare.run import State, cell_folder
from gspo.lab.compare.spec import CompareSpec
from gspo.lab.statistics import p_value, paired_difference, t_interval, verdict

Record = dict[str, float]

CURVES = (
    *("train/reward", "train/reward_std", "train/groups_zero_advantage"),
    *("val/reward", "val/reward_low", "val/reward_high"),
    *("loss/policy", "loss/entropy", "loss/kl", "optim/grad_norm"),
    *("ratio/clip_fraction", "ratio/clip_fraction_positive", "ratio/clip_fraction_negative"),
    *("ratio/clip_fraction_tokens", "ratio/epsilon_low", "ratio/epsilon_high"),
    *("ratio/log_mean", "ratio/log_p01", "ratio/log_p50", "ratio/log_p99", "ratio/log_abs_max"),
    *("ratio/log_square", "ratio/token_log_square"),
    *("mismatch/log_ratio_mean", "mismatch/clip_fraction", "mismatch/sequence_log_ratio_mean"),
    *("mismatch/sequence_log_ratio_p01", "mismatch/sequence_log_ratio_p99"),
    *("moe/experts_changed", "moe/routing_agreement", "moe/load_cv"),
    *("tokens/completion", "tokens/completion_mean", "time/step"),
)
"""The metrics that a cell carries, as far as its run has them."""
MEAN_CURVES = ("val/reward", "train/reward", "loss/entropy", "ratio/clip_fraction")
"""Those that a summary has as a mean over seeds."""
AVERAGED = {
    "clip_fraction": "ratio/clip_fraction",
    "clip_fraction_tokens": "ratio/clip_fraction_tokens",
    "experts_changed": "moe/experts_changed",
    "entropy": "loss/entropy",
    "grad_norm": "optim/grad_norm",
    "log_ratio_p01": "ratio/log_p01",
    "log_ratio_p50": "ratio/log_p50",
    "log_ratio_p99": "ratio/log_p99",
    "completion_tokens": "tokens/completion_mean",
}
"""Columns of a summary: the mean over steps, then over seeds."""
PRIMARY = "auc"
"""What a comparison is judged by, named before any run: the last evaluation alone is noisier."""
PAIRED = (PRIMARY, "reward_after")


def comparison(
    compare: CompareSpec, cells: Sequence[Cell], states: Mapping[str, State], *, quick: bool = False
) -> dict[str, Any]:
    """Everything that the report needs, as JSON; docs/compare.md has the fields."""
    rows = {cell.id: _cell(compare, cell, states[cell.id]) for cell in cells}
    groups = [(arm, stress, [rows[c.id] for c in own]) for arm, stress, own in by_group([*cells])]
    return {
        "name": compare.name,
        "quick": quick,
        "spec": compare.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("gspo", "torch", "transformers")}
        | {"python": platform.python_version()},
        "machine": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
        "cells": list(rows.values()),
        "summary": [_summary(arm, stress, own) for arm, stress, own in groups],
        "paired": _paired(compare, groups),
    }


def write_comparison(compare: CompareSpec, content: Mapping[str, Any]) -> Path:
    """Write `<folder>/comparison.json`, whole or not at all."""
    path = compare.folder / "comparison.json"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, strict_json(content) + "\n")
    return path


def _cell(compare: CompareSpec, cell: Cell, state: State) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": cell.id,
        "arm": cell.arm,
        "stress": cell.stress,
        "seed": cell.seed,
        "run": None,
        "status": state.status,
        "error": state.error,
    }
    if cell.spec is not None:
        out["run"] = os.path.relpath(cell_folder(cell), compare.folder)
    done = state.status == "done"
    return out | (_measured(cell_folder(cell)) if done else {"curves": {}})


@cache
def _measured(run: Path) -> dict[str, Any]:
    """What a finished run shows. It no longer changes."""
    records = read_metrics(run / "metrics.jsonl")
    curves = _curves(records)
    held_out = curves["val/reward"]
    before, after = held_out["value"][0], held_out["value"][-1]
    # The evaluations at the start and the end alone make no curve.
    curve = held_out if len(held_out["step"]) > 2 else curves["train/reward"]
    return {
        "reward_before": before,
        "reward_after": after,
        "auc": area(curve["step"], curve["value"]),
        "collapsed": collapsed([_evaluation(r) for r in records if "val/reward" in r]),
        "seconds": round(sum(curves["time/step"]["value"]), 2),
        "tokens": int(sum(curves["tokens/completion"]["value"])),
        "curves": curves,
    }


def _curves(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    out = {}
    for name in CURVES:
        points = [(int(r["step"]), _rounded(r[name])) for r in records if name in r]
        if points:
            steps, values = zip(*points, strict=True)
            out[name] = {"step": list(steps), "value": list(values)}
    return out


def _rounded(value: float) -> float:
    """To six digits, which is more than any of them is worth."""
    return float(f"{value:.6g}")


def _evaluation(record: Record) -> Interval:
    ends = (record.get("val/reward_low"), record.get("val/reward_high"))
    return Interval(record["val/reward"], *ends)


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """The mean height of a curve: its area by trapezoids, over the steps that it spans.

    >>> area([0, 10, 20], [0.0, 1.0, 1.0])
    0.75
    """
    if len(steps) < 2:
        return values[0]
    points = list(zip(steps, values, strict=True))
    total = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    return total / (steps[-1] - steps[0])


def collapsed(evaluations: Sequence[Interval]) -> bool:
    """Whether a run lost most of what it had gained, or fell below its start, for certain.

    A run collapsed if the upper end of its last interval is below the middle of two numbers: the
    lower end of the first interval and the largest lower end before the last. So noise is no
    collapse, and a constant that is added to all rewards changes nothing.

    >>> start, best = Interval(0.3, 0.25, 0.35), Interval(0.8, 0.75, 0.85)
    >>> collapsed([start, best, Interval(0.4, 0.35, 0.45)])  # below 0.5, the middle
    True
    >>> collapsed([start, Interval(0.28, 0.23, 0.33)])  # not below the start for certain
    False
    """
    widths = [e.high - e.low for e in evaluations if e.low is not None and e.high is not None]
    # Rewards that are all the same may have no interval: they are as noisy as the others at most.
    half = max(widths, default=0.0) / 2
    *before, last = evaluations
    lows = [e.mean - half if e.low is None else e.low for e in before]
    high = last.mean + half if last.high is None else last.high
    return bool(lows) and high < (lows[0] + max(lows)) / 2


def _summary(arm: str, stress: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] == "done"]
    out: dict[str, Any] = {"arm": arm, "stress": stress, "seeds": len(done)}
    for name in PAIRED:
        out[name] = asdict(t_interval([row[name] for row in done])) if done else None
    count = sum(row["collapsed"] for row in done)
    out["collapsed"] = asdict(share_interval(count, len(done))) if done else None
    for name, metric in AVERAGED.items():
        own = [row["curves"][metric]["value"] for row in done if metric in row["curves"]]
        out[name] = _mean([statistics.fmean(values) for values in own])
    for name in ("seconds", "tokens"):
        out[name] = _mean([row[name] for row in done])
    out["curves"] = {name: curve for name in MEAN_CURVES if (curve := _mean_curve(done, name))}
    return out


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _mean_curve(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[Any]]:
    """Mean over seeds with its 95 % band by Student's t, at the steps that every seed has."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        curve = row["curves"].get(name, {"step": [], "value": []})
        for step, value in zip(curve["step"], curve["value"], strict=True):
            by_step.setdefault(step, []).append(value)
    points = [
        (step, t_interval(by_step[step]))
        for step in sorted(by_step)
        if len(by_step[step]) == len(rows)
    ]
    if not points:
        return {}
    return {
        "step": [step for step, _ in points],
        "mean": [_rounded(point.mean) for _, point in points],
        "low": [None if point.low is None else _rounded(point.low) for _, point in points],
        "high": [None if point.high is None else _rounded(point.high) for _, point in points],
    }


def _paired(
    compare: CompareSpec, groups: Sequence[tuple[str, dict[str, Any], list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """Differences between two arms under the same stress, over the seeds that both have done."""
    out = []
    for stress in (s for i, (_, s, _) in enumerate(groups) if s not in [g[1] for g in groups[:i]]):
        arms = {arm: rows for arm, own, rows in groups if own == stress}
        pairs = itertools.combinations(arms, 2)
        if compare.baseline is not None:
            pairs = ((arm, compare.baseline) for arm in arms if arm != compare.baseline)
        for a, b in pairs:
            out += [_pair(a, b, stress, metric, arms[a], arms[b]) for metric in PAIRED]
    return [pair for pair in out if pair["n"]]


def _pair(
    a: str,
    b: str,
    stress: dict[str, Any],
    metric: str,
    rows_a: Sequence[dict[str, Any]],
    rows_b: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    ours, theirs = (
        {row["seed"]: row[metric] for row in rows if row["status"] == "done"}
        for rows in (rows_a, rows_b)
    )
    seeds = [seed for seed in ours if seed in theirs]
    role = "primary" if metric == PRIMARY else "secondary"
    out: dict[str, Any] = {"a": a, "b": b, "stress": stress, "metric": metric, "role": role}
    out["n"] = len(seeds)
    if not seeds:
        return out
    values = [ours[s] for s in seeds], [theirs[s] for s in seeds]
    difference = paired_difference(*values)
    return out | {
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p": p_value(*values),
        "verdict": verdict(difference, a, b),
    }
