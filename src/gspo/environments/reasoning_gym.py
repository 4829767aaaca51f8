"""`reasoning-gym:<dataset>`: a question, an answer, the dataset's own score."""

from __future__ import annotations

import functools
import json
from typing import Any

from gspo.environments.environment import Action, Environment, Step
from gspo.tasks.gym import GymTask
from gspo.tasks.task import Problem


class ReasoningGym(Environment):
    """The task of the same name, as an episode of one turn."""

    max_turns = 1
    max_tokens = GymTask.max_tokens

    def __init__(self, dataset: str, **options: Any):
        self._task = _task(dataset, json.dumps(options))

    def reset(self, seed: int) -> str:
        self._problem = _problem(self._task, seed)
        return self._problem.prompt

    def step(self, action: Action) -> Step:
        return Step(reward=self._task.score(self._problem, action.text), done=True)


@functools.lru_cache(maxsize=64)
def _task(dataset: str, options: str) -> GymTask:
    """One task for all episodes: some datasets read a dictionary when they are made."""
    return GymTask(f"reasoning-gym:{dataset}", json.loads(options))


@functools.lru_cache(maxsize=100_000)
def _problem(task: GymTask, seed: int) -> Problem:
    return task.draw(seed)
