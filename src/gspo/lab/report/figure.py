"""Parts of figures, in plotly's own JSON: curves, bands, bars.

A color is a name such as `@blue` or `@blue/0.2`, which the page resolves for light, dark and print.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COLORS = ("@blue", "@orange", "@green", "@purple", "@sky", "@amber", "@red", "@grey")
POINTS = 1000
"""More steps than this are drawn as means of neighbours."""
WINDOW = 9
_FEW = 40

Values = Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A figure with its words.

    Attributes:
        id: unique in the page.
        title, note: what it shows.
        data, layout: as plotly takes them; the page adds fonts, colors and margins.
        warnings: what the data show to be wrong.
        height: in pixels.
    """

    id: str
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    warnings: Sequence[str] = field(default_factory=tuple)
    height: int = 300

    def figure(self) -> dict[str, Any]:
        """What is embedded in the page."""
        return {"data": self.data, "layout": self.layout}


def color_of(index: int) -> str:
    """Of a run or an arm."""
    return COLORS[index % len(COLORS)]


def dash_of(index: int) -> str:
    """Tells apart what has the same color again."""
    return ("solid", "dash", "dot", "dashdot")[index // len(COLORS) % 4]


def plain_text(label: str) -> str:
    """A label in which plotly finds no markup of its own.

    >>> plain_text("a<b>c")
    'a&lt;b&gt;c'
    """
    return html.escape(label, quote=False)


def curve(
    label: str, steps: Sequence[float], values: Values, color: str, **options: Any
) -> dict[str, Any]:
    """A line; with markers where there are few points. `width` and `dash` are the line's."""
    style = {"color": color, "width": options.pop("width", 2), "dash": options.pop("dash", "solid")}
    steps, values = thin(steps, values)
    few = len(steps) <= _FEW
    out = {"type": "scatter", "name": plain_text(label), "line": style}
    out |= {"x": steps, "y": values}
    out |= {"mode": "lines+markers" if few else "lines", "marker": {"size": 5, "color": color}}
    return out | options


def band(
    label: str, steps: Sequence[float], low: Values, high: Values, color: str, **options: Any
) -> list[dict[str, Any]]:
    """The area between two lines; named once in the legend where it has a label."""
    steps_low, low = thin(steps, low)
    steps_high, high = thin(steps, high)
    edge = {"type": "scatter", "mode": "lines", "line": {"width": 0, "color": color}}
    shared = edge | {"hoverinfo": "skip", "showlegend": False} | options
    fill = {"fill": "tonexty", "fillcolor": f"{color}/0.22", "name": plain_text(label)}
    return [
        shared | {"x": steps_low, "y": low},
        shared | {"x": steps_high, "y": high, "showlegend": bool(label)} | fill,
    ]


def rule(label: str, steps: Sequence[float], values: Values, color: str = "@red") -> dict[str, Any]:
    """A dashed line that others are compared with."""
    return curve(label, steps, values, color, dash="dash", width=1.5, mode="lines")


def dots(
    label: str,
    x: Sequence[Any],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    color: str,
    **options: Any,
) -> dict[str, Any]:
    """Means with their intervals."""
    error = {
        "type": "data",
        "symmetric": False,
        "array": [h - v for h, v in zip(high, y, strict=True)],
        "arrayminus": [v - w for v, w in zip(y, low, strict=True)],
        "color": color,
        "thickness": 1.5,
        "width": 4,
    }
    marker = {"size": 8, "color": color, "line": {"width": 1, "color": "@card"}}
    out = {"type": "scatter", "mode": "markers", "marker": marker, "cliponaxis": False}
    out["name"] = plain_text(label)
    return out | {"x": list(x), "y": list(y), "error_y": error} | options


def bars(label: str, x: Sequence[Any], values: Values, color: str) -> dict[str, Any]:
    """One part of stacked bars."""
    x, values = thin(x, values)
    out = {"type": "bar", "name": plain_text(label), "marker": {"color": color}}
    return out | {"x": x, "y": values}


def axis(kind: str = "", **options: Any) -> dict[str, Any]:
    """The y axis of a `share` (0 to 1), a `count`, a `log` scale, or of plain numbers."""
    if kind == "share":
        own: dict[str, Any] = {"tickformat": ".0%", "hoverformat": ".1%", "rangemode": "tozero"}
    elif kind == "log":
        own = {"type": "log", "dtick": 1, "exponentformat": "power", "hoverformat": ".2e"}
    elif kind == "count":
        own = {"hoverformat": ",.4~r", "exponentformat": "SI", "rangemode": "tozero"}
    else:
        own = {"hoverformat": ".4g", "exponentformat": "e"}
    return {"yaxis": own | options}


def over_steps(kind: str = "", **options: Any) -> dict[str, Any]:
    """`axis` over the steps of a run."""
    return axis(kind, **options) | {"xaxis": {"title": {"text": "step"}, "hoverformat": "d"}}


def smoothed(values: Values, width: int = WINDOW) -> list[float | None]:
    """Centred moving mean of what is known; shorter at the ends.

    >>> smoothed([0.0, 3.0, 6.0], width=3)
    [1.5, 3.0, 4.5]
    """
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [_mean(window) for window in windows]


def thin(steps: Sequence[Any], values: Values) -> tuple[list[Any], list[float | None]]:
    """At most `POINTS` points: means of neighbours, at the last of their steps."""
    width = -(-len(steps) // POINTS) or 1
    if width == 1:
        return list(steps), list(values)
    starts = range(0, len(steps), width)
    ends = [min(start + width, len(steps)) - 1 for start in starts]
    return [steps[end] for end in ends], [_mean(values[a : a + width]) for a in starts]


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
