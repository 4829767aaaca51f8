"""The HTML around charts and tables: one file that loads nothing and runs only plotly.

page.html is the frame, run.html and comparison.html are what stands in it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Charts = Mapping[str, Mapping[str, go.Figure]]
"""Section -> title -> figure."""
_SCRIPT = re.compile(r"<script[^>]*>(.*?)</script>", re.DOTALL)
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
)


def render(template: str, title: str, status: Sequence[str], charts: Charts, **content: Any) -> str:
    """The page of a template.

    Args:
        status: short words that stand below the title.
        content: what the template shows beside its charts. All text in it is escaped.
    """
    scripts: list[str] = []

    def drawn(figure: go.Figure) -> Markup:
        scripts.append(
            figure.to_html(
                full_html=False,
                include_plotlyjs=not scripts,  # only the first brings plotly.js
                div_id=f"chart-{len(scripts) + 1}",
                config={"displayModeBar": False},
            )
        )
        return Markup(scripts[-1])

    html = {name: {t: drawn(f) for t, f in figures.items()} for name, figures in charts.items()}
    return _TEMPLATES.get_template(template).render(
        title=title,
        status=status,
        charts=html,
        exp=exp,
        policy=_policy("".join(scripts)),
        versions={package: version(package) for package in ("gspo", "plotly")},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        **content,
    )


def _policy(charts: str) -> str:
    """A content security policy under which only the scripts of these charts run."""
    digests = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(charts)]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests] or ["'none'"]
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {' '.join(hashes)}; {rest}"
