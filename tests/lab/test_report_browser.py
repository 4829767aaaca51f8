"""The reports in a real browser: charts are drawn, text stays text, the console stays silent."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gspo.lab.report.comparison import comparison_page
from gspo.lab.report.data import read_runs
from gspo.lab.report.run_page import run_page
from lab.report_cases import comparison, run_folder
from lab.test_report import ATTACK

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


def opened(page: str, tmp_path: Path, scheme: int) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they wrote to the console."""
    path = tmp_path / "page.html"
    path.write_text(page)
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dom = re.sub(r"<script>.*?</script>", "", done.stdout, flags=re.DOTALL)
    return dom, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_runs_report(tmp_path: Path, scheme: int):
    folder = run_folder(tmp_path / "runs", text=ATTACK)
    dom, console = opened(run_page(read_runs([folder])), tmp_path, scheme)
    assert console == []
    assert dom.count('data-figure="') == dom.count('class="chart js-plotly-plot"') > 8
    tokens = re.findall(r'<span class="tok (up|down)"[^>]*>([^<]*)</span>', dom)
    assert tokens[:3] == [("up", "⟨7⟩"), ("down", "⟨8⟩"), ("up", "⟨9⟩")]
    assert '<span class="chip clipped">clipped</span>' in dom
    background = {0: "rgb(231, 234, 238)", 1: "rgb(26, 32, 44)"}[scheme]
    assert background in dom  # the charts' text, in the color of the scheme


def test_a_comparisons_report(tmp_path: Path):
    dom, console = opened(comparison_page(comparison()), tmp_path, 1)
    assert console == []
    # Those of closed parts are drawn when they are opened.
    assert dom.count('class="chart js-plotly-plot"') == 2 + 5 + 1


def test_the_console_would_be_heard(tmp_path: Path):
    """What the policy forbids is blocked, and the tests above would see it."""
    folder = run_folder(tmp_path / "runs")
    page = run_page(read_runs([folder])).replace(
        "</main>", "<script>document.title = 1</script></main>"
    )
    dom, console = opened(
        page.replace("</main>", "<img src='http://127.0.0.1:9/'></main>"), tmp_path, 1
    )
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert "<title>1</title>" not in dom
