"""Rollouts of `gspo train`: without a chat template, and with a task of the user's own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo.backend.stored_batch import read_batch
from gspo.core.errors import ConfigError, DataError, RolloutError
from gspo.experiment.loop import run_experiment
from gspo.experiment.plan import make_plan
from gspo.experiment.rollout import plain_prompt
from gspo.experiment.spec import Spec, read_spec
from gspo.policy.embedded import build_tokenizer, embedded_folder


class Silent:
    def started(self, spec: Any, step: int, changed: Any) -> None: ...
    def stepped(self, step: int, metrics: Any) -> None: ...
    def evaluated(self, step: int, estimate: Any) -> None: ...


SIZES: dict[str, Any] = {"steps": 1, "prompts": 2, "completions": 4, "eval_prompts": 0}


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """The embedded model as a folder without a chat template."""
    folder = tmp_path / "base"
    shutil.copytree(embedded_folder("embedded:sort"), folder)
    (folder / "chat_template.jinja").unlink()
    return folder


async def test_a_model_without_a_chat_template_trains_on_plain_prompts(
    tmp_path: Path, base_model: Path
):
    spec = Spec(path=str(tmp_path), model=str(base_model), task="sort", **SIZES)
    assert make_plan(spec).chat_template is False
    assert make_plan(Spec(task="sort")).chat_template is True
    outcome = await run_experiment(spec, Silent())
    batch = read_batch(outcome.run / "trajectories/train/0001.parquet")
    tokenizer = build_tokenizer()
    for trajectory in (t for group in batch.groups for t in group):
        (choice,) = trajectory.choices()
        prompt = choice.prompt_token_ids  # pyright: ignore[reportAttributeAccessIssue]
        assert tokenizer.decode(prompt) == plain_prompt(trajectory.messages()[:1])  # pyright: ignore[reportArgumentType]
        assert len(choice.token_ids) > 0  # pyright: ignore[reportAttributeAccessIssue]


async def test_a_prompt_that_the_engine_refuses_is_one_line(tmp_path: Path):
    spec = Spec(path=str(tmp_path), task="sort", max_tokens=512, **SIZES)
    with pytest.raises(DataError, match=r"the engine refuses a prompt .* context is 512"):
        await run_experiment(spec, Silent())


PARITY = """
from gspo.tasks import Problem, Task

class Parity(Task):
    max_tokens = 2

    def __init__(self, limit=10_000):
        self.limit = limit

    def draw(self, key):
        return Problem(str(key % self.limit), "1" if key % 2 else "0")

    def score(self, problem, completion):
        return float(completion[:1] == problem.answer)

class Broken(Parity):
    def score(self, problem, completion):
        return completion[99]

class NoDraw(Task):
    max_tokens = 2

class NoLimit(Parity):
    max_tokens = property(lambda self: self.nowhere)

Number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's file and, beside it, the user's own tasks; the working directory is elsewhere."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_tasks", raising=False)
    (tmp_path / "own_tasks.py").write_text(PARITY)
    path = tmp_path / "run.toml"
    sizes = "\n".join(f"{name} = {size}" for name, size in SIZES.items())
    path.write_text(f'task = "own_tasks:Parity"\nmodel = "embedded:sort"\n{sizes}\n')
    return path


async def test_a_task_of_the_users_own_stands_beside_the_file(own: Path):
    spec = read_spec(own, [f"path={own.parent / 'runs'}", "task_options.limit=64"])
    assert make_plan(spec).longest_completion == 2
    outcome = await run_experiment(spec, Silent())
    record = json.loads((outcome.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= record["train/reward"] <= 1
    batch = read_batch(outcome.run / "trajectories/train/0001.parquet")
    assert all(int(g.trajectories[0].messages()[0]["content"]) < 64 for g in batch.groups)  # pyright: ignore


async def test_what_it_raises_is_told_by_its_line(own: Path):
    spec = read_spec(own, [f"path={own.parent / 'runs'}", 'task="own_tasks:Broken"'])
    with pytest.raises(RolloutError, match=r"IndexError(.|\n)*return completion\[99\]"):
        await run_experiment(spec, Silent())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_tasks:Number", {}, "must be a class that derives from"),
        ("own_tasks:NoDraw", {}, "draw"),
        ("own_tasks:NoLimit", {}, "needs max_tokens"),
        ("own_tasks:Parity", {"limt": 3}, "limt"),
        ("own_tasks:Parities", {}, "Did you mean 'Parity'"),
    ],
)
def test_a_class_that_is_no_task_is_refused_by_the_plan(
    own: Path, name: str, options: dict[str, Any], message: str
):
    overrides = [f'task="{name}"', *(f"task_options.{k}={v}" for k, v in options.items())]
    with pytest.raises(ConfigError, match=message):
        make_plan(read_spec(own, overrides))
