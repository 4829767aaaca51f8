"""`textarena:GuessTheNumber-v0`: TextArena's games for one player."""

from __future__ import annotations

import pprint
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gspo.core.byname import optional
from gspo.core.errors import ConfigError, suggestion
from gspo.environments.environment import Action, Environment, Step

_RANDOM = threading.Lock()
"""The games draw from Python's global generator: one game at a time, each with its own state."""


class TextArena(Environment):
    """A game. It says only what is new since the last turn, and rewards the end.

    Args:
        game: a name of TextArena's; its options are keyword arguments.
        brackets: whether an action without [brackets] is put into them, as the games want it.
    """

    def __init__(self, game: str, brackets: bool = True, **options: Any):
        games = optional("textarena.envs.registration", "textarena", "textarena", game)
        if game not in games.ENV_REGISTRY:
            near = suggestion(game, games.ENV_REGISTRY)
            raise ConfigError(f"TextArena has no game {game!r}.{near}")
        raw = game if game.endswith("-raw") else f"{game}-raw"  # without TextArena's wrappers
        try:
            self._game = games.make(raw, **options)
        except Exception as error:  # an option, or data that the game would download
            raise ConfigError(f"textarena:{game} with options {options}: {error}") from error
        self._brackets = brackets

    def reset(self, seed: int) -> str:
        self._state = random.Random(seed).getstate()
        with self._drawing():
            self._game.reset(num_players=1, seed=seed)
        return self._said()

    def step(self, action: Action) -> Step:
        text = action.text if "[" in action.text or not self._brackets else f"[{action.text}]"
        with self._drawing():
            done, _ = self._game.step(text)
        if not done:
            return Step(self._said())
        rewards, info = self._game.close()
        return Step(info[0].get("reason") or "", (rewards or {}).get(0, 0.0), True)

    def instance(self, seed: int) -> str:
        self.reset(seed)
        return re.sub(r" at 0x\w+", "", pprint.pformat(self._game.state.game_state))

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        with _RANDOM:
            before = random.getstate()
            random.setstate(self._state)
            try:
                yield
            finally:
                self._state = random.getstate()
                random.setstate(before)

    def _said(self) -> str:
        """What the game has said since the last turn, without the player's own words."""
        _, messages = self._game.get_observation()
        return "\n".join(text for sender, text, _ in messages if sender == -1)
