"""Pictures by plotly: how they look, how they reach a file, those of an audit and an inspection."""

from __future__ import annotations

import html
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspo.core.errors import MissingDependencyError
from gspo.core.files import explained, replacing, write_whole
from gspo.lab.audit_report import AuditReport, clip_band

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from gspo.lab.inspect_report import Inspection

log = logging.getLogger("gspo")


def require_plotly() -> None:
    """Check that pictures can be drawn, before any work is done.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingDependencyError("plotly", "lab", "a report or a picture")


def write_picture(figure: go.Figure, path: Path) -> Path:
    """Write a figure, and return the path of the file that was written.

    A name that ends in `.html` needs nothing more; the file needs no network. An image (`.png`,
    `.svg`, `.pdf`) is plotly's export, by kaleido and an installed Chrome: without them the
    figure is written as HTML under the same name, with a warning that says why.

    Raises:
        RunError: the file cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".html":
        try:
            with replacing(path) as building:
                figure.write_image(building, format=path.suffix[1:] or "png", scale=1.5)
            return path
        except (ValueError, RuntimeError) as error:  # plotly says what is missing in many lines
            why = str(error).strip().splitlines()[0].rstrip(",")
            log.warning("%s is written as HTML, an image needs kaleido and Chrome: %s", path, why)
            path = path.with_suffix(".html")
    write_whole(path, figure.to_html(config={"displayModeBar": False}))
    return path


def plain_text(label: str) -> str:
    """Escape a label, in which plotly would look for markup.

    >>> plain_text("a<b>c")
    'a&lt;b&gt;c'
    """
    return html.escape(label, quote=False)


def styled(figure: go.Figure, **layout: Any) -> go.Figure:
    """The figure in the look that all pictures share."""
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "title_text": ""}
    legend["traceorder"] = "normal"
    margin = {"l": 8, "r": 12, "t": 8, "b": 8}
    figure.update_layout(template="plotly_white", height=320, legend=legend, margin=margin)
    return figure.update_yaxes(exponentformat="e", minexponent=5).update_layout(layout)


def draw_audit(report: AuditReport, log_ratios: np.ndarray, path: Path) -> Path:
    """Write the picture of an audit: l_i against the clip range, and its spread against length.

    Args:
        log_ratios: [S] l_i of the sequences.
        path: see `write_picture`.
    """
    from plotly.subplots import make_subplots

    clipped = (report.total.clipped_positive, report.total.clipped_negative)
    titles = (
        "noise clips {:.0%} of A > 0, {:.0%} of A < 0".format(*clipped),
        "spread and bias of l<sub>i</sub> against length",
    )
    figure = make_subplots(1, 2, subplot_titles=titles)
    _add_histogram(figure, report, log_ratios)
    _add_spread(figure, report)
    title = plain_text(f"{report.model}, sampled in {report.rollout_dtype}: {report.verdict}")
    styled(figure, title=title, width=1150, height=480, margin_t=90, legend={"y": -0.3})
    return write_picture(figure, path)


def _add_histogram(figure: go.Figure, report: AuditReport, log_ratios: np.ndarray) -> None:
    """Sequences by l_i; what lies outside the axis is counted in its first and last bar."""
    low, high = clip_band(report.epsilon_low, report.epsilon_high)
    left, right = np.quantile(log_ratios, (0.02, 0.98))
    left, right = min(left, max(low, -1.0)), max(right, high)
    margin = 0.1 * (right - left)
    inside = np.clip(log_ratios, left - margin, right + margin)
    # Over the whole axis, so that noise far below the clip range still has bars to be seen.
    counts, edges = np.histogram(inside, bins=60, range=(left - margin, right + margin))
    place: dict[str, Any] = {"row": 1, "col": 1}
    figure.add_bar(x=edges[:-1], y=counts, offset=0, name="sequences", **place)
    band = {"fillcolor": "green", "opacity": 0.25, "line_width": 0}
    figure.add_vrect(x0=max(low, edges[0]), x1=high, **band, **place)
    bias = report.total.sequence_log_ratio.mean
    figure.add_vline(x=bias, line_color="red", annotation_text="mean: the bias", **place)
    figure.update_xaxes(title="l<sub>i</sub> on unchanged weights; green: not clipped", **place)


def _add_spread(figure: go.Figure, report: AuditReport) -> None:
    """Spread on log-log axes, where 1/sqrt(L) is a straight line."""
    blocks = [(b.tokens, b.std) for b in report.blocks if b.blocks > 1 and b.std > 0]
    sized = [bucket for bucket in report.buckets if bucket.sequences > 1]
    points = [(bucket.tokens / bucket.sequences, bucket.sequence_log_ratio.std) for bucket in sized]
    whole = [(length, std) for length, std in points if std > 0]
    token = report.total.token_log_ratio
    longest = max(length for length, _ in [(1.5, 0.0), *blocks, *whole])
    levels = {"|mean of d<sub>t</sub>|": abs(token.mean), "ε below 1": report.epsilon_low}
    curves = {
        "spread, blocks of L": blocks,
        "spread, whole sequences": whole,
        "spread of d<sub>t</sub> / √L": [(1, token.std), (longest, token.std / longest**0.5)],
    } | {name: [(1, level), (longest, level)] for name, level in levels.items()}
    place: dict[str, Any] = {"row": 1, "col": 2}
    for name, points in curves.items():
        x, y = [length for length, _ in points], [value for _, value in points]
        figure.add_scatter(x=x, y=y, name=name, **place)
    figure.update_xaxes(type="log", title="sampled tokens L", **place)
    figure.update_yaxes(type="log", dtick=1, **place)


def draw_inspection(inspection: Inspection, path: Path) -> Path:
    """Write the picture of an inspection: the cosines of all pairs of gradients.

    Args:
        path: see `write_picture`.
    """
    import plotly.express as px

    names = [method.name for method in inspection.at[0].methods]
    cosines = np.array([at.cosines for at in inspection.at], dtype=float)
    look: dict[str, Any] = {"color_continuous_scale": "RdBu", "zmin": -1, "zmax": 1}
    look["text_auto"] = ".2f"
    figure = px.imshow(cosines, x=names, y=names, facet_col=0, **look)
    for at, title in zip(inspection.at, figure.layout.annotations, strict=True):
        title.text = f"weights {at.weights} the step ({at.source})"
    about = f"{inspection.run}, step {inspection.step}: {inspection.trained} trajectories"
    title = plain_text(f"{about} with an advantage")
    size = 240 + 40 * len(names)
    styled(figure, title=title, height=size, width=size * len(inspection.at), margin_t=90)
    return write_picture(figure, path)
