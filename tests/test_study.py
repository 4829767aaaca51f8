"""The study's scripts: from comparisons to data, tables and pictures."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gspo.lab.compare import read_compare_spec
from gspo.lab.compare_cells import make_cells
from gspo.lab.compare_result import comparison
from lab.written import write_run

STUDY = Path(__file__).parents[1] / "docs" / "study"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDY))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def study_data(run: ModuleType, part: str, folder: Path) -> dict[str, Any]:
    """A part of the study with two seeds and made-up runs of two steps."""
    changes = ["seeds=2", "base.steps=2", f"path={json.dumps(str(folder / 'runs'))}"]
    spec = read_compare_spec(STUDY / f"{part}.toml", changes)
    cells = make_cells(spec)
    for index, cell in enumerate(cells):
        metrics = {
            "ratio/clip_fraction_tokens": 0.15 if "gspo" in cell.arm else 0.0015,
            "tokens/completion_mean": 16.0,
            "ratio/token_log_square": 0.04,
            "ratio/log_square": 0.01,
            "ratio/epsilon_low": 1e-3,
            "moe/experts_changed": 0.05,
            "moe/routing_agreement": 0.99,
            "optim/grad_norm": 2.0,
        }
        write_run(cell, [0.3, 0.4, 0.5 + index / 1000], metrics)
    return run.essence(comparison(spec, cells))


@pytest.mark.parametrize("part", sorted(path.stem for path in STUDY.glob("*.toml")))
def test_every_part_fills_its_tables_and_pictures(
    part: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, tables, figures = script("run"), script("tables"), script("figures")
    data = json.loads(json.dumps(study_data(run, part, tmp_path)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{part}.json").write_text(json.dumps(data))
    page = tmp_path / "study.md"
    empty = dict.fromkeys(tables.TABLES, "")
    page.write_text(tables.filled((STUDY.parent / "study.md").read_text(), empty))
    arguments = ["figures.py", "--data", str(tmp_path / "data"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--images", str(tmp_path / "img")])
    figures.main()

    own = {mark for mark, (names, _) in tables.TABLES.items() if names == (part,)}
    text = page.read_text()
    for mark in tables.TABLES:
        between = text.split(f"<!-- table:{mark} -->")[1].split("<!-- /table -->")[0]
        assert between.strip().startswith("| ") is (mark in own)
    drawn = {path.stem for path in (tmp_path / "img").iterdir()}
    assert drawn == {name for name, (of, _) in figures.PICTURES.items() if of == part}
    for name in drawn:
        assert f"study/img/{name}.png" in text


def test_the_page_has_the_tables_of_the_committed_data(script: Any):
    tables = script("tables")
    known = {path.stem: json.loads(path.read_text()) for path in (STUDY / "data").glob("*.json")}
    page = (STUDY.parent / "study.md").read_text()
    made = tables.made(known)
    assert set(made) == set(tables.TABLES)
    assert tables.filled(page, made) == page
    assert all(f"<!-- table:{mark} -->\n{table}" in page for mark, table in made.items())
    finished = [cell["status"] == "done" for data in known.values() for cell in data["cells"]]
    assert all(finished) and len(finished) == 320


def test_numbers_are_those_of_the_cells(script: Any, tmp_path: Path):
    run, tables = script("run"), script("tables")
    data = study_data(run, "a-stability", tmp_path)
    first = data["cells"][0]
    assert first["val/reward"] == {
        "step": [0, 1, 2],
        "value": [0.3, 0.4, 0.5],
        "tokens": [0, 100, 200],
    }
    assert first["ends"]["ratio/epsilon_low"] == 1e-3
    head, paper, row, *_ = tables.clip_fractions(data)
    assert head[-5:-3] == ["GSPO", "without the first minibatch"]
    assert paper[-5] == "15 %" and paper[-2:] == ["0.13 %", "115"]
    # In the first of 4 minibatches nothing is clipped; 0.1 is 333 times 3e-4.
    assert row == ["0.0001", "4", "15.0 %", "20 %", "333", "0.15 %", "100"]
    reward = tables.rewards(data)[1]
    # Cells 0 and 12 are GSPO's, 1 and 13 GRPO's: equal differences, which have no interval.
    assert reward[2].startswith("0.402\u00a0±") and reward[4:6] == ["-0.000", "-0.001"]
    assert reward[6] == "0 % [0, 84] / 0 % [0, 84]" and reward[-1] == "2.00 / 2.00"

    data = study_data(run, "e-length", tmp_path)
    length, token, sequence = tables.spread(data, "gspo", {"length": "16"})
    assert (length, round(token, 9), round(sequence, 9)) == (16, 0.2, 0.1)
    assert tables.spreads(data)[1][-4:] == ["0.2", "0.1", "0.05", "2.00"]


def test_a_page_keeps_what_has_no_data(script: Any):
    tables = script("tables")
    text = "<!-- table:a -->\nold\n<!-- /table --> and <!-- table:b -->kept<!-- /table -->"
    once = tables.filled(text, {"a": "| x |"})
    assert once == (
        "<!-- table:a -->\n| x |\n<!-- /table --> and <!-- table:b -->kept<!-- /table -->"
    )
    assert tables.filled(once, {"a": "| x |"}) == once


def test_the_sentences_that_the_page_rests_on_are_its_datas(script: Any):
    """Numbers in the text that no table prints as they stand there."""
    cells, evidence, tables = script("cells"), script("evidence"), script("tables")
    known = {path.stem: json.loads(path.read_text()) for path in (STUDY / "data").glob("*.json")}
    runs = {cell["run"] for data in known.values() for cell in data["cells"]}
    assert len(runs) == 275
    left = evidence.corrected(*(known[part] for part in tables.PARTS))
    assert [row[1] for row in left if row[0] == "AUC"] == [
        "fixed - auto, setting learning rate 1e-4",
        "GSPO - GRPO, completions 32",
        "fixed - auto, setting int4 engine",
        "fixed - auto, setting learning rate 3e-4",
    ]
    norms = {row[0]: row[1:3] for row in evidence.limits(*known.values())[1:]}
    assert all(norms[part][0] == norms[part][1] for part in (tables.A, tables.C, tables.F))
    # The pair of runs of (a), (d) and (f) is one: its spread over seeds is below the placebos'.
    one = cells.apart(
        known[tables.A], "gspo", "grpo", {"learning_rate": 3e-4, "minibatches": 4}, cells.END
    )
    again = cells.apart(known[tables.F], "gspo", "grpo", {"completions": 16}, cells.END)
    assert one == again
    assert round(statistics.stdev(one), 3) == 0.008
    placebos = evidence.placebos(known[tables.C], known[tables.D])
    interactions = evidence.interactions(known[tables.F])
    assert not any("**" in " ".join(row) for row in [*placebos, *interactions])
    # docs/epsilon.md repeats (g), the other way round.
    text = (STUDY.parent / "epsilon.md").read_text()
    for stress, _ in cells.stresses(known[tables.G]):
        sides = (
            cells.by_seed(known[tables.G], arm, stress, cells.AUC) for arm in ("auto", "fixed")
        )
        row = next(line for line in text.splitlines() if line.startswith(f"| {stress['setting']}"))
        assert cells.difference(*sides).strip("*") in row
