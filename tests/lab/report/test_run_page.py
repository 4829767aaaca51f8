"""The page of runs: its numbers and words, and that text stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gspo.backend.run import Run
from gspo.core.errors import RunError
from gspo.lab.report.run_page import read_runs, run_page
from lab.report.page_elements import Elements
from lab.report.report_cases import run_folder

ATTACK = "</script><script>alert(1)</script><!-- <script>"


def test_the_page_tells_method_settings_and_result(tmp_path: Path):
    page = run_page(read_runs([run_folder(tmp_path)]))
    for text in ("0.250 → 0.750", "embedded:sort", "4 of 4", "0.0003 / 0.0004", "arXiv 2507.18071"):
        assert text in page
    assert "<td><b>seed</b></td><td><b>7</b></td>" in page
    assert "<td>temperature</td><td>1.0</td>" in page
    assert re.search(r"Begun with python [\d.]+.*torch", page)
    assert "Sampled trajectories" in page and "strongest tint at |d_t| = 0.03" in page
    assert Elements(page).charts == 11


def test_what_should_not_happen_is_counted(tmp_path: Path):
    folder = run_folder(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/skipped": 1.0, "ratio/extreme": 3.0}\n')
    page = run_page(read_runs([folder]))
    assert "p/m: 1 steps made no update." in page
    assert "p/m: 3 sequences had ratios beyond" in page


def test_model_output_stays_text(tmp_path: Path):
    folder = run_folder(tmp_path, "<img src=x onerror=alert(1)>", text=ATTACK)
    path = folder / "trajectories" / "train" / "0001.parquet"
    stored = pq.read_table(path)
    messages = [
        json.dumps([{"role": ATTACK, "content": ATTACK}, {"content": ATTACK, "sampled": True}])
    ] * len(stored)
    at = stored.schema.get_field_index("messages")
    pq.write_table(stored.set_column(at, stored.schema.field(at), [messages]), path)
    elements = Elements(run_page(read_runs([folder])))
    assert "img" not in [tag for tag, _ in elements.tags]
    assert len(elements.scripts) == elements.charts + 2
    assert not any("alert(1)" in script for script in elements.scripts[2:])
    assert ATTACK in elements.text
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)


def test_old_runs_still_open(tmp_path: Path):
    """Without the columns, the versions and the spec that runs have today."""
    folder = run_folder(tmp_path)
    new = ("update", "sequence_log_ratios", "trained_tokens", "clipped_tokens", "token_log_ratios")
    for path in (folder / "trajectories" / "train").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(list(new)), path)
    (folder / "spec.json").unlink()
    (folder / "config.json").write_text('{"format": 1, "base_model": "embedded:sort"}')
    page = run_page(read_runs([folder]))
    assert "no spec.json" in page
    assert "no record of its update" in page and "strongest tint" not in page
    assert "clip range, low" in page


def test_several_runs_stand_side_by_side(tmp_path: Path):
    one, two = run_folder(tmp_path, "one"), run_folder(tmp_path, "two", steps=6)
    (two / "spec.json").write_text(
        (two / "spec.json").read_text().replace('"seed": 7', '"seed": 8')
    )
    page = run_page(read_runs([one, two]))
    assert "<td>steps</td><td>4 of 4</td><td>6 of 6</td>" in page
    assert "<td>seed</td><td>7</td><td>8</td>" in page
    assert "<td>temperature</td><td>1.0</td><td>1.0</td>" not in page
    assert "p/one, step 1, group 0" in page and "p/two, step 6, group 1" in page


def test_a_run_without_a_step_has_a_page(tmp_path: Path):
    run = Run(tmp_path, "p", "m", {"base_model": "embedded:sort"})
    run.claim()
    page = run_page(read_runs([run.folder]))
    assert "No step has been made yet" in page
    assert "running; this is a snapshot" in page
    run.close()
    assert "p/m: not running" in run_page(read_runs([run.folder]))


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    one, again = run_folder(tmp_path, "one"), run_folder(tmp_path / "elsewhere", "one")
    names = [run.label for run in read_runs([one, again])]
    assert names == [str(one), str(again)]


def test_a_run_alive_is_known_by_its_lock(tmp_path: Path):
    folder = run_folder(tmp_path)
    run = Run(tmp_path, "p", "m", {"base_model": "embedded:sort", "lora": None})
    try:
        assert read_runs([folder])[0].running
    finally:
        run.close()
    assert not read_runs([folder])[0].running


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"neither metrics\.jsonl nor config\.json"):
        read_runs([tmp_path / "nowhere"])
