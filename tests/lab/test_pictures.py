"""Pictures reach a file: HTML always, an image where plotly can export one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from gspo.core.errors import RunError
from gspo.lab import pictures
from gspo.lab.pictures import write_picture
from lab.test_audit_report import synthetic

FIGURE = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))


def test_html_stands_alone(tmp_path: Path):
    path = write_picture(FIGURE, tmp_path / "deep" / "a.html")
    assert path == tmp_path / "deep" / "a.html"
    text = path.read_text()
    assert "<title>a · gspo</title>" in text
    assert "Plotly.newPlot" in text and "src=" not in text.partition("<body>")[0]


def test_an_image_is_plotlys_own_export(tmp_path: Path, monkeypatch):
    asked = {}

    def write_image(figure: go.Figure, file: Path, **options: object) -> None:
        asked.update(options)
        file.write_bytes(b"image")

    monkeypatch.setattr(go.Figure, "write_image", write_image)
    path = write_picture(FIGURE, tmp_path / "a.svg")
    assert path.read_bytes() == b"image" and asked["format"] == "svg"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])  # without kaleido; without Chrome
def test_without_an_export_it_is_written_as_html_and_said(tmp_path, monkeypatch, caplog, kind):
    def write_image(figure: go.Figure, file: Path, **options: object) -> None:
        raise kind("\nKaleido is not there\nmore")

    monkeypatch.setattr(go.Figure, "write_image", write_image)
    (tmp_path / "a.html").write_text("of before")
    with caplog.at_level(logging.WARNING, "gspo"):
        path = write_picture(FIGURE, tmp_path / "a.png")
    assert path == tmp_path / "a.png.html" and path.exists()
    assert not (tmp_path / "a.png").exists()
    assert (tmp_path / "a.html").read_text() == "of before"
    assert "an image needs kaleido and Chrome: Kaleido is not there" in caplog.text


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*a\.html"):
        write_picture(FIGURE, tmp_path / "file" / "a.html")


def test_a_png_comes_out_where_kaleido_and_chrome_are(tmp_path: Path):
    pytest.importorskip("kaleido")
    path = write_picture(FIGURE, tmp_path / "a.png")
    if path.suffix == ".html":
        pytest.skip("needs Chrome")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_noise_far_below_the_clip_range_has_bars_inside_the_band(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "write_picture", lambda figure, path: drawn.append(figure))
    report = synthetic([8] * 20, 1e-9)
    pictures.draw_audit(report, np.linspace(-1e-9, 1e-9, 20), tmp_path / "a.html")
    bars = drawn[0].data[0]
    assert len(bars.x) == 20
    assert bars.xbins.start < -3e-4 and bars.xbins.end > 4e-4  # the whole clip range
    band = drawn[0].layout.shapes[0]
    assert (band.x0, band.x1) == pytest.approx((-3e-4, 4e-4), rel=1e-3)
