"""`reasoning-gym:<dataset>`: a question, an answer, the dataset's own score."""

from __future__ import annotations

from typing import Any

from gspo.environments.environment import Action, Environment, Step
from gspo.tasks.gym import GymTask


class ReasoningGym(Environment):
    """The task of the same name, as an episode of one turn."""

    max_turns = 1
    max_tokens = GymTask.max_tokens

    def __init__(self, dataset: str, **options: Any):
        self._task = GymTask(f"reasoning-gym:{dataset}", options)

    def reset(self, seed: int) -> str:
        self._problem = self._task.draw(seed)
        return self._problem.prompt

    def step(self, action: Action) -> Step:
        return Step(reward=self._task.score(self._problem, action.text), done=True)
