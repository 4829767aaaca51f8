"""From the runs of a comparison to comparison.json: curves, summaries and paired differences."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from gspo.backend.run import versions
from gspo.core.files import explained, strict_json, write_whole
from gspo.experiment.heldout import Interval, share_interval
from gspo.experiment.saved_run import SavedRun
from gspo.lab.compare import CompareSpec
from gspo.lab.compare_cells import Cell
from gspo.lab.statistics import p_value, paired_difference, t_interval, verdict

Row = dict[str, Any]
"""An object of comparison.json: a cell, or what is made of cells."""

ROLES = {"auc": "primary", "reward_after": "secondary"}
"""What arms are judged by. The primary one was named before any run: the last evaluation is
noisier than the whole curve."""


def comparison(compare: CompareSpec, cells: Sequence[Cell], *, quick: bool = False) -> Row:
    """Everything that the report needs, as JSON; docs/compare.md has the fields."""
    rows = [_row(compare, cell) for cell in cells]
    summary, paired = [], []
    for same_stress in _grouped(rows, "stress"):
        arms = {arm[0]["arm"]: arm for arm in _grouped(same_stress, "arm")}
        summary += [_summary(arm) for arm in arms.values()]
        pairs = itertools.combinations(arms, 2)
        if compare.baseline is not None:
            pairs = ((arm, compare.baseline) for arm in arms if arm != compare.baseline)
        for a, b in pairs:
            paired += [_difference(arms[a], arms[b], metric) for metric in ROLES]
    cores, system = os.cpu_count(), platform.system()
    return {
        "name": compare.name,
        "quick": quick,
        "spec": compare.model_dump(mode="json"),
        "versions": versions(),
        "machine": {"machine": platform.machine(), "cores": cores, "system": system},
        "cells": rows,
        "summary": summary,
        "paired": [difference for difference in paired if difference["n"]],
    }


def _grouped(rows: Sequence[Row], field: str) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row[field]), []).append(row)
    return list(groups.values())


def write_comparison(compare: CompareSpec, cells: Sequence[Cell], *, quick: bool = False) -> Row:
    """Write `<folder>/comparison.json`, whole or not at all; returns its content."""
    path = compare.folder / "comparison.json"
    content = comparison(compare, cells, quick=quick)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, strict_json(content) + "\n")
    return content


def _row(compare: CompareSpec, cell: Cell) -> Row:
    row = {name: getattr(cell, name) for name in ("id", "arm", "stress", "seed")}
    row["run"] = os.path.relpath(cell.folder, compare.folder) if cell.spec else None
    row |= {"status": cell.status, "error": cell.error}
    return row | (measured(cell.folder) if cell.status == "done" else {"curves": {}})


@cache
def measured(folder: Path) -> Row:
    """What a finished run shows. It no longer changes."""
    run = SavedRun.of(folder)
    names = dict.fromkeys(name for record in run.records for name in record if name != "step")
    curves = {name: _curve(run.values(name)) for name in names}
    evaluations = [*run.evaluations.values()]
    held_out = curves["val/reward"]
    # Two evaluations, at the start and the end, make no curve.
    curve = held_out if len(evaluations) > 2 else curves["train/reward"]
    return {
        "reward_before": held_out["value"][0],
        "reward_after": held_out["value"][-1],
        "auc": area(curve["step"], curve["value"]),
        "collapsed": collapsed(evaluations),
        "seconds": round(sum(curves["time/step"]["value"]), 2),
        "tokens": int(sum(curves["tokens/completion"]["value"])),
        "curves": curves,
    }


def _curve(by_step: Mapping[int, float]) -> dict[str, list[float]]:
    # To six digits, which is more than any of them is worth.
    return {"step": [*by_step], "value": [float(f"{value:.6g}") for value in by_step.values()]}


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """The mean height of a curve: its area by trapezoids, over the steps that it spans.

    >>> area([0, 10, 20], [0.0, 1.0, 1.0])
    0.75
    """
    if len(steps) < 2:
        return values[0]
    points = itertools.pairwise(zip(steps, values, strict=True))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in points) / (steps[-1] - steps[0])


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


def _summary(arm: Sequence[Row]) -> Row:
    """One arm under one stress, over the seeds that are done."""
    done = [row for row in arm if row["status"] == "done"]
    summary: Row = {"arm": arm[0]["arm"], "stress": arm[0]["stress"], "seeds": len(done)}
    if not done:
        return summary
    summary |= {name: asdict(t_interval([row[name] for row in done])) for name in ROLES}
    collapses = sum(row["collapsed"] for row in done)
    summary["collapsed"] = asdict(share_interval(collapses, len(done)))
    for name in ("seconds", "tokens"):
        summary[name] = statistics.fmean(row[name] for row in done)
    means: dict[str, list[float]] = {}  # over the steps of each seed
    for metric, curve in (item for row in done for item in row["curves"].items()):
        means.setdefault(metric, []).append(statistics.fmean(curve["value"]))
    return summary | {"means": {name: statistics.fmean(means[name]) for name in means}}


def _difference(a: Sequence[Row], b: Sequence[Row], metric: str) -> Row:
    """What arm `a` is above arm `b` by under one stress, over the seeds that both have done."""
    ours, theirs = ({r["seed"]: r[metric] for r in arm if r["status"] == "done"} for arm in (a, b))
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    difference: Row = {"a": a[0]["arm"], "b": b[0]["arm"], "stress": a[0]["stress"]}
    difference |= {"metric": metric, "role": ROLES[metric], "n": len(pairs)}
    if pairs:
        values = tuple(zip(*pairs, strict=True))
        interval = paired_difference(*values)
        ends = {"difference": interval.mean, "low": interval.low, "high": interval.high}
        named = verdict(interval, difference["a"], difference["b"])
        difference |= ends | {"p": p_value(*values), "verdict": named}
    return difference
