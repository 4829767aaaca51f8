"""`gspo sft` trains on a file, and SFT is the first step of a run that names one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiment.small_runs import Silent, records
from gspo.cli import app
from gspo.core.errors import DataError
from gspo.experiment.loop import run_experiment
from gspo.experiment.run_file import read_spec
from gspo.experiment.tuning import tune

ROW = {
    "messages": [{"role": "user", "content": "312"}, {"role": "assistant", "content": "123"}],
}


def test_the_command(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(ROW)}\n" * 5)
    options = ["--model", "embedded:sort", "--path", str(tmp_path), "--epochs", "2", "--json"]
    done = CliRunner().invoke(app, ["sft", str(data), *options, "--batch-size", "3"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["step"], told["sft/batches"], told["sft/tokens"]) == (1, 4, 2 * 5 * 4)
    assert Path(told["checkpoint"]) == tmp_path / "gspo" / "sft" / "checkpoints" / "0001"


async def test_a_bad_file_begins_no_run(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(DataError, match="row 1 has no column"):
        await tune(tmp_path / "data.jsonl", str(tmp_path), "p", "m", "embedded:sort", None)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


async def test_rows_that_the_model_refuses_leave_no_empty_run(tmp_path: Path):
    """Only its tokenizer knows that a row is too long. A run that was there stays."""
    good, long = tmp_path / "good.jsonl", tmp_path / "long.jsonl"
    good.write_text(json.dumps(ROW))
    long.write_text(json.dumps(ROW).replace("312", "312" * 200))
    where = (str(tmp_path), "p", "m", "embedded:sort", None)
    for there in (False, True):
        if there:
            await tune(good, *where)
        with pytest.raises(DataError, match=r"row 1 has 60\d tokens"):
            await tune(long, *where)
        assert (tmp_path / "p" / "m").exists() == there


async def test_the_first_step_of_a_run(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(ROW)}\n" * 4)
    (tmp_path / "run.toml").write_text(
        'task = "sort"\nsteps = 2\nprompts = 2\ncompletions = 4\neval_prompts = 2\n'
        '[sft]\ndata = "data.jsonl"\nepochs = 2\nlearning_rate = 1e-4\n'
    )
    spec = read_spec(tmp_path / "run.toml", [f"path={tmp_path}", "eval_completions=2"])
    watch = Silent()
    outcome = await run_experiment(spec, watch)
    assert (watch.steps, outcome.steps, len(watch.estimates)) == ([1, 2], 2, 3)
    lines = records(outcome.run)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["sft/batches"] == 2 and "train/reward" not in lines[1]
    assert lines[1]["sft/learning_rate"] == 1e-4
    assert "val/reward" in lines[1] and "train/reward" in lines[2]
    again = Silent()
    await run_experiment(spec, again)
    assert (again.steps, again.estimates) == ([], [])
