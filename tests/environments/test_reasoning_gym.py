from __future__ import annotations

import pytest

pytest.importorskip("reasoning_gym")

from gspo.core.errors import ConfigError
from gspo.environments import Action, load_environment
from gspo.tasks import load_task


def test_an_episode_is_a_question_and_its_score():
    environment = load_environment("reasoning-gym:chain_sum", {"max_digits": 1, "min_digits": 1})()
    problem = load_task("reasoning-gym:chain_sum", {"max_digits": 1, "min_digits": 1}).draw(7)
    assert environment.reset(7) == problem.prompt
    step = environment.step(Action(problem.answer))
    assert (step.reward, step.done, environment.max_turns) == (1.0, True, 1)
    assert environment.step(Action("no idea")).reward < 1


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="Did you mean 'chain_sum'"):
        load_environment("reasoning-gym:chain_sun")
