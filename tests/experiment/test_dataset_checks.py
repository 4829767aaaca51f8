"""What is refused of a dataset before anything is trained; and runs on one, killed and resumed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from experiment.small_runs import Silent, records
from experiment.test_loop import Killed, KilledAt, weights
from gspo.backend.stored_batch import read_batch
from gspo.core.errors import ConfigError, DataError, GspoError, RolloutError, SampleTooLongError
from gspo.experiment.dataset_checks import check_dataset, check_prompts, how_often
from gspo.experiment.loop import run_experiment
from gspo.experiment.plan import make_plan
from gspo.experiment.rollout import Rollouts
from gspo.experiment.run_file import read_spec
from gspo.experiment.spec import Spec
from gspo.policy.embedded import build_tokenizer, embedded_folder
from gspo.tasks.dataset import DatasetTask

REWARDS = """
import asyncio

def exact(completions, answer, **columns):
    return [float(text[: len(right)] == right) for text, right in zip(completions, answer)]

async def digits(completion, row):
    await asyncio.sleep(0)
    return len(set(completion)) / 12

def raises(completion, row):
    return row["answr"]

def nothing(completions):
    return None
"""
RUN = """
model = "embedded:sort"
dataset = "data.jsonl"
reward = ["scores:exact", "scores:digits"]
reward_weights = [1.0, 0.5]
prompts = 4
completions = 4
max_tokens = 6
learning_rate = 1e-3
eval_prompts = 4
eval_every = 1

[data]
heldout = 2e-1
epochs = 2
"""
ROWS = [{"prompt": f"{n:03d}", "answer": "".join(sorted(f"{n:03d}"))} for n in range(8)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's file with data and rewards beside it; the working directory is elsewhere."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "scores", raising=False)
    (tmp_path / "scores.py").write_text(REWARDS)
    (tmp_path / "run.toml").write_text(RUN)
    write(tmp_path, ROWS)
    return tmp_path


def write(folder: Path, rows: list[Any]) -> None:
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))


def spec_of(folder: Path, *overrides: str, runs: str = "runs") -> Spec:
    return read_spec(folder / "run.toml", [f"path={folder / runs}", *overrides])


@pytest.mark.slow
async def test_a_run_ends_in_the_same_weights_wherever_it_is_killed(folder: Path):
    spec, watch = spec_of(folder), Silent()
    assert spec.steps == 3  # two epochs of 6 rows, 4 in a step: the second step is in both
    told = "6 rows to train on and 2 held out: 3 steps of 4 prompts go over them 2 x"
    assert f"\n{told}\n" in make_plan(spec)
    whole = (await run_experiment(spec, watch)).run
    assert watch.notes[1] == told
    assert json.loads((whole / "dataset.json").read_text())["train"] == 6
    last = records(whole)[-1]
    assert last["train/exact"] + 0.5 * last["train/digits"] == pytest.approx(last["train/reward"])
    assert last["val/prompts"] == 2  # each held-out row once
    for event in (("evaluated", 0), ("stepped", 1), ("evaluated", 2)):
        with pytest.raises(Killed):
            await run_experiment(spec_of(folder, runs="broken"), KilledAt(*event))
    broken = (await run_experiment(spec_of(folder, runs="broken"), Silent())).run
    assert records(broken) == records(whole)
    assert weights(broken, 3) == weights(whole, 3)

    write(folder, [*ROWS[:-1], ROWS[-1] | {"answer": "x"}])
    told = r"data\.jsonl has changed since the run .* began: it had {'train': 6"
    with pytest.raises(DataError, match=told):
        await run_experiment(spec_of(folder), Silent())
    (spec.folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"began: it had a damaged dataset\.json, now {'train': 6"):
        await check_dataset(spec, spec.make_task())
    await check_dataset(new := spec_of(folder, "name=other"), new.make_task())


@pytest.mark.parametrize(
    ("overrides", "kind", "told"),
    [
        (["reward=scores:raises"], RolloutError, r"KeyError: 'answr'(.|\n)*in the reward 'raises'"),
        (["reward=scores:nothing"], DataError, r"'nothing' of .*data\.jsonl, row \d: None"),
        (["data.heldout=0.0"], DataError, "no row of .* give data.heldout, or eval_prompts = 0"),
    ],
)
async def test_rewards_are_tried_before_a_model_is_loaded(
    folder: Path, overrides: list[str], kind: type[Exception], told: str
):
    spec = spec_of(folder, "reward_weights=[1.0]", "reward=scores:exact", *overrides)
    with pytest.raises(kind, match=told):
        await run_experiment(spec, Silent())
    assert not spec.folder.exists()


def test_rows_that_the_context_has_no_room_for(folder: Path):
    write(folder, [*ROWS, *({"prompt": digit * 505, "answer": ""} for digit in "12")])
    spec, tokenizer = spec_of(folder), build_tokenizer()
    told = r"row (9|10) \(and 1 more rows\): the prompt has 507 tokens, which with max_tokens = 6"
    with pytest.raises(SampleTooLongError, match=told):
        make_plan(spec)
    check_prompts(spec, spec.make_task(), tokenizer, 513)
    check_prompts(spec, spec.make_task(), tokenizer, None)
    few = spec_of(folder, "data={heldout = 0.0, shuffle = false}", "steps=2", "eval_prompts=0")
    check_prompts(few, few.make_task(), tokenizer, 512)  # the run never comes to rows 9 and 10
    tokenizer.chat_template = None
    with pytest.raises(SampleTooLongError, match=r"row \d+ \(and 1 more rows\)"):
        check_prompts(spec, spec.make_task(), tokenizer, 511)


def test_a_template_that_refuses_a_row_and_one_that_is_not_there(folder: Path):
    write(folder, [*ROWS, {"messages": [{"role": "usr", "content": "5"}], "answer": ""}])
    spec, tokenizer = spec_of(folder), build_tokenizer()
    with pytest.raises(DataError, match=r"data\.jsonl, row 9: "):
        check_prompts(spec, spec.make_task(), tokenizer, 512)
    write(folder, ROWS)
    named = spec_of(folder, "data.chat_template_kwargs.enable_thinking=false")
    told = "'embedded:sort' has no chat template with a variable 'enable_thinking'"
    with pytest.raises(ConfigError, match=told):
        check_prompts(named, named.make_task(), tokenizer, 512)
    tokenizer.chat_template = f"{tokenizer.chat_template}{{{{ enable_thinking }}}}"
    check_prompts(named, named.make_task(), tokenizer, 512)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=told):
        check_prompts(named, named.make_task(), tokenizer, 512)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dataset": "x.jsonl"}, "a dataset needs reward"),
        ({"dataset": "x.jsonl", "reward": "a:b", "rollout": "a:b"}, "one of the two"),
        ({"dataset": "x.jsonl", "reward": "a:b", "task": "sort"}, "leave one out"),
        ({"task": "sort", "reward": "a:b"}, "belong to a dataset"),
        ({"task": "sort", "data": {"epochs": 2}}, "belong to a dataset"),
        ({"dataset": "x", "reward": "a:b", "data": {"epochs": 2}, "steps": 3}, "leave steps"),
        ({"dataset": "x", "rollout": "a:b", "data": {"system_prompt": "x"}}, "your rollout"),
        ({"dataset": "x", "reward": "a:b", "data": {"epoch": 2}}, "Did you mean 'epochs'"),
        ({"dataset": "x", "reward": [5]}, "reward"),
    ],
)
def test_fields_that_contradict(fields: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        Spec(model="embedded:sort", **fields)


def test_epochs_become_steps_and_a_stored_run_is_read_again(folder: Path):
    spec = spec_of(folder)
    assert (spec.steps, spec.data.epochs) == (3, None)
    assert Spec(**json.loads(spec.model_dump_json())) == spec


async def test_an_epoch_begins_after_the_sft(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    async def groups(self: Rollouts, split: str, indices: range, size: int, step: int) -> list:
        asked.extend(indices)
        return []

    monkeypatch.setattr(Rollouts, "groups", groups)
    (folder / "lessons.jsonl").write_text("")
    spec = spec_of(folder, "sft.data=lessons.jsonl")
    model: Any = None
    rollouts, task = Rollouts(spec, model), spec.make_task()
    assert isinstance(task, DatasetTask)
    told = how_often(spec, task)
    assert spec.steps == 4 and "3 steps of 4 prompts go over them 2 x" in told
    for step in range(1, spec.steps):
        await rollouts.batch(step)
    assert asked == [*range(12)]


def test_names_in_a_file_are_found_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "held.csv").write_text("prompt,answer\n900,009\n")
    spec = spec_of(folder, "data.heldout=held.csv")
    task = spec.make_task()
    assert task is not None and task.sizes == {"train": 8, "heldout": 1}
    assert spec.reward == [f"{folder / 'scores.py'}:{name}" for name in ("exact", "digits")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GspoError, match=r"'no_such_data', which is no file, .* needs the package"):
        spec_of(folder, "dataset=no_such_data")


THINKS = "{% if not think %}{{ '0' }}{% endif %}"


@pytest.mark.slow
async def test_variables_of_the_template_and_the_system_turn_reach_the_prompt(folder: Path):
    model = folder / "model"
    shutil.copytree(embedded_folder("embedded:sort"), model)
    template = model / "chat_template.jinja"
    template.write_text(THINKS + template.read_text())
    options = [f"model={model}", "data.system_prompt=abc", "data.epochs=1"]
    for value, begins in (("true", "<|system|>abc"), ("false", "0<|system|>abc")):
        spec = spec_of(folder, *options, f"data.chat_template_kwargs.think={value}", runs=value)
        run = (await run_experiment(spec, Silent())).run
        batch = read_batch(run / "trajectories/train/0001.parquet")
        (choice,) = batch.groups[0].trajectories[0].choices()
        ids = choice.prompt_token_ids  # pyright: ignore[reportAttributeAccessIssue]
        text = str(build_tokenizer().decode(ids))
        assert text.startswith(begins), text
