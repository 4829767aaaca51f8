"""Reward functions of the user's own: found, called and checked.

Two shapes are known, `async` or not:

| shape | called with |
|---|---|
| `reward(completion, row) -> float` | a completion's text, and its row of the dataset |
| `reward(completions, **columns) -> list[float]` | TRL's: all completions of a prompt, and each
column as a list of the same length, `prompts` too |

As in TRL, `completions` are texts if the prompt is a text; if it is a list of messages, each is a
list of one message.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspo.core.byname import load_object
from gspo.core.errors import ConfigError, DataError, RolloutTimeoutError, shown
from gspo.core.plain import plain_reward
from gspo.core.progress import all_or_cancel
from gspo.tasks.task import Problem

LIMIT_SECONDS = 600.0
"""How long an `async` reward function may take for one prompt."""

_ARGUMENTS = ("completions", "prompts")
_SHAPES = "write (completion, row) -> float, or TRL's (completions, **columns) -> list[float]"


@dataclass(frozen=True)
class Reward:
    """A reward function and its part in the sum.

    Attributes:
        name: of its metric.
        parameters: by name; of TRL's shape, if `completions` is among them.
    """

    name: str
    function: Callable[..., Any]
    weight: float
    parameters: Mapping[str, inspect.Parameter]

    @property
    def batched(self) -> bool:
        """Whether it takes all completions of a prompt at once."""
        return "completions" in self.parameters

    def columns(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What it is given of a row: all if it has `**columns`, else those that it names.

        Raises:
            DataError: the row lacks a column, or has one that would hide an argument.
        """
        if not self.batched:
            second = [*self.parameters][1]
            if second in row and second != "row":
                raise DataError(
                    f"reward {self.name!r}: its second argument is the whole row, not the column "
                    f"{second!r} of {where}: {_SHAPES}"
                )
            return {}
        kinds = self.parameters.values()
        if hidden := [name for name in _ARGUMENTS if name in row]:
            raise DataError(f"{where}: a column {hidden[0]!r} hides what a reward is given: rename")
        named = [p for p in kinds if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = {p.name for p in named if p.default is p.empty} - {*_ARGUMENTS}
        if missing := sorted(needed - row.keys()):
            raise DataError(
                f"{where} has no column {missing[0]!r}, which the reward {self.name!r} takes; "
                f"it has: {', '.join(row)}"
            )
        if any(p.kind is p.VAR_KEYWORD for p in kinds):
            return dict(row)
        return {p.name: row[p.name] for p in named if p.name in row}


def load_rewards(given: Sequence[Any], weights: Sequence[float] | None = None) -> list[Reward]:
    """The reward functions, each `module:function` or a function, with their weights (default 1).

    Raises:
        ConfigError: see `load_object`; another shape; two of one name; or not a weight for each.
    """
    weights = [1.0] * len(given) if weights is None else weights
    if len(weights) != len(given):
        raise ConfigError(f"{len(weights)} reward_weights for {len(given)} rewards: give one each")
    rewards: list[Reward] = []
    for named, weight in zip(given, weights, strict=True):
        function = load_object(named, "reward") if isinstance(named, str) else named
        name = getattr(function, "__name__", type(function).__name__)
        try:
            signature = inspect.signature(function)
            if "completions" not in signature.parameters:
                signature.bind("completion", {})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reward = {shown(named)}: {error}: {_SHAPES}") from None
        if any(reward.name == name for reward in rewards):
            raise ConfigError(f"two rewards are called {name!r}: rename one, for its metric")
        rewards.append(Reward(name, function, float(weight), signature.parameters))
    return rewards


async def grade(
    rewards: Sequence[Reward], problem: Problem, prompt: Any, completions: Sequence[str]
) -> list[tuple[float, dict[str, float]]]:
    """The weighted sum of all rewards, and each by name, of each completion.

    Args:
        problem: a row of the dataset.
        prompt: its text, or its messages.

    Raises:
        DataError: a reward that is no finite number, or not as many as completions.
        RolloutTimeoutError: an `async` one took longer than `LIMIT_SECONDS`.
    """
    values = await all_or_cancel([_values(r, problem, prompt, completions) for r in rewards])
    return [
        (
            sum(reward.weight * value for reward, value in zip(rewards, of_one, strict=True)),
            {reward.name: value for reward, value in zip(rewards, of_one, strict=True)},
        )
        for of_one in zip(*values, strict=True)
    ]


async def _values(
    reward: Reward, problem: Problem, prompt: Any, completions: Sequence[str]
) -> list[float]:
    row, size = problem.entry, len(completions)
    columns = reward.columns(row, problem.where)
    told = f"the reward {reward.name!r} of {problem.where}"
    if not reward.batched:
        calls = [_called(reward, told, text, dict(row)) for text in completions]
        return _numbers(told, await all_or_cancel(calls), size)
    said: list[Any] = [*completions]
    if not isinstance(prompt, str):
        said = [[{"role": "assistant", "content": text}] for text in completions]
    given = {name: [value] * size for name, value in columns.items()}
    if "prompts" in reward.parameters or len(columns) == len(row):
        given["prompts"] = [prompt] * size
    return _numbers(told, await _called(reward, told, completions=said, **given), size)


async def _called(reward: Reward, told: str, *arguments: Any, **columns: Any) -> Any:
    limit = asyncio.timeout(LIMIT_SECONDS)
    try:
        async with limit:
            value = reward.function(*arguments, **columns)
            return await value if inspect.isawaitable(value) else value
    except Exception as error:
        if isinstance(error, TimeoutError) and limit.expired():
            late = f"{told} took longer than {LIMIT_SECONDS:.0f} s: give what it awaits a limit"
            raise RolloutTimeoutError(late) from None
        error.add_note(f"in {told}")
        raise


def _numbers(told: str, values: Any, size: int) -> list[float]:
    """The values as numbers; those of numpy and torch count."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != size:
        raise DataError(
            f"{told}: {shown(values)} for {size} completions: return a list of {size} numbers"
        )
    remedy = "return a finite number, 0 if the function says nothing of this row"
    return [plain_reward(v, f"{told}, completion {n}", remedy) for n, v in enumerate(values)]
