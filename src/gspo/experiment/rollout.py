"""Rollouts of an experiment: the task's own, or the user's function."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from openai import BadRequestError
from openai.types.chat.chat_completion import Choice

from gspo.core.byname import find_module, load_object
from gspo.core.choices import as_choice
from gspo.core.draws import drawing_for, seed_of
from gspo.core.errors import ConfigError, DataError
from gspo.experiment.spec import Spec
from gspo.experiment.user_error import rollout_error
from gspo.gather import gather_trajectory_groups
from gspo.model import TrainableModel
from gspo.tasks import Problem, Split, Task, load_task
from gspo.train.minibatches import shaped_reward
from gspo.train.settings import resolve
from gspo.trajectory import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Scenario:
    """What a rollout function gets: which prompt it is, and the task's problem if there is one."""

    split: Split
    index: int
    seed: int
    problem: Problem | None


_ROUNDS = 3
Rollout = Callable[[TrainableModel, Scenario], Awaitable[Trajectory]]


class Rollouts:
    """Makes the groups of an experiment. Every group is a function of the spec and its index."""

    def __init__(self, spec: Spec, model: TrainableModel):
        self.spec = spec
        self.model = model
        self.task = load_task(spec.task, spec.task_options) if spec.task else None
        self.rollout = load_rollout(spec.rollout) if spec.rollout else None

    def scenario(self, split: Split, index: int) -> Scenario:
        """Prompt `index` of a split."""
        seed = self.spec.seed
        problem = self.task.problem(split, index, seed) if self.task else None
        return Scenario(split, index, seed, problem)

    async def group(self, split: Split, index: int, size: int, step: int) -> TrajectoryGroup:
        """`size` rollouts of one prompt, at the weights of a step.

        What they sample depends on these numbers and the spec's seed, not on what was sampled
        before: a run that was killed goes on as it would have, evaluations or not.

        Raises:
            RolloutError: the user's own rollout or task raised.
        """
        try:
            return await self._group(split, index, size, step)
        except Exception as error:
            told = rollout_error(error, split, index, step)
            if told is None:
                raise
            raise told from error

    async def _group(self, split: Split, index: int, size: int, step: int) -> TrajectoryGroup:
        scenario = self.scenario(split, index)
        if self.rollout is not None:
            rollout = self.rollout
            with drawing_for(split, index):  # the backend adds its seed and its step
                return await TrajectoryGroup(rollout(self.model, scenario) for _ in range(size))
        assert self.task is not None
        seed = seed_of(self.spec.seed, step, split, index)
        return await self._answers(self.task, scenario, size, seed)

    async def batch(self, step: int) -> list[TrajectoryGroup]:
        """The groups of one step; with dynamic sampling, those of fresh prompts for flat ones."""
        spec = self.spec
        rounds = _ROUNDS if spec.dynamic_sampling else 1
        settings = resolve(options=spec.train)
        kept: list[TrajectoryGroup] = []
        flat: list[TrajectoryGroup] = []
        for extra in range(rounds):
            missing = spec.prompts - len(kept)
            first = (step * rounds + extra) * spec.prompts
            groups = await gather_trajectory_groups(
                (self.group("train", first + i, spec.completions, step) for i in range(missing)),
                pbar_desc=None,
            )
            for group in groups:
                signal = len({shaped_reward(t, settings.overlong) for t in group}) > 1
                (kept if signal or not spec.dynamic_sampling else flat).append(group)
            if len(kept) == spec.prompts:
                break
        # Too few with signal: the flat ones stay in the count, as they would without this.
        return [*kept, *flat[: spec.prompts - len(kept)]]

    def _needs_experts(self, split: Split) -> bool:
        """Whether training replays the engine's expert choices, or is to compare them."""
        options = self.spec.train
        return split == "train" and (options.routing_replay == "rollout" or options.measure_routing)

    async def _answers(
        self, task: Task, scenario: Scenario, size: int, seed: int
    ) -> TrajectoryGroup:
        """One request for all completions: the prompt is computed once."""
        problem = scenario.problem
        assert problem is not None
        messages = task.messages(problem)
        choices = await self._sample(
            messages,
            n=size,
            max_tokens=self.spec.max_tokens or task.max_tokens,
            temperature=self.spec.temperature,
            seed=seed,
            extra_body={"return_routes": True} if self._needs_experts(scenario.split) else None,
        )
        return TrajectoryGroup(
            Trajectory(
                messages_and_choices=[*messages, choice],
                reward=task.score(problem, choice.message.content or ""),
                metadata={"answer": problem.answer},
            )
            for choice in choices
        )

    async def _sample(self, messages: list[Any], **options: Any) -> list[Choice]:
        """The choices of one request; of a model without a chat template, by its plain text.

        Raises:
            DataError: the engine refuses the prompt.
        """
        client, name = self.model.openai_client(), self.model.inference_name
        backend: Any = self.model.backend()
        try:
            if backend.policy(self.model).tokenizer.chat_template is None:
                prompt = plain_prompt(messages)
                answer = await client.completions.create(model=name, prompt=prompt, **options)
            else:
                answer = await client.chat.completions.create(
                    model=name, messages=messages, **options
                )
        except BadRequestError as error:
            raise DataError(f"the engine refuses a prompt of the task: {error.message}") from None
        return [choice for found in answer.choices if (choice := as_choice(found))]


def plain_prompt(messages: list[dict[str, Any]]) -> str:
    """The conversation as text, for a model without a chat template.

    >>> plain_prompt([{"role": "system", "content": "Sort."}, {"role": "user", "content": "312"}])
    'Sort.\\n\\n312\\n'
    """
    return "\n\n".join(message["content"] for message in messages) + "\n"


def check_rollout(name: str) -> None:
    """Look for the file or the module of `module:function`, without running it.

    Raises:
        ConfigError: there is none, or the name has another form.
    """
    find_module(name, "rollout")


def load_rollout(name: str) -> Rollout:
    """The function that `module:function` or `folder/file.py:function` names.

    Raises:
        ConfigError: see `load_object`; or it is not an async function of two arguments.
    """
    function = load_object(name, "rollout")
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"rollout = {name!r} is not an async function")
    if len(inspect.signature(function).parameters) != 2:
        raise ConfigError(f"rollout = {name!r} must take two arguments: (model, scenario)")
    return function
