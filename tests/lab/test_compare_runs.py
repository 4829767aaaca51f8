"""Whole comparisons: they resume, survive crashes of cells, and say what happened."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gspo.cli import app
from gspo.core.errors import ConfigError, RunError
from gspo.lab.compare import read_compare_spec
from gspo.lab.compare_cells import make_cells
from gspo.lab.compare_runs import default_workers, run_comparison

SPEC = """
presets = ["gspo", "grpo"]
seeds = 2
[base]
task = "sort"
steps = {steps}
prompts = 4
completions = 4
eval_prompts = 4
learning_rate = 1e-3
"""


def write_spec(folder: Path, steps: int = 3, more: str = "") -> Path:
    path = folder / "small.toml"
    path.write_text(f'path = "{folder / "runs"}"' + SPEC.format(steps=steps) + more)
    return path


def command(spec: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "gspo.cli", "compare", str(spec), *arguments]


def compare(spec: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", str(spec), *arguments])


def content(spec: Path) -> dict[str, Any]:
    return json.loads((read_compare_spec(spec).folder / "comparison.json").read_text())


def logs(spec: Path) -> dict[str, list[dict[str, float]]]:
    """Each cell's metrics without what depends on the clock."""
    out = {}
    for cell in make_cells(read_compare_spec(spec)):
        lines = (cell.folder / "metrics.jsonl").read_text().splitlines()
        out[cell.id] = [
            {k: v for k, v in json.loads(x).items() if not k.startswith(("time/", "throughput/"))}
            for x in lines
        ]
    return out


def test_a_comparison_runs_once_and_pairs_prompts_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    spec = write_spec(tmp_path)
    first = compare(spec, "--json")
    assert first.exit_code == 0, first.output
    # Workers leave this process as it was.
    assert os.environ["OMP_NUM_THREADS"] == "7" and "OMP_WAIT_POLICY" not in os.environ
    last = json.loads(first.output.splitlines()[-1])
    assert "<html" in Path(last["report"]).read_text()[:200]
    assert Path(last["report"]) == read_compare_spec(spec).folder / "report.html"
    assert (last["done"], last["failed"], last["refused"]) == (4, 0, 0)
    rows = content(spec)["cells"]
    assert {row["status"] for row in rows} == {"done"}
    start = {(row["arm"], row["seed"]): row["reward_before"] for row in rows}
    assert start["gspo", 0] == start["grpo", 0] and start["gspo", 1] == start["grpo", 1]
    for seed in (0, 1):
        ours, theirs = (logs(spec)[f"{arm} seed={seed}"] for arm in ("gspo", "grpo"))
        # Same weights, same prompts, same draws: the first batch is the same.
        assert ours[1]["train/reward"] == theirs[1]["train/reward"]
        assert ours[1]["tokens/completion"] == theirs[1]["tokens/completion"]
        assert ours[-1] != theirs[-1]

    files = {cell.id: cell.folder for cell in make_cells(read_compare_spec(spec))}
    before = {id: (folder / "spec.json").stat().st_mtime_ns for id, folder in files.items()}
    again = compare(spec)
    assert again.exit_code == 0 and "4 done, 0 refused, 0 to run" in again.output
    assert {id: (f / "spec.json").stat().st_mtime_ns for id, f in files.items()} == before


def wait_until(condition: Any, process: subprocess.Popen[bytes], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def at_work(pid: int) -> list[int]:
    """The processes of cells: children of the server that the command has started."""
    return [worker for child in children(pid) for worker in children(child)]


def begun(pid: int) -> str | None:
    """When a process began, in ticks; None if it is no more, or only its exit status is left.

    Another process may have its number by the time one looks again.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.timeout(900)  # seconds on idle cores, minutes beside other work
@pytest.mark.slow
def test_a_killed_comparison_repeats_no_finished_cell(tmp_path: Path):
    spec = write_spec(tmp_path, steps=12)
    folders = [cell.folder for cell in make_cells(read_compare_spec(spec))]
    finished: dict[Path, int] = {}
    for victims in ("parent", "parent and workers"):
        number = 2 if finished else 1  # the cells before it are finished
        process = subprocess.Popen(
            command(spec, "--workers", "1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda at=number: (folders[at] / "checkpoints" / "0003").exists(), process)
        workers = at_work(process.pid)
        assert len(workers) == 1
        assert (began := begun(workers[0]))
        process.send_signal(signal.SIGKILL)
        if victims == "parent and workers":
            os.kill(workers[0], signal.SIGKILL)
        process.wait()
        assert files_of(folders[:1]).items() >= finished.items()
        finished = files_of(folders[:number])

    resumed = compare(spec, "--workers", "2")
    assert resumed.exit_code == 0, resumed.output
    assert "2 done, 0 refused, 2 to run" in resumed.output
    assert files_of(folders[:2]) == finished
    assert begun(workers[0]) != began  # no orphan went on

    # Every cell ends as one that was never interrupted, whichever worker ran it.
    whole = tmp_path / "whole"
    whole.mkdir()
    unbroken = write_spec(whole, steps=12)
    assert compare(unbroken, "--workers", "2").exit_code == 0
    assert logs(spec) == logs(unbroken)


def files_of(folders: list[Path]) -> dict[Path, int]:
    """When each file was written."""
    return {p: p.stat().st_mtime_ns for f in folders for p in f.rglob("*") if p.is_file()}


CRASHING = """
import os
import gspo as art

async def rollout(model, scenario):
    if scenario.seed == {seed} and scenario.split == "train":
        {harm}
    messages = [{{"role": "user", "content": scenario.problem.prompt}}]
    response = await model.openai_client().chat.completions.create(
        model=model.inference_name, messages=messages, max_tokens=4)
    choice = response.choices[0]
    reward = float(len(choice.message.content or ""))
    return art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)
"""
HARMS = {
    "raise RuntimeError('the tool is down')": "RuntimeError: the tool is down",
    "os._exit(3)": "the worker process ended with exit code 3",
    "os.kill(os.getpid(), 9)": "ended by SIGKILL (out of memory?)",
}


def test_a_cell_that_crashes_is_told_and_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arms = ""
    for index, harm in enumerate([*HARMS, "pass"]):
        (tmp_path / f"mine{index}.py").write_text(CRASHING.format(harm=harm, seed=0))
        arms += f'[[arms]]\nlabel = "{index}"\nrollout = "mine{index}:rollout"\n'
    monkeypatch.chdir(tmp_path)
    spec = write_spec(tmp_path, steps=1, more=arms)
    one = ("--workers", "1", "--set", "presets=[]", "--set", "seeds=1")
    result = compare(spec, *one, "--json")
    assert result.exit_code == 1, result.output
    rows = content(spec)["cells"]
    assert [row["status"] for row in rows] == ["failed", "failed", "failed", "done"]
    for row, message in zip(rows, HARMS.values(), strict=False):
        assert message in row["error"]
        assert f"failed: {row['id']}: {row['error']}" in result.output
    last = json.loads(result.output.splitlines()[-1])
    assert (last["done"], last["failed"]) == (1, 3)

    for index in range(len(HARMS)):  # mended: only those run again
        (tmp_path / f"mine{index}.py").write_text(CRASHING.format(harm="pass", seed=0))
    again = compare(spec, *one)
    assert again.exit_code == 0, again.output
    assert "1 done, 0 refused, 3 to run" in again.output


def test_dry_run_lists_cells_and_cost_and_writes_nothing(tmp_path: Path):
    arms = '[[arms]]\nlabel = "auto"\nalgorithm = "gspo"\nepsilon = "auto"\n'
    stress = "[stress]\nalgorithm = []\n".replace("algorithm = []", "epsilon_scale = ['constant']")
    spec = write_spec(tmp_path, more=arms + stress)
    result = compare(spec, "--dry-run", "--workers", "3")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert sum(line.startswith("pending") for line in lines) == 6
    assert lines[-1] == "6 cells: 0 done, 0 refused, 6 to run, 3 at once"
    assert not (tmp_path / "runs").exists()


def test_refused_cells_are_listed_with_their_reason(tmp_path: Path):
    stress = '[[stress.range]]\nlabel = "auto"\nepsilon = "auto"\n[[stress.range]]\nlabel = "own"\n'
    spec = write_spec(tmp_path, steps=1, more=stress)
    result = compare(spec, "--dry-run")
    refused = [line for line in result.output.splitlines() if line.startswith("refused")]
    assert len(refused) == 2
    assert "grpo range=auto seed=0: epsilon='auto' steers a sequence-level" in refused[0]
    run = compare(spec, "--set", "seeds=1")
    assert run.exit_code == 0, run.output
    row = next(row for row in content(spec)["cells"] if row["id"] == "grpo range=auto seed=0")
    assert (row["status"], row["run"], row["curves"]) == ("refused", None, {})
    assert "refused: grpo range=auto seed=0" in run.output


def test_one_comparison_at_a_time_uses_a_path(tmp_path: Path):
    spec = read_compare_spec(write_spec(tmp_path))
    folder = Path(spec.path) / "cells"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        file.write("4711")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"cells is in use by process 4711"):
            run_comparison(spec, make_cells(spec), 1)
    assert not spec.folder.exists()


@pytest.mark.timeout(900)
def test_an_interrupt_ends_in_order_and_leaves_what_can_go_on(tmp_path: Path):
    spec = write_spec(tmp_path, steps=30)
    folder = make_cells(read_compare_spec(spec))[0].folder
    process = subprocess.Popen(
        command(spec, "--workers", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Tests that run in the background ignore it, and what they start would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: (folder / "checkpoints" / "0002").exists(), process)
    workers = at_work(process.pid)
    assert len(workers) == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().splitlines()[-1] == (
        "stopped: 0 of 4 cells are done; the same command goes on from there"
    )
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert [row["status"] for row in content(spec)["cells"]] == ["pending"] * 4
    again = compare(spec, "--set", "seeds=1", "--set", "presets=['gspo']")
    assert again.exit_code == 0, again.output
    assert "1 to run" in again.output
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(31))


def test_there_is_a_worker_for_each_core_or_for_as_many_as_a_cell_has_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gspo.lab.compare_runs.free_cores", lambda: 8)
    spec = write_spec(tmp_path)
    assert default_workers(make_cells(read_compare_spec(spec))) == 8
    threads = read_compare_spec(spec, ["base.load.threads=3"])
    assert default_workers(make_cells(threads)) == 2


@pytest.mark.parametrize("arguments", [(), ("--quick", "spec.toml")])
def test_either_a_spec_or_quick(arguments: tuple[str, ...]):
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert "give a spec file, or --quick" in str(result.exception)
