"""The report of a run that is alive: written again and again, and never in the run's way."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

import gspo.lab.report.live as live_module
from gspo.backend.run import Run
from gspo.experiment.heldout import Estimate
from gspo.experiment.loop import run_experiment
from gspo.experiment.spec import Spec
from gspo.lab.report.data import read_runs
from gspo.lab.report.live import LiveReport, liveliness, watch_report
from lab.report_cases import run_folder


class Seen:
    """A watch that keeps what the page said at each call."""

    def __init__(self, page: Path):
        self.page = page
        self.calls: list[str] = []
        self.live: list[bool] = []

    def _look(self, call: str) -> None:
        self.calls.append(call)
        if self.page.exists():
            self.live.append(is_live(self.page))

    def started(self, spec: Spec, step: int, changed: list[str]) -> None:
        self._look("started")

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self._look("stepped")

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self._look("evaluated")


def is_live(page: Path) -> bool:
    text = page.read_text()
    start = text.index('id="live-data">') + len('id="live-data">')
    return json.loads(text[start : text.index("</script>", start)])["live"]


def small(path: Path, steps: int = 2) -> Spec:
    return Spec(
        path=str(path), task="sort", steps=steps, prompts=4, completions=4, eval_prompts=4,
        learning_rate=1e-3,
    )  # fmt: skip


async def test_a_run_keeps_its_report_up_to_date_and_is_not_changed_by_it(tmp_path: Path):
    page = tmp_path / "a" / "gspo" / "run" / "report.html"
    seen = Seen(page)
    with LiveReport(seen, every=0.0) as live:
        with_report = await run_experiment(small(tmp_path / "a"), live)
    assert seen.calls == ["started", "evaluated", "stepped", "stepped", "evaluated"]
    assert seen.live == [True] * 4  # `started` comes before the first page
    assert live.path == page
    assert not is_live(page)
    assert "2 of 2" in page.read_text()

    without = await run_experiment(small(tmp_path / "b"), Seen(tmp_path / "none"))
    weights = [
        (run / "checkpoints" / "0002" / "model.safetensors").read_bytes()
        for run in (with_report.run, without.run)
    ]
    assert weights[0] == weights[1]
    assert not (without.run / "report.html").exists()


def test_a_broken_run_leaves_a_page_that_waits_for_nothing(tmp_path: Path):
    folder = run_folder(tmp_path)
    with pytest.raises(KeyboardInterrupt), LiveReport(Seen(tmp_path / "none")) as live:
        live.started(Spec(path=str(tmp_path), project="p", name="m", task="sort"), 0, [])
        assert is_live(folder / "report.html")
        raise KeyboardInterrupt
    assert not is_live(folder / "report.html")


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog):
    folder = run_folder(tmp_path)
    (folder / "report.html").mkdir()
    seen = Seen(tmp_path / "none")
    with caplog.at_level(logging.WARNING, "gspo"), LiveReport(seen, every=0.0) as live:
        live.started(Spec(path=str(tmp_path), project="p", name="m", task="sort"), 0, [])
        for step in (1, 2, 3):
            live.stepped(step, {})
        assert len(caplog.records) == 1
    assert "not kept up to date: cannot write" in caplog.text
    assert seen.calls == ["started", *["stepped"] * 3]
    assert live.path is None


def test_without_plotly_there_is_no_report_and_no_complaint(tmp_path: Path, monkeypatch, caplog):
    folder = run_folder(tmp_path)
    monkeypatch.setattr(live_module, "find_spec", lambda name: None)
    with LiveReport(Seen(tmp_path / "none"), every=0.0) as live:
        live.started(Spec(path=str(tmp_path), project="p", name="m", task="sort"), 0, [])
        live.stepped(1, {})
    assert not (folder / "report.html").exists() and not caplog.records


def test_pages_are_rare_however_often_steps_come(tmp_path: Path, monkeypatch):
    run_folder(tmp_path)
    written: list[bool] = []
    monkeypatch.setattr(
        live_module, "write_report", lambda folders, out, live=False: written.append(live)
    )
    with LiveReport(Seen(tmp_path / "none"), every=1000.0) as live:
        live.started(Spec(path=str(tmp_path), project="p", name="m", task="sort"), 0, [])
        for step in range(1, 50):
            live.stepped(step, {})
    assert written == [True, False]


def test_watching_ends_with_the_run(tmp_path: Path):
    folder = run_folder(tmp_path)
    out = tmp_path / "page.html"
    run = Run(tmp_path, "p", "m", {"base_model": "embedded:sort", "lora": None})
    watcher = threading.Thread(target=watch_report, args=([folder], out), kwargs={"every": 0.01})
    watcher.start()
    while not out.exists():
        watcher.join(0.01)
    assert is_live(out)
    run.close()
    watcher.join(60)
    assert not watcher.is_alive() and not is_live(out)


def test_slow_runs_are_asked_for_news_less_often_and_waited_for_longer(tmp_path: Path):
    folder = run_folder(tmp_path)
    assert liveliness(read_runs([folder])).every == 10.0
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "time/step": 900.0}\n')
    slow = liveliness(read_runs([folder]))
    assert (slow.every, slow.patience) == (60.0, 2700.0)
