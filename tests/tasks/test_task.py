from __future__ import annotations

from typing import Any

import pytest

from gspo.tasks import Problem, Task, load_task


class Coin(Task):
    """Too few problems: both may lie in one split."""

    max_tokens = 1
    sides = 1

    def draw(self, key: int) -> Problem:
        return Problem(f"side {key % self.sides}", str(key % self.sides))

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)


def test_splits_never_share_a_prompt():
    task = load_task("reasoning-gym:products", {"max_digits": 1, "max_terms": 2})
    prompts = {
        split: {task.problem(split, i).prompt for i in range(150)} for split in ("train", "heldout")
    }
    assert not prompts["train"] & prompts["heldout"]
    assert len(prompts["heldout"]) > 3


def test_a_problem_depends_on_split_index_and_seed_only():
    task = load_task("sort")
    first = task.problem("train", 3, seed=1)
    task.problem("heldout", 0)
    assert task.problem("train", 3, seed=1) == first
    others = [task.problem("train", 4, 1), task.problem("heldout", 3, 1), task.problem("train", 3)]
    assert first not in others


def test_a_task_with_too_few_problems_says_so():
    with pytest.raises(RuntimeError, match="the task has too few problems"):
        for split in ("train", "heldout"):
            Coin().problem(split, 0)


@pytest.mark.parametrize("system", [None, "Say the side."])
def test_the_messages_of_a_problem(system: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Coin, "system_prompt", system)
    messages = Coin().messages(Problem("side 0", "0"))
    assert messages[-1] == {"role": "user", "content": "side 0"}
    assert messages[:-1] == ([{"role": "system", "content": system}] if system else [])
