"""The report of a comparison, from what `gspo compare` stores in comparison.json."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gspo.lab.pictures import plain_text, styled
from gspo.lab.report.page import Section, render
from gspo.lab.statistics import t_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]
_SUMMARY = {
    "arm": "", "stress": "", "seeds": "", "reward_after": ".3f", "auc": ".3f", "collapsed": ".0%",
    "clip_fraction": ".1%", "clip_fraction_tokens": ".1%", "experts_changed": ".2%",
    "entropy": ".3f", "grad_norm": ".3g", "log_ratio_p01": ".2g", "log_ratio_p50": ".2g",
    "log_ratio_p99": ".2g", "seconds": ",.0f", "tokens": ",.0f",
}  # fmt: skip
_PAIRED = {
    "a": "", "b": "", "stress": "", "metric": "", "verdict": "", "difference": "+.3g",
    "low": "+.3g", "high": "+.3g", "n": "",
}  # fmt: skip
_CELLS = {
    "id": "", "arm": "", "stress": "", "seed": "", "status": "", "collapsed": "",
    "reward_before": ".3f", "reward_after": ".3f", "auc": ".3f", "seconds": ",.0f", "error": "",
    "run": "",
}  # fmt: skip
"""Fields of comparison.json, and the format of their numbers: the columns of a table."""
_CURVES = ("val/reward", "train/reward", "loss/entropy", "ratio/clip_fraction")
"""The metrics that are drawn over steps."""


def comparison_page(comparison: Row) -> str:
    """The page of a comparison: the object of comparison.json."""
    cells, summary, paired = (rows_of(comparison, key) for key in ("cells", "summary", "paired"))
    counts = Counter(str(cell.get("status")) for cell in cells)
    status = [f"{count} {name}" for name, count in counts.items()]
    status += ["quick: smaller than the whole comparison"] if comparison.get("quick") else []
    troubles = [
        f"{cell['id']} ({cell['status']}): {cell['error']}" for cell in cells if cell.get("error")
    ]
    origin = [[key, json.dumps(comparison.get(key))] for key in ("spec", "versions", "machine")]
    sections = [
        Section(
            "Summary",
            "Means over seeds; in brackets, the 95 % interval if there is one.",
            troubles,
            _table(_SUMMARY, summary),
        ),
        Section("Over steps", "Means over seeds, 95 % t interval.", charts=curve_charts(cells)),
        Section(
            "Paired differences",
            "First arm minus second, paired by seed, with the 95 % interval. An interval that "
            "holds 0 shows no difference.",
            table=_table(_PAIRED, paired),
        ),
        Section("All cells", table=_table(_CELLS, cells), folded=True),
        Section("Specification", table=[["", ""], *origin], folded=True),
    ]
    return render(str(comparison.get("name", "comparison")), status, sections)


def rows_of(comparison: Row, key: str) -> list[dict[str, Any]]:
    """One of the lists of comparison.json, with each stress as text.

    >>> rows_of({"cells": [{"stress": {"epochs": 2}}, {"stress": {}}]}, "cells")
    [{'stress': 'epochs=2'}, {'stress': 'no stress'}]
    """
    rows = []
    for row in comparison.get(key, ()):
        parts = [f"{axis}={value}" for axis, value in (row.get("stress") or {}).items()]
        rows.append({**row, "stress": ", ".join(parts) or "no stress"})
    return rows


def _table(columns: Mapping[str, str], rows: Sequence[Row]) -> list[list[str]]:
    header = [name.replace("_", " ") for name in columns]
    return [header, *([_text(row.get(name), columns[name]) for name in columns] for row in rows)]


def _text(value: Any, form: str) -> str:
    """A number, or a mean with its interval; '' for what is not known."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        ends = [_text(value.get(end), form) for end in ("low", "high")]
        return _text(value.get("mean"), form) + (f" [{', '.join(ends)}]" if all(ends) else "")
    return format(value, form) if form else str(value)


def curve_charts(cells: Sequence[Row]) -> dict[str, go.Figure]:
    """Metrics over steps, one chart per metric and stress: means of the arms and their intervals.

    Args:
        cells: as `rows_of` returns them.
    """
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    stresses = list(dict.fromkeys(cell["stress"] for cell in cells))
    charts: dict[str, go.Figure] = {}
    for metric, stress, arm in itertools.product(_CURVES, stresses, arms):
        of_arm = [cell for cell in cells if (cell["arm"], cell["stress"]) == (arm, stress)]
        curves = [c["curves"][metric] for c in of_arm if metric in (c.get("curves") or ())]
        if curves:
            figure = charts.setdefault(f"{metric}, {stress}", go.Figure())
            color = qualitative.D3[arms.index(arm) % len(qualitative.D3)]
            _add_curve(figure, arm, curves, color)
    return {title: styled(figure, showlegend=True) for title, figure in charts.items()}


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
    name = plain_text(arm)
    figure.add_scatter(x=list(means), y=values, name=name, line_color=color, mode="lines")
