"""The HTML around charts and tables: one file that loads nothing and runs only plotly."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    import plotly.graph_objects as go

FOLDER = Path(__file__).parent
_SCRIPT = re.compile(r"<script[^>]*>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """A part of a page; one without any content is not shown.

    Attributes:
        table: rows of cells, the first of them the header. A cell is text, or `Markup`.
        charts: title -> figure.
        folded: whether it is closed until somebody opens it. Not for charts.
    """

    title: str
    note: str = ""
    warnings: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    charts: Mapping[str, go.Figure] = field(default_factory=dict)
    folded: bool = False


def render(
    title: str, status: Sequence[str], sections: Sequence[Section], groups: Sequence[Any] = ()
) -> str:
    """The page of these sections.

    Args:
        status: short words that stand below the title.
        groups: sampled trajectories, see `trajectories.sampled_groups`.
    """
    figures = (figure for section in sections for figure in section.charts.values())
    charts = [
        Markup(
            figure.to_html(
                full_html=False,
                include_plotlyjs=number == 1,  # only the first brings plotly.js
                div_id=f"chart-{number}",
                config={"displayModeBar": False},
            )
        )
        for number, figure in enumerate(figures, 1)
    ]
    loader = FileSystemLoader(FOLDER)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(
        title=title,
        status=status,
        sections=[s for s in sections if s.note or s.table or s.charts],
        groups=groups,
        next_chart=iter(charts).__next__,
        policy=_policy("".join(charts)),
        style=Markup((FOLDER / "style.css").read_text()),
        versions={package: version(package) for package in ("gspo", "plotly")},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def _policy(charts: str) -> str:
    """A content security policy under which only the scripts of these charts run."""
    digests = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(charts)]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests] or ["'none'"]
    return (
        f"default-src 'none'; script-src {' '.join(hashes)}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
