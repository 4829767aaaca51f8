"""`gspo report`: which page, where it goes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gspo.cli import app
from gspo.core.errors import ConfigError, MissingDependencyError, RunError
from gspo.lab import pictures
from gspo.lab.commands import draw
from gspo.lab.report.write import make_report
from lab.report.report_cases import comparison, run_folder


def test_the_command_writes_beside_the_run_or_where_it_is_told(tmp_path: Path):
    one, two = run_folder(tmp_path, "one"), run_folder(tmp_path, "two")
    result = CliRunner().invoke(app, ["report", str(one)])
    assert result.output == f"report: {one / 'report.html'}\n"
    assert (one / "report.html").read_text().startswith("<!DOCTYPE html>")
    out = tmp_path / "both.html"
    result = CliRunner().invoke(app, ["report", str(one), str(two), "--out", str(out)])
    assert result.exit_code == 0 and out.exists()


def test_the_command_knows_a_comparison(tmp_path: Path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()))
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0
    assert "sort: three methods" in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="give only it"):
        make_report([tmp_path, run_folder(tmp_path / "r")], tmp_path / "x.html")
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(RunError, match=r"comparison\.json is damaged"):
        make_report([tmp_path])


def test_the_command_refuses_with_the_remedy(tmp_path: Path):
    one, two = run_folder(tmp_path, "one"), run_folder(tmp_path, "two")
    with pytest.raises(ConfigError, match="--out FILE"):
        make_report([one, two])
    with pytest.raises(RunError, match=r"cannot write .*x\.html: No such"):
        make_report([one], tmp_path / "no" / "such" / "x.html")
    assert not list(tmp_path.rglob(".*html*"))


def test_a_missing_plotly_is_named_with_the_command(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    folder = run_folder(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[lab\]'"):
        make_report([folder])
    assert draw(folder) == {"report": None}
    assert capsys.readouterr().out.startswith("no report: a report or a picture needs the package")


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys):
    folder = run_folder(tmp_path)
    (folder / "report.html").mkdir()
    (folder / "report.html" / "file").touch()
    assert draw(folder) == {"report": None}
    assert "no report: cannot write" in capsys.readouterr().out
