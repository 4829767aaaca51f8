"""Play one episode: the environment and the model take turns, and a trajectory comes of it."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import inspect
import json
import threading
import traceback
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from openai import BadRequestError

from gspo.capture import trajectory
from gspo.core.compute import Threads
from gspo.core.draws import seed_of
from gspo.core.errors import DataError, GspoError, RolloutError, RolloutTimeoutError, shown
from gspo.core.plain import plain_reward, plain_values
from gspo.environments.environment import Action, Call, Environment, Step
from gspo.model import TrainableModel
from gspo.tasks.task import Split, conversation, held_out
from gspo.trajectories import Trajectory

_TRIES = 1000


async def play(
    environment: Environment,
    model: TrainableModel,
    seed: int,
    *,
    max_turns: int | None = None,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    step_timeout: float | None = None,
) -> Trajectory:
    """Play the episode of a seed.

    It ends when the environment says so, after `max_turns` turns, or when the conversation has no
    room left in the model's context. The last two set the metric `cut_off`.

    Args:
        environment: is closed at the end.
        model: who plays.
        seed: of the environment. What the model samples depends on the rollout's place.
        max_turns, max_tokens, step_timeout: its limits; None: the environment's own.

    Returns:
        The trajectory. Its reward is the sum of the steps'; its turn rewards are these, if the
        episode may have several.

    Raises:
        RolloutTimeoutError: the environment hangs.
        RolloutError: it raised.
        DataError: the engine refuses its opening, or that or a step is none.
    """
    place = _Place(environment, seed, step_timeout)
    rewards: list[float] = []
    step = Step()
    try:
        with trajectory(model) as t:
            opening = await place.call(environment.reset, seed)
            if not isinstance(opening, str):
                raise DataError(f"{place}: reset returned {shown(opening)}; it must return a text")
            tools, create = environment.tools, model.openai_client().chat.completions.create
            options: dict[str, Any] = {
                "model": model.inference_name,
                "max_tokens": max_tokens or environment.max_tokens,
                "temperature": temperature,
            } | ({"tools": tools} if tools else {})
            messages: list[Any] = conversation(environment.system_prompt, opening)
            most = max_turns or environment.max_turns
            while not step.done and len(rewards) < most:
                place.turn = len(rewards) + 1
                try:
                    response = await create(messages=messages, **options)
                except BadRequestError as error:
                    if rewards and "context" in error.message:  # it has become too long
                        break
                    raise DataError(f"{place}: the engine refuses it: {error.message}") from None
                message = response.choices[0].message
                action = Action(message.content or "", [*map(_call, message.tool_calls or ())])
                step = await place.call(environment.step, action)
                rewards.append(place.reward_of(step))
                messages += [message.model_dump(exclude_none=True), *_answers(place, message, step)]
            t.reward, t.turn_rewards = sum(rewards), rewards if most > 1 else None
            t.metrics |= {**step.metrics, "turns": len(rewards), "cut_off": not step.done}
            t.metadata["seed"] = seed
        return t
    finally:
        if not place.hangs:  # else its thread may still be in it
            environment.close()


async def episode_seed(
    make: Callable[[], Environment], split: Split, index: int, seed: int = 0
) -> tuple[int, str | None]:
    """The seed of episode `index` of a split, and what tells its instance from others, or None.

    Raises:
        DataError: no instance of the split was found: there are too few.
    """
    environment = make()
    try:
        for attempt in range(_TRIES):
            drawn = seed_of("environment", split, seed, index, attempt) % 2**31
            place = _Place(environment, drawn)
            instance = await place.call(environment.instance, drawn)
            if instance is None:
                return drawn, None
            if held_out(str(instance)) == (split == "heldout"):
                return drawn, hashlib.sha256(str(instance).encode()).hexdigest()[:16]
    finally:
        environment.close()
    raise DataError(
        f"{type(environment).__name__}: no {split} instance in {_TRIES} draws, it has too few. "
        "A tenth is held out by a hash of `instance(seed)`; if that returns None, held-out "
        "episodes are those of other seeds"
    )


def _call(call: Any) -> Call:
    return Call(call.function.name, json.loads(call.function.arguments))


def _answers(place: _Place, message: Any, step: Step) -> list[dict[str, Any]]:
    """What the model is told of its turn: by the user, or by each tool that it called.

    Raises:
        DataError: the step's text is no text, or not one for each call.
    """
    calls, text = message.tool_calls or (), step.text
    texts: list[Any] = [text] * (len(calls) or 1) if isinstance(text, str) else [text]
    texts = [*text] if isinstance(text, list | tuple) else texts
    if not all(isinstance(one, str) for one in texts) or (calls and len(texts) != len(calls)):
        most = f", or a list of {len(calls)}, one for each call" if calls else ""
        raise DataError(f"{place}: the step's text is {shown(text)}; it must be a text{most}")
    if not calls:
        return [{"role": "user", "content": "\n".join(texts)}]
    return [
        {"role": "tool", "tool_call_id": call.id, "content": answer}
        for call, answer in zip(calls, texts, strict=True)
    ]


class _Place:
    """Where an episode stands: names it in errors, and holds its environment to its time."""

    def __init__(self, environment: Environment, seed: int, seconds: float | None = None):
        self.name, self.seed = type(environment).__name__, seed
        self.seconds = seconds or environment.step_timeout
        self.turn, self.hangs = 0, False

    def __str__(self) -> str:
        return f"the environment {self.name} (seed {self.seed}, turn {self.turn})"

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of the environment: a blocking one in a thread of its own.

        Raises:
            RolloutTimeoutError: it has not ended in time. Python code in it is ended; code in C
                goes on until the process ends.
            RolloutError: it raised.
        """
        limit, thread, running = asyncio.timeout(self.seconds), None, None
        try:
            async with limit:
                if inspect.iscoroutinefunction(function):
                    return await function(*arguments)
                context, threads = copy_context(), Threads(1, "gspo-environment")
                job = threads.submit(lambda: context.run(_outcome, function, *arguments))
                thread, running = threads.each[0], asyncio.wrap_future(job)
                result, error = await running
                if error is not None:
                    raise error
                return await result if inspect.isawaitable(result) else result
        except (Exception, SystemExit) as error:
            if limit.expired():
                raise RolloutTimeoutError(
                    f"{self}: {function.__name__} has not ended after {self.seconds:g} s "
                    "(step_timeout): find out what it waits for, or give it more time"
                ) from None
            if isinstance(error, GspoError):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise RolloutError(
                f"{self}: {function.__name__} raised {type(error).__name__}: {error} "
                f"({last.filename}, line {last.lineno})"
            ) from error
        finally:
            if thread is not None and running is not None and running.cancelled():
                self.hangs = True
                _end(thread)

    def reward_of(self, step: Any) -> float:
        """The reward of a step, checked.

        Raises:
            DataError: it is no `Step`, or its reward or a metric is no number.
        """
        if not isinstance(step, Step):
            raise DataError(f"{self}: step returned {shown(step)}; it must return a Step")
        reward = plain_reward(step.reward, f"{self}: the reward", "it must be a finite number")
        plain_values(step.metrics, f"{self}: metrics")
        return reward


def _outcome(function: Callable[..., Any], *arguments: Any) -> tuple[Any, BaseException | None]:
    """A function's result, or its error, as a value: no future can carry a StopIteration."""
    try:
        return function(*arguments), None
    except BaseException as error:
        return None, error


def _end(thread: threading.Thread) -> None:
    """End a thread, as soon as it runs Python code."""
    ident, error = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)
