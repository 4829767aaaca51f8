"""The runner: what it finds, runs, keeps, skips and refuses."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import run
import table
from harness import RESULTS, Result, Unavailable, read, write
from run import Unit

from benchmarks.rows import row


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the checkout is written."""
    monkeypatch.setattr(run, "WORK", tmp_path)
    monkeypatch.setattr(run, "LATEST", tmp_path / "latest")
    monkeypatch.setattr(run, "warn_if_busy", lambda: None)
    return tmp_path


def fakes(monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Result | Exception]) -> list[str]:
    """Replace the benchmarks by outcomes; returns the names in the order that they ran in."""
    ran: list[str] = []

    def run_unit(unit: Unit, repeats: int | None = None, *, tiny: bool = False) -> list[Result]:
        ran.append(str(unit))
        outcome = outcomes[str(unit)]
        if isinstance(outcome, Exception):
            raise outcome
        return [outcome]

    units = [Unit(*name.split(":")) for name in outcomes]
    monkeypatch.setattr(run, "discover", lambda: units)
    monkeypatch.setattr(run, "run_unit", run_unit)
    return ran


def test_benchmarks_are_the_files_with_a_measure_function() -> None:
    found = {str(unit): unit.set for unit in run.discover()}
    assert {"rollout", "vs_trl:a", "vs_trl:e", "vs_vllm:moe"} <= set(found)
    assert {"logprob", "prefix", "packing"} <= set(found)
    assert (found["rollout"], found["vs_vllm:moe"]) == ("cpu", "vllm")
    assert (found["overlap:tool"], found["overlap:vllm_tool"]) == ("cpu", "vllm")
    assert not {"harness", "guard", "figures", "precision", "gpu_suite"} & set(found)


def test_parts_are_what_the_modules_know() -> None:
    import vs_trl
    from trl_jobs import SHAPES

    assert tuple(SHAPES) == vs_trl.PARTS


def test_names_choose_benchmarks_and_parts() -> None:
    units = [Unit("a"), Unit("b", "x"), Unit("b", "y"), Unit("vs_vllm", "c")]
    assert run.select([], "cpu", units) == units[:3]
    assert run.select([], "vllm", units) == units[3:]
    assert run.select(["b", "b:x", "a"], "cpu", units) == [units[1], units[2], units[0]]
    with pytest.raises(SystemExit, match=r"unknown benchmark 'vs_vlm'\. Did you mean 'vs_vllm'\?"):
        run.select(["vs_vlm"], "cpu", units)


def test_one_table_and_a_line_for_each_that_did_not_run(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = fakes(
        monkeypatch,
        {
            "good": row(3.0, name="good", goal=2.0),
            "slow": row(1.5, name="slow", goal=2.0),
            "absent": Unavailable("needs a CUDA device"),
            "broken": RuntimeError("exit code 1"),
        },
    )
    assert run.main([]) == 1
    out = capsys.readouterr().out
    assert ran == ["good", "slow", "absent", "broken"]
    assert out.count("┏") == 1
    assert "2: met" in out and "2: not met" in out
    assert "skipped absent: needs a CUDA device" in out
    assert "FAILED broken: exit code 1" in out


def test_a_skip_alone_is_no_failure(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch, {"absent": Unavailable("no")})
    assert run.main([]) == 0


def test_check_fails_on_a_slowed_ratio_alone(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "read", lambda name: [row(3.0, 0.1, name=name)])
    fakes(monkeypatch, {"same": row(2.9, 0.1, name="same")})
    assert run.main(["--check"]) == 0
    fakes(monkeypatch, {"same": row(1.5, 0.1, name="same")})
    assert run.main([]) == 0
    assert run.main(["--check"]) == 1
    assert "REGRESSION same, a case: ratio 1.50, committed 3.00" in capsys.readouterr().out


def test_update_stores_rows_and_the_page(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[Result] = []
    pages: list[int] = []
    monkeypatch.setattr(run, "write", stored.extend)
    monkeypatch.setattr(table, "update_page", lambda: pages.append(1))
    fakes(monkeypatch, {"a": row(name="a"), "b": RuntimeError("no")})
    assert run.main([]) == 1
    assert stored == []
    assert run.main(["--update"]) == 1
    assert [r.name for r in stored] == ["a"]
    assert pages == [1]


def test_tiny_sizes_are_never_stored() -> None:
    with pytest.raises(SystemExit, match="--tiny measures nothing"):
        run.main(["rollout", "--tiny", "--update"])


def test_resume_leaves_out_what_is_fresh(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Unit("a", "x")
    unit.latest.parent.mkdir()
    unit.latest.write_text(json.dumps([row(name="a").as_dict()]))
    ran = fakes(monkeypatch, {"a:x": row(name="a"), "b": row(name="b")})
    assert run.main(["--resume"]) == 0
    assert ran == ["b"]
    old = time.time() - 3600 * (run.HOURS + 1)
    os.utime(unit.latest, (old, old))
    assert run.main(["--resume"]) == 0
    assert ran == ["b", "a:x", "b"]


@pytest.mark.slow
def test_a_benchmark_runs_in_a_process_of_its_own(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run.run_unit(Unit("rollout"), 1, tiny=True)
    assert {r.other for r in rows} == {"transformers generate", "transformers generate_batch"}
    assert {r.shape.split(" of ")[-1] for r in rows} == {"4, 1 thread", "1..6, 1 thread"}
    assert not list((elsewhere / "latest").glob("*.json"))


def test_an_option_that_a_benchmark_lacks_is_refused(elsewhere: Path) -> None:
    with pytest.raises(Unavailable, match="vs_vllm:moe has no --tiny"):
        run.run_unit(Unit("vs_vllm", "moe"), tiny=True)


def test_the_page_is_the_stored_results() -> None:
    text = table.PAGE.read_text()
    shown = text.split(table.BEGIN)[1].split(table.END)[0].strip()
    assert shown == table.markdown(table.committed()), "run: python benchmarks/run.py --docs"


def test_every_stored_result_is_a_comparison_or_a_study() -> None:
    for path in RESULTS.glob("*.json"):
        assert read(path.stem) or path.stem == "precision", path


def test_the_page_is_rewritten_between_its_marks(tmp_path: Path) -> None:
    write([row(2.5, name="speed", goal=3.0, ours_mb=10.0, other_mb=9.0)], tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.update_page(page, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 2.50 | 2.40 to 2.60 | 3: not met | 10 / 9: higher |" in text
    assert not table.update_page(page, tmp_path)


def test_the_table_says_whether_memory_and_tokens_are_as_aimed_at() -> None:
    met = row(ours_mb=600.0, other_mb=6500.0, memory_goal=0.1)
    assert table.memory(met) == "600 / 6500: at most 0.1: met"
    assert table.memory(row(ours_mb=700.0, other_mb=6500.0, memory_goal=0.1)).endswith("not met")
    assert table.cells(row(2.0, ours_s=1000.0, other_s=2000.0, unit="tokens"))[2:4] == (
        "1,000 tokens",
        "2,000 tokens the peer",
    )
