"""`art.train`: six lines from rows and a function to a trained model."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gspo as art
import gspo.train
from experiment.small_runs import Silent, records
from gspo.cli import app
from gspo.core.errors import ConfigError, DataError
from gspo.experiment.loop import Outcome, run_experiment
from gspo.experiment.run_file import read_spec
from gspo.experiment.whole_run import demo_spec, tune

ROWS = [{"prompt": f"{n:03d}", "answer": f"{n % 7}"} for n in range(10)]
SIZES: dict[str, Any] = {"prompts": 2, "completions": 4, "max_tokens": 4, "learning_rate": 1e-3}


def short(completions, **columns):
    return [-len(text) for text in completions]


def first(completion, row):
    return float(completion[:1] == row["answer"])


def trained(path: Path, **options: Any) -> Outcome:
    given = {"dataset": ROWS, "reward": [short, first], "reward_weights": [0.1, 1.0], **options}
    return art.train(model="embedded:sort", path=str(path), **SIZES | given)


def test_a_run_in_one_call_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcome = trained(tmp_path, steps=1)
    assert outcome.steps == 1 and outcome.prompts == 1
    assert outcome.before and outcome.after and outcome.run == tmp_path / "gspo" / "run"
    assert "9 rows to train on and 1 held out" in capsys.readouterr().out
    with pytest.raises(DataError, match="10 rows in memory has changed since the run"):
        trained(tmp_path, steps=2, dataset=[*ROWS[:-1], {"prompt": "x", "answer": ""}])

    async def notebook() -> Outcome:
        return trained(tmp_path, steps=2)

    assert asyncio.run(notebook()).steps == 2


def test_the_package_is_the_function_too():
    assert art.train is gspo.train and inspect.ismodule(gspo.train)
    assert gspo.train.__path__
    assert callable(art.train)


def test_options_that_are_wrong_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown option 'stepz'\. Did you mean 'steps'"):
        trained(tmp_path, stepz=2)
    with pytest.raises(
        ConfigError, match=r"'epoch'\. Did you mean 'epochs' in train or sft or data"
    ):
        trained(tmp_path, epoch=3)
    with pytest.raises(ConfigError, match="cannot import nothing_here"):
        trained(tmp_path, reward="nothing_here:f", reward_weights=None)
    with pytest.raises(DataError, match=r"dataset is 5 \(int\); give a path"):
        trained(tmp_path, dataset=5)
    with pytest.raises(TypeError, match="reward"):
        art.train(model="embedded:sort", dataset=ROWS)  # pyright: ignore[reportCallIssue]
    assert not list(tmp_path.iterdir())


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


def tuned() -> art.TrainableModel:
    return art.TrainableModel(name="m", project="p", base_model="embedded:sort")


async def test_a_bad_file_begins_no_run(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(DataError, match="row 1 has no column"):
        await tune(tmp_path / "data.jsonl", tuned(), art.TrainSFTConfig(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


async def test_rows_that_the_model_refuses_leave_no_empty_run(tmp_path: Path):
    """Only its tokenizer knows that a row is too long. A run that was there stays."""
    good, long = tmp_path / "good.jsonl", tmp_path / "long.jsonl"
    good.write_text(json.dumps(ROW))
    long.write_text(json.dumps(ROW).replace("312", "312" * 200))
    config = art.TrainSFTConfig(lr_schedule="linear", seed=0)
    for there in (False, True):
        if there:
            await tune(good, tuned(), config, str(tmp_path))
        with pytest.raises(DataError, match=r"row 1 has 60\d tokens"):
            await tune(long, tuned(), config, str(tmp_path))
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
    assert outcome.warm is not None and outcome.warm == watch.estimates[1]
    assert outcome.as_json()["reward_after_sft"] == outcome.warm.mean
    again = Silent()
    assert (await run_experiment(spec, again)).warm == outcome.warm  # of the log
    assert (again.steps, again.estimates) == ([], [])


async def test_the_demo_goes_on_where_it_stopped_and_else_starts_anew(tmp_path: Path):
    path = str(tmp_path)
    first = demo_spec(path, steps=2)
    assert first.name == "sort-1"
    small_first = first.model_copy(update={"prompts": 2, "completions": 4, "eval_prompts": 4})
    await run_experiment(small_first, Silent())
    assert demo_spec(path, steps=2).name == "sort-2"
    assert demo_spec(path, steps=1).name == "sort-2"
    half = tmp_path / "demo" / "sort-2"
    (half / "checkpoints" / "0001").mkdir(parents=True)
    (half / "spec.json").write_text(
        json.dumps(demo_spec(path, 2).model_dump(mode="json") | {"name": "sort-2"})
    )
    assert demo_spec(path, steps=2).name == "sort-2"
    assert demo_spec(path, steps=2, seed=1).name == "sort-3"


def test_the_demo_finds_its_earlier_run_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x" / "demo" / "sort-1").mkdir(parents=True)
    assert demo_spec("~/x").name == "sort-2"
