"""Any dataset of reasoning-gym, scored by its own scorer."""

from __future__ import annotations

import dataclasses
from typing import Any

from gspo.core.errors import ConfigError, MissingDependencyError, check_arguments, suggestion
from gspo.tasks.task import Problem, Task


class GymTask(Task):
    """`reasoning-gym:<dataset>`: prompts are the dataset's questions.

    The answer is what stands in the completion's last <answer>...</answer>, else all of it.
    """

    max_tokens = 256

    def __init__(self, dataset: str, options: dict[str, Any]):
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise MissingDependencyError(
                "reasoning-gym", "reasoning-gym", f"the task reasoning-gym:{dataset}"
            ) from None
        if dataset not in DATASETS:
            raise ConfigError(
                f"reasoning-gym has no dataset {dataset!r}.{suggestion(dataset, DATASETS)}"
            )
        known = {field.name for field in dataclasses.fields(DATASETS[dataset][1])}
        unknown = [option for option in options if option not in known]
        self.name = f"reasoning-gym:{dataset}"
        check_arguments(f"task_options of {self.name}", unknown, sorted(known), {})
        self._make = reasoning_gym.create_dataset
        self._dataset = dataset
        self._options = options
        try:
            self._scorer = self._make(dataset, **{**options, "size": 1, "seed": 0})
        except AssertionError as error:
            raise ConfigError(f"{self.name} refuses {options}: {error}") from None

    def draw(self, key: int) -> Problem:
        options = {**self._options, "size": 1, "seed": key % 2**31}
        entry = self._make(self._dataset, **options)[0]
        return Problem(entry["question"], str(entry["answer"]), entry)

    def score(self, problem: Problem, completion: str) -> float:
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(completion)
        return float(
            self._scorer.score_answer(
                completion.strip() if answer is None else answer, entry=dict(problem.entry)
            )
        )
