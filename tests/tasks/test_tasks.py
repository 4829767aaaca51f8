from __future__ import annotations

import pytest

from gspo.errors import ConfigError
from gspo.tasks import load_task, task_names
from gspo.tasks.digits import Add


@pytest.mark.parametrize("name", task_names())
def test_the_reference_answer_scores_one_and_others_zero(name: str):
    task = load_task(name)
    for index in range(20):
        problem = task.problem("train", index)
        assert task.score(problem, problem.answer) == 1.0
        assert task.score(problem, problem.answer + "0") == 0.0
        assert task.score(problem, "") == 0.0
        assert len(problem.answer) < task.max_tokens


def test_splits_never_share_a_prompt():
    task = load_task("reasoning-gym:products", {"max_digits": 1, "max_terms": 2})
    prompts = {
        split: {task.problem(split, i).prompt for i in range(150)} for split in ("train", "heldout")
    }
    assert not prompts["train"] & prompts["heldout"]
    assert len(prompts["heldout"]) > 3


def test_add_looks_at_the_result_alone():
    task = Add()
    problem = task.draw(1)
    result = problem.answer.rpartition(";")[2]
    assert task.score(problem, f"nonsense;{result}") == 1.0
    assert len(problem.answer) >= 60


def test_reasoning_gym_is_scored_by_its_own_scorer():
    task = load_task("reasoning-gym:number_sorting")
    problem = task.problem("train", 0)
    assert task.score(problem, problem.answer) == 1.0
    assert task.score(problem, f"Well, <answer>{problem.answer}</answer>") == 1.0
    assert task.score(problem, "no idea") < 1.0
    assert task.problem("train", 0) == problem


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("srot", {}, "Did you mean 'sort'"),
        ("sort", {"digits": 3}, "has no options"),
        ("reasoning-gym:number_sortin", {}, "Did you mean 'number_sorting'"),
        ("reasoning-gym:products", {"max_digit": 1}, "Did you mean 'max_digits'"),
        ("reasoning-gym:products", {"min_terms": 9, "max_terms": 2}, "refuses"),
    ],
)
def test_mistakes_are_named(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_task(name, options)
