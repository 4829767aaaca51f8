"""The charts of a run, which charts.toml lists; of several runs, one curve each."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pyarrow.parquet as pq
from plotly.colors import qualitative

from gspo.experiment.saved_run import SavedRun
from gspo.lab.pictures import styled

CHARTS = tomllib.loads(Path(__file__).with_name("charts.toml").read_text(encoding="utf-8"))["chart"]
_MARKED = 60
"""Up to this many points, each one is marked."""
_BARS = 20
_DASHED = {"line_dash": "dash", "line_color": "black", "mode": "lines"}


def charts_of(runs: Sequence[SavedRun]) -> dict[str, dict[str, go.Figure]]:
    """Section -> title -> chart of `CHARTS`. Charts and sections without data are left out."""
    charts: dict[str, dict[str, go.Figure]] = {}
    for chart in CHARTS:
        if (figure := draw(chart, runs)).data:
            charts.setdefault(chart["section"], {})[chart["title"]] = figure
    if (figure := reward_histogram(runs)).data:
        charts.setdefault("Learning", {})["Trajectories by reward"] = figure
    return charts


def reward_histogram(runs: Sequence[SavedRun]) -> go.Figure:
    """How many trajectories have which reward, at the first and the last stored step of a run; of
    several runs, at the last."""
    figure = go.Figure()
    for run in runs:
        batches = run.batches
        steps = [*batches]
        first = steps[:1] if len(runs) == 1 else []
        for step in dict.fromkeys(first + steps[-1:]):
            rewards = pq.read_table(batches[step], columns=["reward"])["reward"].to_pylist()
            name = f"step {step}" if len(runs) == 1 else f"{escape(run.label)}, step {step}"
            figure.add_histogram(x=rewards, name=name, nbinsx=_BARS, opacity=0.7)
    return styled(figure, barmode="overlay", xaxis_title="reward", showlegend=True)


def draw(chart: Mapping[str, Any], runs: Sequence[SavedRun]) -> go.Figure:
    """One chart of `CHARTS`; without a curve if no run has logged any of its metrics."""
    alone, axis, extra = len(runs) == 1, chart.get("axis"), chart.get("with")
    curves = [(name, runs[0], metric) for metric, name in chart["curves"].items()]
    if not alone:
        curves = [(escape(run.label), run, next(iter(chart["curves"]))) for run in runs]
    figure = go.Figure()
    for (name, run, metric), color in zip(curves, cycle(qualitative.D3), strict=False):
        series = run.series(metric)
        steps, values = [*series], [*series.values()]
        if not steps or (chart.get("unless_zero") and not any(values)):
            continue
        if axis == "log":
            name += "" if any(values) else ", always 0"
            values = [abs(value) if value else None for value in values]
        mode = "lines" if len(steps) > _MARKED else "lines+markers"
        look = {"mode": mode, "line_color": color, "hovertemplate": f"%{{y}} ({metric})"}
        figure.add_scatter(x=steps, y=values, name=escape(name) if alone else name, **look)
        if extra == "held-out":
            _add_heldout(figure, run, "" if alone else f"{name}, ", color)
    styled(figure, hovermode="x unified", xaxis_title="step", showlegend=True)
    figure.update_yaxes(title=None if alone else curves[0][2])
    if axis == "log":
        figure.update_yaxes(type="log", exponentformat="power")
    else:
        figure.update_yaxes(rangemode="tozero", tickformat=".0%" if axis == "share" else None)
    if figure.data and alone and extra in ("clip range", "norm limit"):
        _add_limits(figure, extra, runs[0])
    return figure


def _add_heldout(figure: go.Figure, run: SavedRun, name: str, color: str) -> None:
    heldout = run.evaluations
    means = [e.mean for e in heldout.values()]
    above = [0.0 if e.high is None else e.high - e.mean for e in heldout.values()]
    below = [0.0 if e.low is None else e.mean - e.low for e in heldout.values()]
    error = {"type": "data", "array": above, "arrayminus": below}
    look: dict[str, Any] = {"mode": "markers", "marker_size": 9, "marker_color": color}
    name += "held-out, 95 % interval"
    figure.add_scatter(x=[*heldout], y=means, error_y=error, name=name, **look)


def _add_limits(figure: go.Figure, what: str, run: SavedRun) -> None:
    """Dashed lines: the clip range of sequences, or the limit of the gradient's norm."""
    limit = run.settings.max_grad_norm if run.settings else None
    # Without the settings: noise is compared with the range only if the range is of sequences.
    noise = run.values("mismatch/clip_fraction")
    by_sequence = run.settings.objective.per_sequence if run.settings else noise
    if what == "clip range" and by_sequence:
        for end, sign in (("low", -1), ("high", 1)):
            series = run.series(f"ratio/epsilon_{end}")
            edges = [math.log1p(sign * v) if v and sign * v > -1 else None for v in series.values()]
            figure.add_scatter(x=[*series], y=edges, name=f"clip range, {end}", **_DASHED)
    elif what == "norm limit" and limit is not None:
        figure.add_hline(limit, line_dash="dash", annotation_text="clipped above")
