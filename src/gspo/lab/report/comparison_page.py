"""The report of a comparison, from what `gspo compare` stores in comparison.json."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from gspo.lab.compare_tables import PAIRED, SUMMARY, Row, stressed_cells
from gspo.lab.pictures import styled
from gspo.lab.report.page import render
from gspo.lab.statistics import t_interval

_SUMMARY = (
    *(*SUMMARY, "ratio/clip_fraction_tokens", "moe/experts_changed", "loss/entropy"),
    *("optim/grad_norm", "ratio/log_p01", "ratio/log_p50", "ratio/log_p99", "seconds", "tokens"),
)
_CELLS = (
    *("id", "arm", "stress", "seed", "status", "collapsed", "reward_before", "reward_after"),
    *("auc", "seconds", "error", "run"),
)
_CURVES = ("val/reward", "train/reward", "loss/entropy", "ratio/clip_fraction")
"""The metrics that are drawn over steps."""


def comparison_page(comparison: Row) -> str:
    """The page of a comparison: the object of comparison.json."""
    cells = comparison.get("cells", ())
    counts = Counter(str(cell.get("status")) for cell in cells)
    status = [f"{count} {name}" for name, count in counts.items()]
    charts = curve_charts(cells)
    return render(
        "comparison.html",
        str(comparison.get("name", "comparison")),
        status + ["quick: smaller than the whole comparison"] * bool(comparison.get("quick")),
        {"Over steps": charts} if charts else {},
        failed=[cell for cell in cells if cell.get("error")],
        summary=stressed_cells(_SUMMARY, comparison.get("summary", ())),
        paired=stressed_cells(PAIRED, comparison.get("paired", ())),
        cells=stressed_cells(_CELLS, cells),
        origin=[["", ""]]
        + [[key, json.dumps(comparison.get(key))] for key in ("spec", "versions", "machine")],
    )


def curve_charts(cells: Sequence[Row]) -> dict[str, go.Figure]:
    """Metrics over steps, a chart per metric and stress: means of the arms and their intervals."""
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    stresses = dict.fromkeys(_stress(cell) for cell in cells)
    charts: dict[str, go.Figure] = {}
    for metric, stress, arm in itertools.product(_CURVES, stresses, arms):
        of_arm = [cell for cell in cells if (cell["arm"], _stress(cell)) == (arm, stress)]
        curves = [c["curves"][metric] for c in of_arm if metric in (c.get("curves") or ())]
        if curves:
            figure = charts.setdefault(f"{metric}, {stress}", go.Figure())
            color = qualitative.D3[arms.index(arm) % len(qualitative.D3)]
            _add_curve(figure, arm, curves, color)
    return {title: styled(figure, showlegend=True) for title, figure in charts.items()}


def _stress(cell: Row) -> str:
    return ", ".join(f"{axis}={value}" for axis, value in cell["stress"].items()) or "no stress"


def _add_curve(figure: go.Figure, arm: str, curves: Sequence[Row], color: str) -> None:
    """The mean over seeds at the steps that all of them have, over the band of its intervals."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in zip(curve["step"], curve["value"], strict=True):
            by_step.setdefault(step, []).append(value)
    whole = {step: values for step, values in by_step.items() if len(values) == len(curves)}
    means = {step: t_interval(whole[step]) for step in sorted(whole)}
    bounded = [step for step, mean in means.items() if mean.low is not None]
    look: dict[str, Any] = {"line_width": 0, "mode": "lines", "showlegend": False}
    look |= {"hoverinfo": "skip", "fillcolor": f"{color}33"}
    figure.add_scatter(x=bounded, y=[means[step].low for step in bounded], **look)
    figure.add_scatter(x=bounded, y=[means[step].high for step in bounded], fill="tonexty", **look)
    values = [mean.mean for mean in means.values()]
    name = escape(arm)
    figure.add_scatter(x=list(means), y=values, name=name, line_color=color, mode="lines")
