from __future__ import annotations

import pytest

from gspo.core.errors import ConfigError
from gspo.tasks import load_task


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
        ("reasoning-gym:number_sortin", {}, "Did you mean 'number_sorting'"),
        ("reasoning-gym:products", {"max_digit": 1}, "Did you mean 'max_digits'"),
        ("reasoning-gym:products", {"min_terms": 9, "max_terms": 2}, "refuses"),
    ],
)
def test_mistakes_are_named(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_task(name, options)
