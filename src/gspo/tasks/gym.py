"""Any dataset of reasoning-gym, scored by the dataset's scorer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from gspo.core.byname import optional
from gspo.core.errors import ConfigError, check_names, suggestion
from gspo.tasks.task import Problem, Task


class GymTask(Task):
    """`reasoning-gym:<dataset>`: prompts are the dataset's questions.

    The answer is what stands in the completion's last <answer>...</answer>, else all of it.
    """

    max_tokens = 256

    def __init__(self, name: str, options: dict[str, Any]):
        gym = optional("reasoning_gym", "reasoning-gym", "reasoning-gym", f"the task {name}")
        datasets = gym.factory.DATASETS
        dataset = name.partition(":")[2]
        if dataset not in datasets:
            raise ConfigError(
                f"reasoning-gym has no dataset {dataset!r}.{suggestion(dataset, datasets)}"
            )
        known = sorted(field.name for field in dataclasses.fields(datasets[dataset][1]))
        check_names(f"task_options of {name}", options, known, {})
        self.name = name
        self._make = functools.partial(gym.create_dataset, dataset, **options)
        try:
            self._scorer = self._make(size=1, seed=0)
        except AssertionError as error:
            raise ConfigError(f"{name} refuses {options}: {error}") from None

    def draw(self, key: int) -> Problem:
        entry = self._make(size=1, seed=key % 2**31)[0]
        return Problem(entry["question"], str(entry["answer"]), entry)

    def score(self, problem: Problem, completion: str) -> float:
        from reasoning_gym.utils import extract_answer

        tagged = extract_answer(completion)
        answer = completion.strip() if tagged is None else tagged
        return float(self._scorer.score_answer(answer, entry=dict(problem.entry)))
