"""Each thing that gspo can be given from outside: one place to add it, and it arrives."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gspo as art
from gspo.cli import app
from gspo.objective import PRESETS
from gspo.objective.surrogates import SURROGATES
from gspo.tasks import load_task
from gspo.train.settings import Settings

MINE = '''
"""A preset, a surrogate, a task and a metric, as a user writes them."""

import gspo as art
from gspo.objective import Objective, Terms, register_surrogate
from gspo.tasks import Problem, Task


class Large(Task):
    """Answer with digits from `least` on, which is an option of this task."""

    max_tokens = 12

    def __init__(self, least: str = "1"):
        self.least = least

    def draw(self, key):
        return Problem(str(key % 10**12), self.least)

    def score(self, problem, completion):
        return sum(digit >= problem.answer for digit in completion) / 12


WIDTHS = []


def soft(terms: Terms):
    width = terms.constants["width"]
    WIDTHS.append(width)
    return terms.mean(width * ((terms.ratio - 1) / width).tanh() * terms.a), None


register_surrogate("test_soft", soft, has_range=False, constants=["width"], levels=["token"])
art.register_algorithm(
    "test_soft_grpo",
    Objective("token", 1.0, 1.0, surrogate="test_soft", constants={"width": 0.125}),
    formula="width tanh((r - 1) / width) A",
    source="tests/test_extending.py",
)
'''

RUN = """
name = "from_file"
model = "embedded:sort"
task = "additions:Large"
steps = 1
prompts = 4
completions = 8
eval_prompts = 2
train.algorithm = "test_soft_grpo"

[task_options]
least = "4"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The user's module, in a folder of its own; what it registers is forgotten afterwards."""
    (tmp_path / "additions.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("additions")
    PRESETS.pop("test_soft_grpo")  # pyright: ignore[reportAttributeAccessIssue]
    SURROGATES.pop("test_soft")
    del sys.modules["additions"]


def logged(run: Path) -> dict[str, float]:
    """All metrics of a run; of one that was logged at several steps, the last."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


@pytest.mark.asyncio
async def test_a_users_preset_surrogate_task_and_metric_train_a_step(mine: Any, tmp_path: Path):
    backend = art.LocalBackend(path=tmp_path)
    model = art.TrainableModel(name="mine", project="test", base_model="embedded:sort")
    task = load_task("additions:Large", {"least": "4"})

    async def rollout(index: int) -> art.Trajectory:
        problem = task.problem("train", index)
        messages = task.messages(problem)
        answer = await model.openai_client().chat.completions.create(
            model=model.inference_name,
            messages=messages,  # pyright: ignore[reportArgumentType]
            max_tokens=task.max_tokens,
        )
        choice = answer.choices[0]
        text = choice.message.content or ""
        return art.Trajectory(
            messages_and_choices=[*messages, choice],
            reward=task.score(problem, text),
            metrics={"length": len(text)},
        )

    try:
        await model.register(backend)
        groups = await art.gather_trajectory_groups(
            art.TrajectoryGroup(rollout(index) for _ in range(8)) for index in range(4)
        )
        options = art.dev.TrainConfig(algorithm="test_soft_grpo", minibatches=2)
        result = await model.train(groups, art.TrainConfig(learning_rate=1e-3), options)
        await model.log(split="val", metrics={"judge": 0.5}, step=result.step)
    finally:
        await backend.close()

    assert result.metrics["optim/updates"] >= 1
    assert set(mine.WIDTHS) == {0.125}  # the constant reached the surrogate's function

    metrics = logged(tmp_path / "test" / "mine")
    lengths = [t.metrics["length"] for group in groups for t in group]
    assert metrics["train/length"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["val/judge"] == 0.5


def test_the_command_line_takes_them_from_a_file(mine: Any, tmp_path: Path):
    (tmp_path / "run.toml").write_text(RUN)
    path = ["--set", f"path={tmp_path / 'runs'}", "--set", "learning_rate=0.001"]
    ran = CliRunner().invoke(app, ["train", str(tmp_path / "run.toml"), *path, "--json"])
    assert ran.exit_code == 0, ran.output

    run = tmp_path / "runs" / "gspo" / "from_file"
    spec = json.loads((run / "spec.json").read_text())
    assert spec["train"]["algorithm"] == "test_soft_grpo"
    assert spec["task_options"] == {"least": "4"}
    assert logged(run)["optim/updates"] >= 1
    assert set(mine.WIDTHS) == {0.125}


def test_gspo_presets_lists_a_preset_of_the_users(mine: Any):
    shown = CliRunner().invoke(app, ["presets", "--json"])
    preset = {row["name"]: row for row in json.loads(shown.output)}["test_soft_grpo"]
    assert preset["defaults"]["width"] == 0.125
    assert preset["formula"] == "width tanh((r - 1) / width) A"
    assert preset["source"] == "tests/test_extending.py"


def test_an_option_of_the_task_that_it_lacks_is_named(mine: Any):
    with pytest.raises(art.errors.ConfigError, match="most"):
        load_task("additions:Large", {"most": "4"})


def test_an_option_of_gspo_is_one_field_of_dev_train_config():
    assert set(art.dev.TrainConfig.model_fields) <= set(Settings.model_fields)
