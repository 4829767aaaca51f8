"""What an environment is: `reset`, `step`, and tools if its actions are calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """A call of a tool that the model made."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Action:
    """One turn of the model: what it wrote, and the calls in it, if the environment has tools."""

    text: str
    calls: Sequence[Call] = ()


@dataclass(frozen=True)
class Step:
    """What an action led to.

    Attributes:
        text: what the model is told; after several calls also a list, with a text for each.
        reward: what this turn earned. A trajectory's reward is the sum.
        done: whether the episode is over.
        metrics: numbers to log; the last ones of an episode count.
    """

    text: str | Sequence[str] = ""
    reward: float = 0.0
    done: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(ABC):
    """A game, a simulator, a checker: one object plays one episode at a time.

    Your own class derives from it, and has `reset` and `step`. Both may block, and are then called
    in a thread of their own, or be `async`. Whatever they draw comes from `reset`'s seed alone.

        class Guess(Environment):
            def reset(self, seed):
                self.number = random.Random(seed).randint(1, 8)
                return "A number from 1 to 8?"

            def step(self, action):
                if action.text == str(self.number):
                    return Step("Right.", reward=1, done=True)
                return Step("Higher." if action.text < str(self.number) else "Lower.")

            def instance(self, seed):
                self.reset(seed)
                return str(self.number)

    Attributes:
        system_prompt: the system turn, or None.
        tools: OpenAI's, if actions are calls; else None. `reset` may set it.
        max_turns: the model's turns in an episode, at most.
        max_tokens: the default limit of one turn, in tokens.
        step_timeout: seconds that a `reset` or a `step` may take.
    """

    system_prompt: str | None = None
    tools: list[dict[str, Any]] | None = None
    max_turns: int = 16
    max_tokens: int = 64
    step_timeout: float = 60.0

    @abstractmethod
    def reset(self, seed: int) -> Any:
        """Begin the episode of a seed (below 2**31); returns what the user says first, a text."""

    @abstractmethod
    def step(self, action: Action) -> Any:
        """Do what the model said; returns a `Step`."""

    def instance(self, seed: int) -> Any:
        """What makes the episode of a seed the one that it is, as a text; by default its opening.

        A tenth of all instances is held out, by a hash of this text: none is in both splits. None:
        instances cannot be told apart, and held-out episodes are those of other seeds.
        """
        return self.reset(seed)

    def close(self) -> None:  # noqa: B027
        """Give back what the episode holds."""
