"""The HTML around the figures: one file, no request, nothing executed but its own two scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gspo.core.errors import MissingDependencyError
from gspo.core.files import write_whole
from gspo.lab.report.figure import Chart

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("charts.js", "trajectories.js", "live.js")


@dataclass(frozen=True)
class Live:
    """How long an open page waits before it loads itself anew; None: it is finished.

    Attributes:
        every: seconds.
        patience: seconds without news after which the page takes the run for dead.
    """

    every: float
    patience: float


def require_plotly() -> str:
    """The text of plotly.js.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingDependencyError("plotly", "lab", "the report") from None
    return get_plotlyjs()


def render(
    template: str,
    title: str,
    charts: Iterable[Chart],
    *,
    trajectories: Any = None,
    live: Live | None = None,
    **values: Any,
) -> str:
    """The page of a template.

    Args:
        template: a file of `assets`.
        charts: every figure that the template shows.
        trajectories: for the browser of trajectories, or None.
        live: None where nobody will write the page again.
        values: for the template.
    """
    plotly, plotly_hash = _plotly()
    script, script_hash = _script()
    state = {"live": live is not None, "written": time.time()}
    if live is not None:
        state |= {"every": round(live.every), "patience": round(live.patience)}
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            policy=(
                f"default-src 'none'; script-src {plotly_hash} {script_hash}; "
                "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
            ),
            style=Markup((ASSETS / "style.css").read_text()),
            plotly=Markup(plotly),
            script=Markup(script),
            chart_data=embedded_json({chart.id: chart.figure() for chart in charts}),
            trajectory_data=None if trajectories is None else embedded_json(trajectories),
            live_data=embedded_json(state),
            live=state,
            written=datetime.now(UTC),
            versions={"gspo": _version("gspo"), "plotly": _version("plotly")},
            **values,
        )
    )


def embedded_json(value: Any) -> Markup:
    """JSON that can stand inside a <script> element, whatever text it holds.

    >>> embedded_json({"text": "</script>"})
    Markup('{"text":"\\\\u003c/script\\\\u003e"}')
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=_plain)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def write_page(path: Path, page: str) -> None:
    """Write a file so that a reader sees the old page or the new one.

    Raises:
        RunError: it cannot be written.
    """
    write_whole(path, page)


@cache
def _plotly() -> tuple[str, str]:
    return _as_script(require_plotly())


@cache
def _script() -> tuple[str, str]:
    return _as_script("\n".join((ASSETS / name).read_text() for name in SCRIPTS))


def _as_script(source: str) -> tuple[str, str]:
    """Script text that HTML passes on unchanged, and its hash for the content security policy."""
    source = (
        source.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")
    )
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return source, f"'sha256-{digest}'"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of a source tree"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in a report")
