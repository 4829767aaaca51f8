"""The GPU suite at toy sizes on the CPU; and what becomes of parts that fail or take too long."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch
from gpu_parts import runner
from gpu_parts.bench import Bench, Card, card

CPU = card(tiny=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The results of `--tiny`, which the tests below look at."""
    out = tmp_path_factory.mktemp("gpu")
    before = dict(os.environ)
    code = gpu_suite.main(["--tiny", "--out", str(out)])
    assert code == 0, [own for own in summary(out)["parts"] if not runner.ended_well(own)]
    yield out
    os.environ.clear()
    os.environ.update(before)


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def rows(out: Path, part: str) -> dict[str, dict[str, Any]]:
    """The rows of a part by what they are of."""
    stored = json.loads((out / f"{part}.json").read_text())
    assert stored["status"] == "done" and stored["how"] and stored["versions"]["torch"]
    assert stored["device"] == "CPU, made-up limits"
    return {row["what"]: row for row in stored["rows"]}


def test_every_part_writes_its_file_and_the_summary_has_all(folder: Path) -> None:
    names = [part.name for part in gpu_suite.PARTS]
    assert sorted(path.stem for path in folder.iterdir()) == sorted([*names, "summary"])
    found = summary(folder)
    assert [own["part"] for own in found["parts"]] == names
    for own in found["parts"]:
        assert set(own["figures"]) == set(rows(folder, own["part"]))


def test_nothing_is_clipped_in_what_training_times(folder: Path) -> None:
    found = rows(folder, "training")
    timed = {what: row for what, row in found.items() if "clip_fraction" in row}
    assert len(timed) == 19
    for what, row in timed.items():
        assert row["clip_fraction"] == 0 and row["grad_norm"] > 0, what
        assert row["mfu"] == pytest.approx(row["tflops_per_s"], rel=1e-5)  # of 1 TFLOP/s
        assert {"forward", "head", "backward", "optimizer"} <= set(row["phases_s"])
        assert row["profile"]["operations"] > 100 and row["profile"]["kernels"] is None
    assert timed["dense, full, microbatch of 64"]["largest_microbatch"] == 64
    assert timed["MoE, LoRA, microbatch of 32"]["tokens"] == 32


def test_the_default_is_what_a_user_gets_and_shares_prompts(folder: Path) -> None:
    row = rows(folder, "training")["dense, full, default microbatches"]
    # Two groups of 2 x 24 tokens behind prompts of 8.
    assert (row["microbatches"], row["tokens"], row["sample_tokens"]) == (1, 2 * (8 + 48), 4 * 32)


def test_the_error_of_the_head_falls_with_the_precision(folder: Path) -> None:
    found = rows(folder, "head")
    once, thrice, full = (
        found[f"{name}: score"]["sequence_error_max"] for name in ("bfloat16", "split", "float32")
    )
    assert once > 3e-4 > thrice > full
    assert not found["bfloat16: score"]["inside"] and found["split: score"]["inside"]


def test_windows_are_not_the_dense_model(folder: Path) -> None:
    found = rows(folder, "correctness")
    one, two = (
        found[f"{name}, bfloat16, plain"]["token_rms"] for name in ("dense", "sliding windows")
    )
    assert one != two
    assert found["tests marked gpu"]["failed"] == 0


def test_completions_that_wait_for_memory_are_seen(folder: Path) -> None:
    found = rows(folder, "decoding")
    tight = found["bfloat16 copy, 24 completions, less KV_BYTES"]
    ample = found["bfloat16 copy, 24 completions"]
    assert tight["completions_at_once"] < 24 == ample["completions_at_once"]
    assert tight["decoded_positions"] > ample["decoded_positions"] == 15
    # The weights are read at more positions; the decoded keys as often as before.
    assert tight["floor_s"] > ample["floor_s"]


def test_the_demonstration_earns_the_same_on_both_sides(folder: Path) -> None:
    assert rows(folder, "demo")["rewards beside each other"]["first_gap"] == 0


def test_the_budgets_fit_in_eight_minutes_with_the_imports(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sum(part.seconds for part in gpu_suite.PARTS) <= gpu_suite.TOTAL_S <= 480
    assert gpu_suite.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{part.name} " in f"\n{said}" for part in gpu_suite.PARTS)


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device: --tiny runs every part"):
        card()


@dataclass(frozen=True)
class Fake:
    """A part that does what a test wants."""

    name: str
    work: Callable[[Bench], object]
    seconds: float = 5.0

    def how(self) -> str:
        return "as the test wants"

    def measure(self, bench: Bench) -> None:
        self.work(bench)


def run(out: Path, *parts: Fake, total: float = 60, where: Card = CPU) -> dict[str, dict[str, Any]]:
    """The stored results by part."""
    runner.run_all(parts, where, out, {"device": where.name}, total=total, say=lambda _: None)
    return {part.name: json.loads((out / f"{part.name}.json").read_text()) for part in parts}


def good(bench: Bench) -> None:
    with bench.row("a sum") as row:
        row |= {"value": 1 + 1, "ok": True}


def fails(bench: Bench) -> None:
    good(bench)
    raise RuntimeError("no kernel image")


def slow(bench: Bench) -> None:
    good(bench)
    with bench.row("forever"):
        while True:
            try:  # an ordinary handler is no place to hide
                time.sleep(0.01)
            except Exception:
                continue


def test_a_part_that_fails_or_is_slow_leaves_the_others_alone(tmp_path: Path) -> None:
    parts = [Fake("bad", fails), Fake("slow", slow, seconds=0.3), Fake("good", good)]
    found = run(tmp_path, *parts)
    assert [found[name]["status"] for name in found] == ["failed", "out of time", "done"]
    assert found["bad"]["error"] == "RuntimeError: no kernel image"
    assert any("in fails" in line for line in found["bad"]["trace"])
    assert found["slow"]["failed"] == ["forever"]
    assert found["slow"]["seconds"] < 3
    for own in found.values():  # what was known before is there
        assert own["rows"][0] == {"what": "a sum", "value": 2, "ok": True}
    stored = summary(tmp_path)
    assert [own["part"] for own in stored["parts"]] == list(found)
    assert [runner.ended_well(own) for own in stored["parts"]] == [False, False, True]
    lines = runner.table(stored["parts"])
    assert "  out of time: its 0.3 s are over" in lines and "FAILED forever" in lines


def test_a_row_that_fails_is_told_and_the_part_goes_on(tmp_path: Path) -> None:
    def work(bench: Bench) -> None:
        with bench.row("too large"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        with bench.row("wrong") as row:
            row["ok"] = False
        good(bench)

    found = run(tmp_path, Fake("rows", work))["rows"]
    assert (found["status"], found["failed"], found["wrong"]) == ("done", ["too large"], ["wrong"])
    assert found["rows"][0]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert [row["what"] for row in found["rows"]] == ["too large", "wrong", "a sum"]
    assert not runner.ended_well(summary(tmp_path)["parts"][0])


def test_what_an_error_held_is_freed(tmp_path: Path) -> None:
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def allocate() -> None:
        large = torch.ones(10)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no")

    def work(bench: Bench) -> None:
        with bench.row("holds"):
            allocate()
        with bench.row("after") as row:
            row["ok"] = held[0]() is None

    assert run(tmp_path, Fake("memory", work))["memory"]["wrong"] == []


def test_precision_and_threads_are_put_back(tmp_path: Path) -> None:
    threads = torch.get_num_threads()

    def work(bench: Bench) -> None:
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(threads + 1)
        torch.set_grad_enabled(False)
        raise ValueError("half-way")

    run(tmp_path, Fake("half", work))
    assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, True)


def test_compiled_graphs_are_counted_for_the_part_that_compiled_them(tmp_path: Path) -> None:
    def compiles(bench: Bench) -> None:
        torch._dynamo.reset()
        torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(3))

    found = run(tmp_path, Fake("one", compiles), Fake("none", good))
    assert [found[name]["compiled"]["graphs"] for name in found] == [1, 0]
    assert found["one"]["compiled"]["seconds"] > 0 == found["none"]["compiled"]["seconds"]


def test_no_part_begins_after_the_total_is_over(tmp_path: Path) -> None:
    found = run(tmp_path, Fake("long", slow), Fake("late", good), total=0.3)
    assert found["late"]["status"] == "not run" and "time of all parts" in found["late"]["error"]


def test_after_a_fault_of_the_device_nothing_else_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", lost)
    where = Card("a card", "cuda", None, None)
    found = run(tmp_path, Fake("first", lambda _: None), Fake("second", good), where=where)
    assert found["second"]["status"] == "not run"
    assert "answers no more: RuntimeError: CUDA error" in found["second"]["error"]


def test_an_alarm_that_was_set_before_is_set_again() -> None:
    from gpu_parts.bench import time_limit

    heard: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    before = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with time_limit(5):
            time.sleep(0.01)
        time.sleep(0.4)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)
    assert heard == [1]
