"""The report of a comparison, from what `gspo compare` stores in comparison.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gspo.lab.pictures import plain_text, styled
from gspo.lab.report.page import Section, render

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
    ends = [
        (f"{row['arm']}, {row['stress']}, {metric}", row[metric])
        for metric in ("auc", "reward_after")
        for row in summary
        if row.get(metric)
    ]
    differences = [
        (f"{row['a']} - {row['b']}, {row['stress']}, {row['metric']}", row)
        for row in paired
        if row.get("difference") is not None
    ]
    sections = [
        Section(
            "Summary",
            "Means over seeds; in brackets, the 95 % interval where there is one.",
            troubles,
            _table(_SUMMARY, summary),
            _interval_charts("Reward, 95 % intervals", ends),
        ),
        Section("Over steps", "Means over seeds, 95 % t interval.", charts=curve_charts(summary)),
        Section(
            "Paired differences",
            "First arm minus second, paired by seed, with the 95 % interval. An interval that "
            "holds 0 shows no difference.",
            table=_table(_PAIRED, paired),
            charts=_interval_charts("Differences, 95 % intervals", differences),
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


def curve_charts(summary: Sequence[Row]) -> dict[str, go.Figure]:
    """Metrics over steps, a chart for each metric and stress: means of the arms, and intervals."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    arms = list(dict.fromkeys(str(row["arm"]) for row in summary))
    charts: dict[str, go.Figure] = {}
    for metric in dict.fromkeys(name for row in summary for name in row.get("curves", {})):
        for row in summary:
            curve = row.get("curves", {}).get(metric)
            if curve:
                figure = charts.setdefault(f"{metric}, {row['stress']}", go.Figure())
                number = arms.index(str(row["arm"])) % len(qualitative.D3)
                _add_curve(figure, str(row["arm"]), curve, qualitative.D3[number])
    return {title: styled(figure, showlegend=True) for title, figure in charts.items()}


def _add_curve(figure: go.Figure, arm: str, curve: Row, color: str) -> None:
    """A mean over the band of its intervals, where they are known."""
    known = [i for i, low in enumerate(curve["low"]) if low is not None]
    steps = [curve["step"][i] for i in known]
    edge: dict[str, Any] = {"line_width": 0, "mode": "lines", "showlegend": False}
    for end, fill in (("low", None), ("high", "tonexty")):
        values = [curve[end][i] for i in known]
        figure.add_scatter(
            x=steps, y=values, fill=fill, fillcolor=f"{color}33", hoverinfo="skip", **edge
        )
    figure.add_scatter(
        x=curve["step"], y=curve["mean"], name=plain_text(arm), line_color=color, mode="lines"
    )


def _interval_charts(title: str, rows: Sequence[tuple[str, Row]]) -> dict[str, go.Figure]:
    """Labels, and means or differences with `low` and `high`, which may be None."""
    import plotly.graph_objects as go

    means = [row.get("difference", row.get("mean")) for _, row in rows]
    error: dict[str, Any] = {"type": "data", "symmetric": False}
    for side, end in (("array", "high"), ("arrayminus", "low")):
        pairs = zip(means, (row[end] for _, row in rows), strict=True)
        error[side] = [None if bound is None else abs(bound - mean) for mean, bound in pairs]
    names = [plain_text(label) for label, _ in rows]
    figure = go.Figure(go.Scatter(x=means, y=names, error_x=error, mode="markers"))
    styled(figure, height=120 + 30 * len(rows), yaxis_autorange="reversed")
    return {title: figure.update_xaxes(zerolinecolor="black")} if rows else {}
