"""`textworld:house` or a challenge, `textworld:coin_collector`: generated text adventures."""

from __future__ import annotations

import argparse
import threading
from typing import Any

from gspo.core.draws import seed_of
from gspo.core.errors import ConfigError, check_names, check_whole
from gspo.environments.environment import Action, Environment, Step, optional
from gspo.policy.embedded import cache_folder

_MAKING = threading.Lock()
"""TextWorld's generator is not made for threads."""


class TextWorld(Environment):
    """A game of TextWorld. The reward is its score, as a share of the most that it gives.

    Args:
        kind: `house`, with the options rooms, objects and quest (its length), or a challenge of
            TextWorld without its `tw-`, with that challenge's options.
        games: how many there are. Each is made once, in about a second, and kept.
        commands: whether the model is shown the commands that are possible.
    """

    step_timeout = 600.0  # one waits for the games of others

    def __init__(self, kind: str, games: int = 100, commands: bool = True, **options: Any):
        textworld = optional("textworld", "textworld", "textworld")
        challenges = optional("textworld.challenges", "textworld", "textworld").CHALLENGES
        check_whole("environment_options.games", games, 2)
        known = ["house", *(name.removeprefix("tw-") for name in challenges)]
        check_names("textworld", [kind], known, {}, "game")
        _, self._make, add_options = challenges.get(f"tw-{kind}", (None, _house, _house_options))
        parser = _Parser(f"textworld:{kind} with options {options}", add_help=False)
        add_options(parser)
        written = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
        flags = [n if v is True else f"{n}={v}" for n, v in written if v is not False]
        self._settings, self._textworld, self._game = (
            vars(parser.parse_args(flags)),
            textworld,
            None,
        )
        words = textworld.__version__, kind, str(sorted(self._settings.items()))
        self._folder = cache_folder() / "textworld" / f"{seed_of(*words):x}"
        self.games, self.commands = games, commands

    def instance(self, seed: int) -> str:
        return f"{self._folder.name} {seed % self.games}"

    def reset(self, seed: int) -> str:
        path = self._folder / f"{seed % self.games}.z8"
        with _MAKING:
            if not path.with_suffix(".json").exists():  # it is written last
                options = self._textworld.GameOptions()
                options.seeds, options.path, options.file_ext = seed % self.games, str(path), ".z8"
                self._textworld.generator.compile_game(self._make(self._settings, options), options)
        wanted = {"admissible_commands": True, "max_score": True, "objective": True}
        infos = self._textworld.EnvInfos(**wanted, description=True, score=True)
        self._game = self._textworld.start(str(path), infos)
        state, self._score = self._game.reset(), 0
        return f"{state.objective}\n{self._shown(state, state.description)}"

    def step(self, action: Action) -> Step:
        assert self._game is not None
        state, score, done = self._game.step(action.text.strip())
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
    options.nb_rooms, options.nb_objects = settings["rooms"], settings["objects"]
    options.quest_length = settings["quest"]
    return optional("textworld.generator", "textworld", "textworld").make_game(options)
