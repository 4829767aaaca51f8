"""The reports in a real browser: charts are drawn, text stays text, the console stays silent."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gspo.lab.report.comparison_page import comparison_page
from gspo.lab.report.run_page import read_runs, run_page
from lab.report.report_cases import comparison, run_folder
from lab.report.test_run_page import ATTACK

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=8000",
    "--window-size=1400,12000",  # all charts are in sight
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


def opened(page: str, tmp_path: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they wrote to the console."""
    path = tmp_path / "page.html"
    path.write_text(page)
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dom = re.sub(r"<script>.*?</script>", "", done.stdout, flags=re.DOTALL)
    return dom, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_runs_report(tmp_path: Path):
    folder = run_folder(tmp_path / "runs", text=ATTACK)
    dom, console = opened(run_page(read_runs([folder])), tmp_path)
    assert console == []
    assert dom.count('class="plotly-graph-div js-plotly-plot"') == 10
    tokens = re.findall(r'<i class="(up|down)"[^>]*>([^<]*)</i>', dom)
    assert tokens[:3] == [("up", "⟨7⟩"), ("down", "⟨8⟩"), ("up", "⟨9⟩")]


def test_a_comparisons_report(tmp_path: Path):
    dom, console = opened(comparison_page(comparison()), tmp_path)
    assert console == []
    assert dom.count('class="plotly-graph-div js-plotly-plot"') == 6


def test_the_console_would_be_heard(tmp_path: Path):
    """What the policy forbids is blocked, and the tests above would see it."""
    folder = run_folder(tmp_path / "runs")
    page = run_page(read_runs([folder])).replace(
        "</main>", "<script>document.title = 1</script></main>"
    )
    dom, console = opened(
        page.replace("</main>", "<img src='http://127.0.0.1:9/'></main>"), tmp_path
    )
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert "<title>1</title>" not in dom
