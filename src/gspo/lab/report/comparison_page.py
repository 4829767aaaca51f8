"""The report of a comparison, from what `gspo compare` stores in comparison.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

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
}  # fmt: skip
"""Fields of comparison.json, and the format of their numbers: the columns of a table."""


def comparison_page(comparison: Row, folder: Path | None = None) -> str:
    """The page of a comparison.

    Args:
        comparison: the object of comparison.json.
        folder: where that lies; links go to the cells' own reports that exist there.
    """
    cells, summary, paired = (comparison.get(key, ()) for key in ("cells", "summary", "paired"))
    counts = Counter(str(cell.get("status")) for cell in cells)
    status = [f"{count} {name}" for name, count in counts.items()]
    status += ["quick: smaller than the whole comparison"] if comparison.get("quick") else []
    troubles = [
        f"{cell['id']} ({cell['status']}): {cell['error']}" for cell in cells if cell.get("error")
    ]
    linked = [{**cell, "id": _linked(cell, folder)} for cell in cells]
    origin = [[key, json.dumps(comparison.get(key))] for key in ("spec", "versions", "machine")]
    ends = [
        (f"{row['arm']}, {stress_label(row)}", metric, row[metric])
        for metric in ("auc", "reward_after")
        for row in summary
        if row.get(metric)
    ]
    differences = [
        (
            f"{row['a']} - {row['b']}, {stress_label(row)}",
            row["metric"],
            row | {"mean": row["difference"]},
        )
        for row in paired
        if row.get("difference") is not None
    ]
    sections = [
        Section(
            "Summary",
            "Means over seeds; in brackets, the 95 % interval where there is one.",
            troubles,
            _table(_SUMMARY, summary),
            {"Reward, 95 % intervals": interval_chart(ends)} if ends else {},
        ),
        Section("Over steps", "Means over seeds, 95 % t interval.", charts=curve_charts(summary)),
        Section(
            "Paired differences",
            "First arm minus second, paired by seed, with the 95 % interval. An interval that "
            "holds 0 shows no difference.",
            table=_table(_PAIRED, paired),
            charts={"Differences, 95 % intervals": interval_chart(differences)}
            if differences
            else {},
        ),
        Section("All cells", table=_table(_CELLS, linked), folded=True),
        Section("Specification", table=[["", ""], *origin], folded=True),
    ]
    return render(str(comparison.get("name", "comparison")), status, sections)


def stress_label(row: Row) -> str:
    """The stress of a row by its parts.

    >>> stress_label({"stress": {"rollout_dtype": "int4", "epochs": 2}}), stress_label({})
    ('rollout_dtype=int4, epochs=2', 'no stress')
    """
    parts = row.get("stress") or {}
    return ", ".join(f"{key}={value}" for key, value in parts.items()) or "no stress"


def _table(columns: Mapping[str, str], rows: Sequence[Row]) -> list[list[str]]:
    header = [name.replace("_", " ") for name in columns]
    texts = [
        [
            _text({**row, "stress": stress_label(row)}.get(name), form)
            for name, form in columns.items()
        ]
        for row in rows
    ]
    return [header, *texts]


def _text(value: Any, form: str) -> str:
    """A number, or a mean with its interval; '' for what is not known."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        ends = [_text(value.get(end), form) for end in ("low", "high")]
        return _text(value.get("mean"), form) + (f" [{', '.join(ends)}]" if all(ends) else "")
    return format(value, form) if form else value if isinstance(value, str) else str(value)


def _linked(cell: Row, folder: Path | None) -> str:
    """The name of a cell, as a link to its run's own report if that exists below `folder`."""
    if not cell.get("run") or folder is None:
        return str(cell["id"])
    base = folder.resolve()
    page = (base / str(cell["run"]) / "report.html").resolve()
    if not page.is_relative_to(base) or not page.exists():
        return str(cell["id"])
    address = quote(page.relative_to(base).as_posix())
    return Markup('<a href="./{}">{}</a>').format(address, cell["id"])


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
                figure = charts.setdefault(f"{metric}, {stress_label(row)}", go.Figure())
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


def interval_chart(rows: Sequence[tuple[str, str, Row]]) -> go.Figure:
    """Means with their intervals, one below the other.

    Args:
        rows: of each mean its label, its metric, and `mean`, `low` and `high`, which may be None.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for metric in dict.fromkeys(metric for _, metric, _ in rows):
        chosen = [(label, row) for label, name, row in rows if name == metric]
        means = [row["mean"] for _, row in chosen]
        above = [_minus(row["high"], row["mean"]) for _, row in chosen]
        below = [_minus(row["mean"], row["low"]) for _, row in chosen]
        names = [plain_text(f"{label}, {metric}") for label, _ in chosen]
        error = {"type": "data", "array": above, "arrayminus": below}
        figure.add_scatter(x=means, y=names, error_x=error, name=metric, mode="markers")
    styled(figure, height=120 + 30 * len(rows), yaxis_autorange="reversed")
    return figure.update_xaxes(zerolinecolor="black")


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
