"""`gymnasium:Blackjack-v1`: an environment in Gymnasium's form whose actions can be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gspo.core.byname import optional
from gspo.core.errors import ConfigError, shown
from gspo.environments.environment import Action, Environment, Step


class Gymnasium(Environment):
    """Observations are shown as text. Actions are text, or of a `Discrete` space by their names.

    Args:
        name: as `gymnasium.make` takes it: an id, or `module:id`. Further options go to it.
        actions: names of a discrete space's actions, in order; by default their numbers.
        prompt: the system turn.
        unknown: the reward of an action that is none of these; nothing happens then.
    """

    def __init__(
        self,
        name: str,
        actions: Sequence[str] | None = None,
        prompt: str | None = None,
        unknown: float = 0.0,
        **options: Any,
    ):
        gymnasium = optional("gymnasium", "gymnasium", "gymnasium", f"gymnasium:{name}")
        try:
            self._env = gymnasium.make(name, **options)
        except Exception as error:
            raise ConfigError(f"gymnasium:{name} with options {options}: {error}") from error
        space = self._env.action_space
        self._actions: list[str] | None = None
        if isinstance(space, gymnasium.spaces.Discrete):
            self._first, count = int(space.start), int(space.n)
            self._actions = list(actions or map(str, range(self._first, self._first + count)))
            if len(self._actions) != count:
                raise ConfigError(
                    f"gymnasium:{name} has {count} actions; actions = {shown(actions)}"
                )
        elif not isinstance(space, gymnasium.spaces.Text):
            raise ConfigError(
                f"gymnasium:{name}: its actions, {space}, cannot be written as a text"
            )
        self.system_prompt, self._unknown = prompt, unknown

    def reset(self, seed: int) -> str:
        return str(self._env.reset(seed=seed)[0])

    def step(self, action: Action) -> Step:
        done: Any = action.text
        if self._actions is not None:
            if (name := action.text.strip()) not in self._actions:
                return Step(f"Actions: {', '.join(self._actions)}", self._unknown)
            done = self._first + self._actions.index(name)
        shown, reward, terminated, truncated, _ = self._env.step(done)
        return Step(str(shown), float(reward), terminated or truncated)

    def close(self) -> None:
        self._env.close()
