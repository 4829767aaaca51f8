"""Pictures reach a file: HTML always, an image where plotly can export one."""

from __future__ import annotations

import logging
from pathlib import Path

import plotly.graph_objects as go
import pytest

from gspo.core.errors import RunError
from gspo.lab.pictures import write_picture

FIGURE = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))


def test_html_stands_alone(tmp_path: Path):
    path = write_picture(FIGURE, tmp_path / "deep" / "a.html")
    assert path == tmp_path / "deep" / "a.html"
    text = path.read_text()
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
    with caplog.at_level(logging.WARNING, "gspo"):
        path = write_picture(FIGURE, tmp_path / "a.png")
    assert path == tmp_path / "a.html" and path.exists()
    assert not (tmp_path / "a.png").exists()
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
