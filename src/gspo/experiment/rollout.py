"""Rollouts of an experiment: answers to the task's prompts, or the user's function.

What the user's code raises is shown with the lines of that code.
"""

from __future__ import annotations

import inspect
import os
import sysconfig
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from openai import APIStatusError
from openai.types.chat.chat_completion import Choice

import gspo
from gspo.core.byname import load_object
from gspo.core.choices import as_choice
from gspo.core.draws import drawing_for, seed_of
from gspo.core.errors import ConfigError, DataError, GspoError, RequestError, RolloutError
from gspo.core.progress import all_or_cancel, in_order
from gspo.environments import load_environment
from gspo.environments.play import episode_seed, play
from gspo.experiment.spec import Spec
from gspo.gather import gather_trajectory_groups
from gspo.model import TrainableModel
from gspo.tasks import Problem, Split, Task
from gspo.train.minibatches import shaped_reward
from gspo.train.settings import resolve
from gspo.trajectories import Rolled, Trajectory, TrajectoryGroup, settled

_ROUNDS = 3
"""How often dynamic sampling draws prompts for one step, at most."""
FRAMES = 4
"""How many of the user's innermost lines are shown."""
LINES = 4
"""How many lines of the exception's text are shown."""
_OURS = str(Path(gspo.__file__).parent) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


@dataclass(frozen=True)
class Scenario:
    """What a rollout function is given: which prompt it is, and the task's problem, if any."""

    split: Split
    index: int
    seed: int
    problem: Problem | None


Rollout = Callable[[TrainableModel, Scenario], Awaitable[Rolled]]


class Rollouts:
    """Makes the groups of an experiment. Each group depends only on the spec and its index."""

    def __init__(self, spec: Spec, model: TrainableModel, task: Task | None = None):
        self.spec = spec
        self.model = model
        self.task = spec.make_task() if task is None else task
        self.rollout = load_rollout(spec.rollout) if spec.rollout else None
        named, options = spec.environment, spec.environment_options
        self.environment = load_environment(named, options) if named else None

    async def batches(self) -> AsyncGenerator[list[TrajectoryGroup], None]:
        """The groups of each step that the run has left, to be trained on one after another."""
        first, ahead = await self.model.get_step(), self.spec.steps_ahead
        works = (self.batch(step) for step in range(first, self.spec.steps))
        async with aclosing(in_order(works, 1 + ahead, first)) as batches:
            async for batch in batches:
                yield batch

    async def batch(self, step: int) -> list[TrajectoryGroup]:
        """Make the groups of one step; dynamic sampling replaces flat ones by fresh prompts'."""
        spec, size = self.spec, self.spec.prompts
        # The first epoch of a dataset begins after the SFT.
        place = step - bool(spec.sft and self.task and self.task.sizes)
        if not spec.dynamic_sampling:
            indices = range(place * size, (place + 1) * size)
            return await self.groups("train", indices, spec.completions, step)
        turns = resolve(options=spec.train).turn_weight > 0
        differing: list[TrajectoryGroup] = []
        flat: list[TrajectoryGroup] = []
        for first in range(place * _ROUNDS * size, (place + 1) * _ROUNDS * size, size):
            indices = range(first, first + size - len(differing))
            for group in await self.groups("train", indices, spec.completions, step):
                rewards = {
                    (shaped_reward(t, spec.train), *((turns and t.turn_rewards) or ()))
                    for t in group
                }
                (differing if len(rewards) > 1 else flat).append(group)
            if len(differing) == size:
                break
        # If too few have a signal, flat ones stay in the count, as without dynamic sampling.
        return [*differing, *flat][:size]

    async def groups(
        self, split: Split, indices: Iterable[int], size: int, step: int
    ) -> list[TrajectoryGroup]:
        """Run `size` rollouts of each of these prompts, at the weights of a step.

        What they sample depends on these numbers and the spec's seed, not on what was sampled
        before. So a run that was killed goes on as it would have, evaluations or not.

        Raises:
            RolloutError: the user's own rollout or task raised.
            DataError: the engine refuses a prompt.
        """
        return await gather_trajectory_groups(
            (self._group(split, index, size, step) for index in indices),
            pbar_desc=None,
            rollout_timeout=self.spec.rollout_timeout,
        )

    async def _group(self, split: Split, index: int, size: int, step: int) -> TrajectoryGroup:
        seed = self.spec.seed
        with users_errors(split, index, step):
            problem = self.task.problem(split, index, seed) if self.task else None
            scenario = Scenario(split, index, seed, problem)
            if self.environment is not None:
                rollout = await self._episodes(scenario)
            elif self.rollout is not None:
                rollout = self.rollout
            else:
                with drawing_for(split, index):  # of rewards that ask a model
                    return await self._answers(scenario, size, seed_of(seed, step, split, index))

        async def rolled() -> list[Trajectory | BaseException]:
            with users_errors(split, index, step):
                return await settled(rollout(self.model, scenario))

        with drawing_for(split, index):  # the backend adds its seed and its step
            return TrajectoryGroup(chain(*await all_or_cancel([rolled() for _ in range(size)])))

    async def _episodes(self, scenario: Scenario) -> Rollout:
        """A rollout function that plays the environment's episode of a scenario."""
        make, spec = self.environment, self.spec
        assert make is not None
        seed, instance = await episode_seed(make, scenario.split, scenario.index, scenario.seed)

        limits = spec.model_dump(include={"max_turns", "max_tokens", "temperature", "step_timeout"})

        async def episode(model: TrainableModel, scenario: Scenario) -> Trajectory:
            trajectory = await play(make(), model, seed, **limits)
            trajectory.metadata["instance"] = instance
            return trajectory

        return episode

    async def _answers(self, scenario: Scenario, size: int, seed: int) -> TrajectoryGroup:
        """Ask for all completions in one request, which computes the prompt once.

        Raises:
            RequestError: see `ask`.
        """
        task, problem, train = self.task, scenario.problem, self.spec.train
        assert task is not None and problem is not None
        messages: list[Any] = task.messages(problem)
        # Training replays the engine's expert choices, or compares them with the trainer's.
        expert_choices = scenario.split == "train" and (
            train.routing_replay == "rollout" or train.measure_routing
        )
        options: dict[str, Any] = {
            "model": self.model.inference_name,
            "n": size,
            "max_tokens": self.spec.max_tokens or task.max_tokens,
            "temperature": self.spec.temperature,
            "seed": seed,
            "extra_body": {"return_routes": True} if expert_choices else {},
        }
        backend: Any = self.model.backend()
        chats = backend.policy(self.model).tokenizer.chat_template is not None
        client = self.model.openai_client()
        choices = await ask(client, messages, chats, task.template_kwargs, **options)
        grades = await task.grade(problem, [choice.message.content or "" for choice in choices])
        row = {"row": problem.where} if problem.where else {}
        return TrajectoryGroup(
            Trajectory(
                messages_and_choices=[*messages, choice],
                reward=reward,
                metrics={**parts},
                metadata={"answer": problem.answer, **row},
            )
            for choice, (reward, parts) in zip(choices, grades, strict=True)
        )


async def ask(
    client: Any,
    messages: list[dict[str, Any]],
    chats: bool,
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Choice]:
    """Completions of a conversation.

    Args:
        client: of the model.
        chats: the model has a chat template; else it is sent the plain text of the messages.
        template_kwargs: variables of the template.
        options: of the request.

    Raises:
        RequestError: the engine refuses the prompt.
    """
    body = {"chat_template_kwargs": template_kwargs} if chats and template_kwargs else {}
    options["extra_body"] = {**options.get("extra_body", {}), **body}
    try:
        if chats:
            answer = await client.chat.completions.create(messages=messages, **options)
        else:
            answer = await client.completions.create(prompt=plain_prompt(messages), **options)
    except APIStatusError as error:
        raise RequestError(f"the engine refuses a prompt: {error.message}") from None
    return [*filter(None, map(as_choice, answer.choices))]


def plain_prompt(messages: list[dict[str, Any]]) -> str:
    """The conversation as text, for a model without a chat template.

    >>> plain_prompt([{"role": "system", "content": "Sort."}, {"role": "user", "content": "312"}])
    'Sort.\\n\\n312\\n'
    """
    return "\n\n".join(message["content"] for message in messages) + "\n"


def load_rollout(name: str) -> Rollout:
    """The function that `module:function` or `folder/file.py:function` names.

    Raises:
        ConfigError: see `load_object`; or it is not an async function of two arguments.
    """
    function = load_object(name, "rollout")
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"rollout = {name!r} is not an async function")
    try:
        inspect.signature(function).bind("model", "scenario")
    except TypeError as error:
        raise ConfigError(
            f"rollout = {name!r} must take two arguments: (model, scenario): {error}"
        ) from None
    return function


@contextmanager
def users_errors(split: str, index: int, step: int) -> Iterator[None]:
    """Run the user's code in the block, and show what it raises by the user's lines.

    A call of `sys.exit` is an error too: it would end the run as if it had finished.

    Args:
        split, index: of the prompt.
        step: calls of `train` so far.

    Raises:
        RolloutError: the user's code raised. A mistake in gspo itself keeps its traceback.
        DataError: what it returned is refused, or a prompt is; it says which prompt's.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _in_library(f)]
        users = [frame for frame in frames if not frame.filename.startswith(_OURS)]
        place = f"the rollout of prompt {index} ({split}), after step {step}"
        if not users and isinstance(error, DataError | RequestError):
            raise DataError(f"{place}: {error}") from error
        if not users or (users[-1] is not frames[-1] and not isinstance(error, GspoError)):
            raise
        lines = str(error).splitlines() or ["(without a text)"]
        text = [f"{place}, raised {type(error).__name__}: {lines[0]}", *lines[1:LINES]]
        if len(lines) > LINES:
            text.append("...")
        if (cause := error.__cause__) is not None:
            text += f"caused by {type(cause).__name__}: {cause}".splitlines()[:1]
        text += getattr(error, "__notes__", [])  # such as which reward, and which row
        text += [f"  {f.filename}, line {f.lineno}, in {f.name}: {f.line}" for f in users[-FRAMES:]]
        saved = f"Step {step} is saved" if step else "Nothing was trained yet"
        text.append(f"{saved}: mend it, and the same command goes on.")
        raise RolloutError("\n".join(text)) from error


def _in_library(frame: traceback.FrameSummary) -> bool:
    """Whether a frame lies in an installed package, in Python's own, or in no file."""
    name = frame.filename
    library = name.startswith(("<", *_LIBRARIES)) or "site-packages" in name
    return library and not name.startswith(_OURS)
