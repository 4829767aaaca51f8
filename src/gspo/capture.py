"""Record what an agent asks: `art.trajectory()`, and ART's names for the same.

    async with art.trajectory(model) as t:
        await agent(model.openai_client())      # any code; its calls are recorded in t
        t.reward = 1.0

The calls are recorded by the server (`gspo.serve.episodes`), in every task and thread that is
started inside the block, with the tokens that were sampled.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeAlias, overload

from openai import AsyncOpenAI
from pydantic import PrivateAttr

from gspo.core.draws import purpose
from gspo.core.errors import ConfigError, DataError, shown
from gspo.core.plain import plain_number
from gspo.core.variables import holding
from gspo.model import Model
from gspo.serve.episodes import Episode, current_episode, recording
from gspo.trajectories import Trajectory

P = ParamSpec("P")
AnyModel: TypeAlias = Model[Any]


class CapturedTrajectory(Trajectory):
    """The trajectory of an `art.trajectory()` block, and where a program is captured in it."""

    _episode: Episode | None = PrivateAttr(None)
    _model: AnyModel | None = PrivateAttr(None)

    @property
    def base_url(self) -> str:
        """For programs that make their own OpenAI client: whatever it asks is recorded here.

        Raises:
            ConfigError: the model is not served on a port, the block names no model, or it has
                ended.
        """
        model, episode = self._captured("base_url")
        return model.backend().episode_url(model, episode)

    @property
    def api_key(self) -> str:
        """The key that goes with `base_url`."""
        return self._captured("api_key")[0].inference_api_key or "gspo"

    @property
    def inference_name(self) -> str:
        """The model's name there."""
        return self._captured("inference_name")[0].inference_name

    def openai_client(self) -> AsyncOpenAI:
        """The model's client."""
        return self._captured("openai_client")[0].openai_client()

    def _captured(self, name: str) -> tuple[AnyModel, Episode]:
        if self._episode is None:
            raise ConfigError(f"{name}: the art.trajectory() block has ended; ask for it inside")
        if self._model is None:
            raise ConfigError(f"{name}: of which model? Give it: art.trajectory(model)")
        return self._model, self._episode


@contextmanager
def _captured(model: AnyModel | None) -> Iterator[CapturedTrajectory]:
    trajectory = CapturedTrajectory()
    episode = Episode(trajectory, purpose=purpose())
    trajectory._episode, trajectory._model = episode, model
    try:
        with recording(episode):
            yield trajectory
    finally:
        episode.end()
        trajectory._episode = trajectory._model = None
        trajectory.finish()


class Block:
    """What `trajectory` returns: `with` and `async with` enter it, and it decorates functions."""

    def __init__(self, model: AnyModel | None):
        self._model = model
        self._entered: Any = None

    def __enter__(self) -> CapturedTrajectory:
        if self._entered is not None:
            raise ConfigError("this art.trajectory() is entered already: make one for each block")
        self._entered = _captured(self._model)
        return self._entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        entered, self._entered = self._entered, None
        entered.__exit__(*error)

    async def __aenter__(self) -> CapturedTrajectory:
        return self.__enter__()

    async def __aexit__(self, *error: Any) -> None:
        self.__exit__(*error)

    def __call__(self, function: Callable[P, Awaitable[Any]]) -> Callable[P, Any]:
        if not inspect.iscoroutinefunction(function):
            raise ConfigError(f"art.trajectory decorates async functions, not {shown(function)}")

        @functools.wraps(function)
        async def captured(*args: P.args, **kwargs: P.kwargs) -> Trajectory:
            given = (value for value in (*args, *kwargs.values()) if isinstance(value, Model))
            with _captured(self._model or next(given, None)) as trajectory:
                result = await function(*args, **kwargs)
            return _finished(trajectory, result, function.__qualname__)

        return captured


def _finished(captured: Trajectory, result: Any, name: str) -> Trajectory:
    """The trajectory of a decorated rollout that returned `result`."""
    if isinstance(result, Trajectory):
        if not result.messages_and_choices:  # the rollout left them to the capture
            result.messages_and_choices = captured.messages_and_choices
            result.tools = captured.tools
            result.additional_histories = captured.additional_histories
        return result
    if result is not None:
        reward = plain_number(result)
        if reward is None:
            raise DataError(
                f"{name} returned {shown(result)}; under art.trajectory it returns its reward, a "
                "Trajectory, or nothing"
            )
        captured.reward = float(reward)
    return captured


@overload
def trajectory(target: AnyModel | None = None) -> Block: ...
@overload
def trajectory(target: Callable[P, Awaitable[Any]]) -> Callable[P, Any]: ...
def trajectory(target: Any = None) -> Any:
    """Record the calls of an agent in a trajectory.

        async with art.trajectory(model) as t: ...   # or with; t is an art.Trajectory

        @art.trajectory                              # each call makes a trajectory and returns it
        async def rollout(model, scenario): ...      # returns its reward

    A decorated function returns a reward, or a Trajectory, which is given the recorded messages if
    it has none; inside, `art.auto_trajectory()` is the trajectory. Only one model is recorded: the
    one that is given, that a decorated function is called with, or that is asked first.

    Args:
        target: a model, whose calls are recorded, and which `t.base_url` is of; None: the first
            that is asked; or the async function to decorate.

    Raises:
        ConfigError: something else.
    """
    if isinstance(target, Model | None):
        return Block(target)
    if inspect.iscoroutinefunction(target):
        return Block(None)(target)
    raise ConfigError(f"art.trajectory takes a model or an async function, not {shown(target)}")


@overload
def auto_trajectory(*, required: Literal[True]) -> Trajectory: ...
@overload
def auto_trajectory(*, required: bool = False) -> Trajectory | None: ...
def auto_trajectory(*, required: bool = False) -> Trajectory | None:
    """The trajectory that calls are recorded in here; None outside of any.

    Raises:
        ConfigError: there is none, and it is required.
    """
    episode = current_episode()
    if episode is None and required:
        raise ConfigError(
            "auto_trajectory(required=True): nothing is recorded here: call it inside "
            "art.trajectory() or art.capture_auto_trajectory(...)"
        )
    return episode and episode.trajectory


async def capture_auto_trajectory(coroutine: Coroutine[Any, Any, Any]) -> Trajectory:
    """Run a coroutine, and return the trajectory of the calls that it made."""
    with trajectory() as captured:
        await coroutine
    return captured


_yielded: contextvars.ContextVar[list[Trajectory] | None] = contextvars.ContextVar(
    "gspo_yielded", default=None
)


def yield_trajectory(trajectory: Trajectory) -> None:
    """Hand a trajectory to the `capture_yielded_trajectory` around this code; without one, nothing
    happens: the same program runs where nobody trains."""
    if (yielded := _yielded.get()) is not None:
        yielded.append(trajectory)


async def capture_yielded_trajectory(coroutine: Coroutine[Any, Any, Any]) -> Trajectory:
    """Run a coroutine, and return the last trajectory that it handed to `yield_trajectory`.

    Raises:
        DataError: it handed over none.
    """
    yielded: list[Trajectory] = []
    with holding(_yielded, yielded):
        await coroutine
    if not yielded:
        raise DataError(
            f"{getattr(coroutine, '__qualname__', coroutine)} yielded no trajectory: "
            "call art.yield_trajectory(trajectory) in it"
        )
    return yielded[-1]
