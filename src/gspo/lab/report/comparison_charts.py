"""The charts of a comparison: arms as colors, one chart for each stress."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gspo.lab.report.figure import (
    Chart,
    axis,
    band,
    color_of,
    curve,
    dash_of,
    dots,
    over_steps,
    plain_text,
)
from gspo.lab.report.seeds import seed_curve

Rows = Sequence[Mapping[str, Any]]
NO_DIFFERENCE = "no difference shown"
_SHARES = ("ratio/clip_fraction", "moe/experts_changed", "moe/tokens_changed", "mismatch/clip")
_ROW = 46


def stress_label(stress: Any) -> str:
    """A stress by its parts.

    >>> stress_label({"rollout_dtype": "int4", "epochs": 2}), stress_label({})
    ('rollout_dtype=int4, epochs=2', 'none')
    """
    if not stress:
        return "none"
    if isinstance(stress, str):
        return stress
    parts = ((k, v if isinstance(v, str) else json.dumps(v)) for k, v in stress.items())
    return ", ".join(f"{key}={value}" for key, value in parts)


def arms_of(comparison: Mapping[str, Any]) -> list[str]:
    """In the order in which they first appear."""
    rows = [*comparison.get("summary", ()), *comparison.get("cells", ())]
    return list(dict.fromkeys(str(row["arm"]) for row in rows))


def curve_charts(comparison: Mapping[str, Any], metric: str, *, height: int = 300) -> list[Chart]:
    """A metric over steps: of each stress, the arms' means over seeds and their 95 % bands."""
    cells = [cell for cell in comparison.get("cells", ()) if metric in (cell.get("curves") or {})]
    arms = arms_of(comparison)
    charts = []
    for stress in dict.fromkeys(stress_label(cell.get("stress")) for cell in cells):
        data = []
        for index, arm in enumerate(arms):
            own = [
                cell["curves"][metric]
                for cell in cells
                if str(cell["arm"]) == arm and stress_label(cell.get("stress")) == stress
            ]
            if own:
                data += _mean_and_band(own, arm, index)
        seeds = sorted({cell.get("seed") for cell in cells}, key=str)
        note = f"Mean over up to {len(seeds)} seeds, 95 % t interval."
        kind = "share" if metric.startswith(_SHARES) else ""
        chart = Chart(
            f"{metric} {stress}", f"Stress: {stress}", note, data, over_steps(kind), (), height
        )
        charts.append(chart)
    return charts


def _mean_and_band(own: Sequence[Mapping[str, Any]], arm: str, index: int) -> list[dict[str, Any]]:
    found, color = seed_curve(own), color_of(index)
    known = [i for i, low in enumerate(found.low) if low is not None]
    steps = [found.steps[i] for i in known]
    edges = ([found.low[i] for i in known], [found.high[i] for i in known])
    area = band("", steps, *edges, color) if known else []
    return [*area, curve(arm, found.steps, found.mean, color, dash=dash_of(index))]


ENDS = (
    ("reward_after", "Reward at the end", "Held-out reward, 95 % interval over seeds.", ""),
    ("auc", "Area under the reward curve", "Mean of the held-out reward over the run.", ""),
    ("collapsed", "Collapsed", "Share of the seeds that collapsed, 95 % interval.", "share"),
    ("seconds", "Time", "Seconds of a run, mean over seeds.", "count"),
    ("tokens", "Tokens", "Sampled tokens of a run, mean over seeds.", "count"),
)


def end_charts(comparison: Mapping[str, Any]) -> list[Chart]:
    """The summary's columns, by stress."""
    summary: Rows = comparison.get("summary", ())
    arms, charts = arms_of(comparison), []
    for key, title, note, kind in ENDS:
        data = []
        for index, arm in enumerate(arms):
            rows = [
                (stress_label(row.get("stress")), *bounds(row[key]))
                for row in summary
                if str(row["arm"]) == arm and row.get(key) is not None
            ]
            rows = [row for row in rows if row[1] is not None]
            if rows:
                x, mean, low, high = (list(column) for column in zip(*rows, strict=True))
                x = [plain_text(label).replace(", ", "<br>") for label in x]
                data.append(dots(arm, x, mean, low, high, color_of(index), offsetgroup=arm))
        if data:
            layout = axis(kind) | {"scattermode": "group", "xaxis": {"type": "category"}}
            charts.append(Chart(f"end {key}", title, note, data, layout))
    return charts


def bounds(value: Any) -> tuple[Any, Any, Any]:
    """Mean, low and high of a number or of a mapping that has them."""
    if not isinstance(value, Mapping):
        return value, value, value
    mean = value.get("mean")
    low, high = value.get("low"), value.get("high")
    return mean, mean if low is None else low, mean if high is None else high


def forest_charts(comparison: Mapping[str, Any]) -> list[Chart]:
    """Paired differences of each metric, with zero marked."""
    paired: Rows = comparison.get("paired", ())
    charts = []
    for metric in dict.fromkeys(str(row["metric"]) for row in paired):
        rows = [r for r in paired if r["metric"] == metric and r.get("difference") is not None]
        names = [_pair(row) for row in rows]
        data = [
            _differences(name, [r for r in rows if shown(r) == wanted], color)
            for wanted, name, color in (
                (True, "difference shown", "@blue"),
                (False, NO_DIFFERENCE, "@grey"),
            )
        ]
        layout = {
            "yaxis": {
                "type": "category",
                "categoryorder": "array",
                "categoryarray": names[::-1],
                "range": [-0.6, len(names) - 0.4],
            },
            "xaxis": {"zeroline": False, "hoverformat": ".4g"},
            "hovermode": "closest",
            "shapes": [
                {
                    "type": "line",
                    "yref": "paper",
                    "x0": 0,
                    "x1": 0,
                    "y0": 0,
                    "y1": 1,
                    "line": {"color": "@red", "width": 1.5, "dash": "dash"},
                }
            ],
        }
        note = "First arm minus second, paired by seed, 95 % interval. Across the dashed line: "
        note += f"{NO_DIFFERENCE}."
        data = [trace for trace in data if trace["y"]]
        if data:
            height = 90 + _ROW * len(names)
            charts.append(Chart(f"forest {metric}", metric, note, data, layout, (), height))
    return charts


def shown(row: Mapping[str, Any]) -> bool:
    """Whether the interval of a paired difference is known and leaves zero out."""
    low, high = row.get("low"), row.get("high")
    return low is not None and high is not None and not low <= 0 <= high


def _pair(row: Mapping[str, Any]) -> str:
    pair = plain_text(f"{row['a']} − {row['b']}")  # noqa: RUF001  (a minus, as read)
    return f"{pair}<br>{plain_text(stress_label(row.get('stress')))}"


def _differences(name: str, rows: Rows, color: str) -> dict[str, Any]:
    values = [bounds(dict(row) | {"mean": row["difference"]}) for row in rows]
    mean, low, high = ([value[i] for value in values] for i in range(3))
    found = dots(name, mean, mean, low, high, color)
    return found | {"y": [_pair(row) for row in rows], "error_x": found.pop("error_y")}
