"""`textworld:house` or a challenge, `textworld:coin_collector`: generated text adventures."""

from __future__ import annotations

import argparse
import threading
from importlib import import_module
from typing import Any

from gspo.core.byname import optional
from gspo.core.draws import seed_of
from gspo.core.errors import ConfigError, check_names, check_whole
from gspo.environments.environment import Action, Environment, Step
from gspo.policy.embedded import cache_folder

_ALONE = threading.Lock()
"""Neither TextWorld's generator nor its parser is made for threads."""
_TOLD = ("admissible_commands", "max_score", "objective", "description", "score")
"""What TextWorld is asked to tell of a game."""


class TextWorld(Environment):
    """A game of TextWorld. The reward is its score, as a share of the most that it gives.

    Args:
        kind: `house`, with the options rooms, objects and quest (its length), or a challenge of
            TextWorld without its `tw-`, with that challenge's options.
        games: how many there are. Each is made once, in about a second, and kept.
        commands: whether the model is shown the commands that are possible.
    """

    _game: Any = None
    step_timeout = 600.0  # one waits for the games of others

    def __init__(self, kind: str, games: int = 100, commands: bool = True, **options: Any):
        textworld = optional("textworld", "textworld", "textworld", f"textworld:{kind}")
        challenges = import_module("textworld.challenges").CHALLENGES
        check_whole("environment_options.games", games, 2)
        check_names("textworld", [kind], ["house", *(tw[3:] for tw in challenges)], {}, "game")
        _, self._make, add_options = challenges.get(f"tw-{kind}", (None, _house, _house_options))
        add_options(parser := _Parser(f"textworld:{kind} with options {options}", add_help=False))
        written = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
        flags = [n if v is True else f"{n}={v}" for n, v in written if v is not False]
        self._settings = vars(parser.parse_args(flags))
        made_of = seed_of(textworld.__version__, kind, str(sorted(self._settings.items())))
        self._folder = cache_folder() / "textworld" / f"{made_of:x}"
        self._textworld, self.games, self.commands = textworld, games, commands

    def instance(self, seed: int) -> str:
        return f"{self._folder.name} {seed % self.games}"

    def reset(self, seed: int) -> str:
        path = self._folder / f"{seed % self.games}.z8"
        with _ALONE:
            if not path.with_suffix(".json").exists():  # it is written last
                options = self._textworld.GameOptions()
                options.seeds, options.path, options.file_ext = seed % self.games, str(path), ".z8"
                self._textworld.generator.compile_game(self._make(self._settings, options), options)
            infos = self._textworld.EnvInfos(**dict.fromkeys(_TOLD, True))
            self._game = self._textworld.start(str(path), infos)
            state, self._score = self._game.reset(), 0
        return f"{state.objective}\n{self._shown(state, state.description)}"

    def step(self, action: Action) -> Step:
        command = " ".join(action.text.replace("\\", " ").split())  # "\\" is the machine's own
        with _ALONE:
            state, score, done = self._game.step(command)
        earned, self._score = (score - self._score) / max(1, state.max_score), score
        return Step(self._shown(state, state.feedback), earned, done)

    def _shown(self, state: Any, text: str) -> str:
        shown = " ".join(text.partition("\n>")[0].split())  # the rest is a status line
        return f"{shown}\n{'; '.join(state.admissible_commands)}" if self.commands else shown

    def close(self) -> None:
        if self._game is not None:
            self._game.close()


class _Parser(argparse.ArgumentParser):
    """Reads a challenge's options as TextWorld's own commands do."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{self.prog}: {message}")


def _house_options(parser: argparse.ArgumentParser) -> None:
    for name, default in (("--rooms", 1), ("--objects", 3), ("--quest", 1)):
        parser.add_argument(name, type=int, default=default)


def _house(settings: dict[str, int], options: Any) -> Any:
    options.nb_rooms, options.nb_objects, options.quest_length = settings.values()
    return import_module("textworld.generator").make_game(options)
