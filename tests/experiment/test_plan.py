"""What `--dry-run` tells, what is refused before anything is trained; and runs on a dataset."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from experiment.small_runs import Silent, records
from experiment.test_loop import Killed, KilledAt, weights
from gspo import dev
from gspo.backend.stored_batch import read_batch
from gspo.core.errors import (
    ConfigError,
    DataError,
    GspoError,
    ModelError,
    RolloutError,
    SampleTooLongError,
)
from gspo.experiment.loop import run_experiment
from gspo.experiment.plan import check_dataset, check_prompts, how_often, make_plan
from gspo.experiment.rollout import Rollouts
from gspo.experiment.run_file import read_spec
from gspo.experiment.spec import Spec
from gspo.policy.embedded import build_tokenizer, embedded_folder
from gspo.tasks.dataset import DatasetTask
from models import folder as saved_model


def test_the_plan_of_the_embedded_model():
    plan = make_plan(Spec(task="add", prompts=8, completions=4))
    assert plan.splitlines()[0] == "gspo, ratios clipped to [0.9997, 1.0004]"
    assert "32 sequences per step, 8 per optimizer step; optimizer steps per step: 4" in plan
    assert "completions of up to 80 tokens; microbatches of up to 16384 tokens" in plan
    assert re.search(r"\n229,184 parameters, learning rate 0.00015 by the model's size\n", plan)
    total, *parts = map(int, re.findall(r"(\d+)(?: MiB|,|$)", plan.splitlines()[-1]))
    assert total * 2**20 > 16 * 229_184
    assert len(parts) == 6 and abs(total - sum(parts)) <= 3  # each is rounded


def test_options_that_change_the_plan():
    train = dev.TrainConfig(epsilon="auto", packed_sequence_length=512, epochs=2)
    plan = make_plan(Spec(task="sort", learning_rate=1e-3, train=train))
    assert "1.0004], to begin with\n" in plan
    assert "learning rate 0.001\n" in plan
    assert "optimizer steps per step: 8\n" in plan
    assert "of up to 512 tokens" in plan
    assert "no ratios are clipped" in make_plan(
        Spec(task="sort", train=dev.TrainConfig(algorithm="rloo"))
    )


def test_every_name_is_checked():
    with pytest.raises(ConfigError, match="Did you mean 'sort'"):
        make_plan(Spec(task="srot", model="embedded:sort"))
    with pytest.raises(ModelError, match="unknown model"):
        make_plan(Spec(task="sort", model="./nowhere"))
    with pytest.raises(ModelError, match="Did you mean"):
        make_plan(Spec(task="sort", model="embedded:sortt"))
    with pytest.raises(ConfigError, match="cannot import nothing_here"):
        make_plan(Spec(rollout="nothing_here:f", model="embedded:sort"))
    with pytest.raises(ConfigError, match="engines: 'localhost:8000'"):
        make_plan(Spec(task="sort", engines=["localhost:8000"]))
    teacher = dev.TrainConfig(kl_penalty_coef=1.0, kl_reference="./nobody")
    with pytest.raises(ModelError, match="kl_reference, the teacher: unknown model"):
        make_plan(Spec(task="sort", train=teacher))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cp_size": 2}, "cp_size=2 does not divide 1, .*: give another cp_size or nproc"),
        ({"nproc": 4, "ep_size": 3}, "ep_size=3 does not divide 4, "),
        ({"nproc": 2, "load": {"rollout_dtype": "bfloat16"}}, "or let vLLM servers sample"),
        ({"nproc": 2, "load": {"exact": True}}, "exact=True and rollout_dtype are not built"),
        ({"nproc": 2, "ep_size": 2, "load": {"lora": {}}}, "ep_size and lora"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_they_start(fields, message: str):
    with pytest.raises(ConfigError, match=message):
        make_plan(Spec(task="sort", **fields))


def test_the_number_of_processes_is_told():
    told = make_plan(Spec(task="sort", nproc=2, engines=["http://localhost:1"]))
    assert "trained by 2 processes" in told and "sampled by vLLM in float32" in told


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 600}, "max_tokens = 600: 'embedded:sort' has a context of 512 tokens"),
        ({"max_tokens": 512}, "give max_tokens = 511 or less"),
        ({"load": dev.InternalModelConfig(max_context=16)}, "max_tokens = 16: .* context of 16"),
    ],
)
def test_completions_that_leave_no_room_for_a_prompt_are_refused(
    fields: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        make_plan(Spec(task="sort", **fields))
    make_plan(Spec(task="sort", max_tokens=511))


def test_the_plan_has_the_models_own_context():
    plan = make_plan(Spec(task="lookup", max_tokens=600))  # embedded:lookup takes 2,048 tokens
    assert "completions of up to 600 tokens" in plan


def test_experts_that_a_model_lacks_are_not_divided(tmp_path: Path):
    dense = saved_model(tmp_path / "dense", "llama")
    with pytest.raises(ModelError, match=r"ep_size=2: .*dense.* has 0 experts that transformers"):
        make_plan(Spec(task="sort", model=str(dense), nproc=2, ep_size=2))
    with pytest.raises(
        ModelError, match=r"ep_size=3: 'embedded:sort' has \d+ experts that .* a divisor"
    ):
        make_plan(Spec(task="sort", nproc=3, ep_size=3))


def test_adapters_beside_divided_experts_are_named():
    load = {"lora": {"target_modules": ["q_proj", "v_proj"]}}
    assert "trained by 2" in make_plan(Spec(task="sort", nproc=2, ep_size=2, load=load))


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
