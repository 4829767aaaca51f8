"""Pictures by plotly: how they look, how they reach a file, those of an audit and an inspection."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspo.core.errors import MissingDependencyError
from gspo.core.files import explained, replacing, write_whole
from gspo.core.log import log
from gspo.lab.audit_report import clip_band

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
    figure is written as `<name>.png.html`, with a warning that says why.

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
            path = path.with_name(f"{path.name}.html")
    page = figure.to_html(config={"displayModeBar": False})
    title = f"<head><title>{figure.layout.title.text or path.stem} · gspo</title>"  # type: ignore
    write_whole(path, page.replace("<head>", title, 1))
    return path


def styled(figure: go.Figure, **layout: Any) -> go.Figure:
    """The figure in the look that all pictures share."""
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "title_text": ""}
    legend["traceorder"] = "normal"
    margin = {"l": 8, "r": 12, "t": 8, "b": 8}
    figure.update_layout(template="plotly_white", height=320, legend=legend, margin=margin)
    return figure.update_yaxes(exponentformat="e", minexponent=5).update_layout(layout)


def draw_audit(report: Mapping[str, Any], log_ratios: np.ndarray, path: Path) -> Path:
    """Write the picture of an audit: l_i of the sequences against the clip range.

    What lies outside the axis is counted in its first and last bar.

    Args:
        report: see `audit_report.make_report`.
        log_ratios: [S] l_i of the sequences.
        path: see `write_picture`.
    """
    import plotly.graph_objects as go

    low, high = clip_band(report["epsilon_low"], report["epsilon_high"])
    left, right = np.quantile(log_ratios, (0.02, 0.98))
    left, right = min(left, max(low, -1.0)), max(right, high)
    margin = 0.1 * (right - left)
    ends = (left - margin, right + margin)
    # Over the whole axis, so that noise far below the clip range still has bars to be seen.
    bins = {"start": ends[0], "end": ends[1], "size": (ends[1] - ends[0]) / 60}
    figure = go.Figure()
    figure.add_histogram(x=np.clip(log_ratios, *ends), xbins=bins, name="sequences")
    figure.add_vrect(x0=max(low, ends[0]), x1=high, fillcolor="green", opacity=0.25, line_width=0)
    bias = report["total"]["sequence_log_ratio"]["mean"]
    figure.add_vline(x=bias, line_color="red", annotation_text="mean: the bias")
    clipped = (
        "clipped by noise alone: {clipped_positive:.0%} of A > 0, {clipped_negative:.0%} of A < 0"
    )
    figure.update_xaxes(title="l<sub>i</sub> on unchanged weights; green: not clipped")
    figure.update_yaxes(title="sequences")
    title = escape("{model}, sampled in {rollout_dtype}: {verdict}".format(**report))
    title = {"text": title, "subtitle_text": clipped.format(**report["total"])}
    return write_picture(styled(figure, title=title, width=800, height=480, margin_t=90), path)


def draw_inspection(inspection: Mapping[str, Any], path: Path) -> Path:
    """Write the picture of an inspection: the cosines of all pairs of gradients.

    Args:
        inspection: see `inspect_batch.inspect_run`.
        path: see `write_picture`.
    """
    import plotly.express as px

    sides = inspection["at"]
    names = [method["name"] for method in sides[0]["methods"]]
    cosines = np.array([at["cosines"] for at in sides], dtype=float)
    look: dict[str, Any] = {"color_continuous_scale": "RdBu", "zmin": -1, "zmax": 1}
    look["text_auto"] = ".2f"
    figure = px.imshow(cosines, x=names, y=names, facet_col=0, **look)
    for at, title in zip(sides, figure.layout.annotations, strict=True):
        title.text = f"weights {at['weights']} the step ({at['source']})"
    about = "{run}, step {step}: {trained} trajectories with an advantage".format(**inspection)
    size = 240 + 40 * len(names)
    shape = {"height": size, "width": size * len(sides), "margin_t": 90}
    return write_picture(styled(figure, title=escape(about), **shape), path)
