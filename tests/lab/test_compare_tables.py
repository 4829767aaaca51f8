"""What the terminal shows: the list of a dry run, and the tables at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo.lab.compare import CompareSpec, read_compare_spec
from gspo.lab.compare_cells import Cell, make_cells
from gspo.lab.compare_result import comparison
from gspo.lab.compare_tables import QUICK_ADVICE, print_cells, result_text, summary_line
from lab.written import write_run


def small(path: Path, **fields: Any) -> CompareSpec:
    base = {"task": "sort", "steps": 2}
    return CompareSpec(
        **{"path": str(path), "base": base, "presets": ["gspo", "grpo"], "seeds": 3, **fields}
    )


def printed(compare: CompareSpec, cells: list[Cell], width: int = 120) -> str:
    return result_text(comparison(compare, cells), width)


@pytest.mark.parametrize("width", [80, 120])
def test_every_row_of_the_tables_says_what_it_is_of(tmp_path: Path, width: int):
    stress = {"learning_rate": [0.0001, 0.001], "minibatches": [4, 12]}
    compare = small(tmp_path, stress=stress)
    cells = make_cells(compare)
    for cell in cells:
        write_run(cell, [0.3, 0.4, 0.5 + 0.01 * cell.seed])
    text = printed(compare, cells, width)
    rows = [line.split() for line in text.splitlines() if line[:3] == "  g"]
    summary, paired = rows[:8], rows[8:]
    assert [row[:3] for row in summary[:2]] == [["gspo", "0.0001", "4"], ["grpo", "0.0001", "4"]]
    assert all(row[2] in ("0.0001", "0.001") and row[3] in ("4", "12") for row in paired)


def test_the_tables_say_which_metric_counts_and_how_sure_shares_are(tmp_path: Path):
    compare = small(tmp_path, seeds=4)
    cells = make_cells(compare)
    for cell in cells:
        gain = 0.1 * (cell.arm == "gspo") + 0.001 * cell.seed
        write_run(cell, [0.3, 0.4 + gain * (1 + cell.seed % 2 / 9), 0.5 + gain])
    text = printed(compare, cells)
    assert "auc, the primary metric: 1 of 1 differences shown, 1 after Holm's correction" in text
    assert "reward_after, the secondary metric" not in text  # every seed differs by the same
    assert "one in twenty" in text
    assert "0 [0, 0.602]" in text


def test_cells_without_a_result_are_listed_by_their_reason(tmp_path: Path):
    compare = small(tmp_path)
    cells = make_cells(compare)
    for cell in cells[:3]:
        write_run(cell, [0.3, 0.4, 0.5])
    for cell in cells[3:5]:
        cell.status, cell.error = "failed", "NumericsError: not [finite]"
    text = printed(compare, cells)
    assert "failed: grpo seed=1, gspo seed=2: NumericsError: not [finite]\n" in text
    assert "pending: grpo seed=2\n" in text
    assert "seed=0" not in text


def test_before_any_cell_is_done_there_are_no_rows(tmp_path: Path):
    compare = small(tmp_path)
    text = printed(compare, make_cells(compare))
    assert "pending: gspo seed=0, grpo seed=0" in text
    assert "differences" not in text


def test_the_dry_run_lists_each_cell_and_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cells = make_cells(small(tmp_path, seeds=1))
    print_cells(cells, 2)
    first, _, last = capsys.readouterr().out.splitlines()
    assert first.startswith("pending  gspo seed=0  sort-gspo-seed0-")
    assert last == "2 cells: 0 done, 0 refused, 2 to run, 2 at once"
    base = {"task": "sort", "steps": 2, "pipeline": True}
    line = summary_line(make_cells(small(tmp_path, base=base)), 2)
    assert "what a cell samples depends on timing" in line


def test_the_time_left_is_that_of_the_cells_done(tmp_path: Path):
    cells = make_cells(small(tmp_path))
    write_run(cells[0], [0.3, 0.4, 0.5])  # two steps of half a second
    cells[1].status = "failed"
    line = summary_line(cells, 2)
    assert line.startswith("6 cells: 1 done, 0 refused, 4 to run, 2 at once")
    assert line.endswith("; roughly 0:00:02, as fast as those done")
    for cell in cells[2:]:
        write_run(cell, [0.3, 0.4, 0.5])
    assert summary_line(cells, 2) == "6 cells: 5 done, 0 refused, 0 to run, 2 at once"


def test_the_quick_one_is_two_presets_and_two_seeds_and_says_what_that_is_worth():
    cells = make_cells(read_compare_spec(None))
    assert {(cell.arm, cell.seed) for cell in cells} == {
        (arm, seed) for arm in ("gspo", "grpo") for seed in (0, 1)
    }
    assert "show nothing" in QUICK_ADVICE and "gspo compare SPEC.toml" in QUICK_ADVICE
