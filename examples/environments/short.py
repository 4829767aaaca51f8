"""Games of Gymnasium, TextArena and TextWorld, told in a few characters.

An embedded model reads one character at a time, and cannot read prose. The rules, the chance and
the rewards are the games' own; only what is said, and how an action is written, is shorter here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gspo.environments import Action, Step
from gspo.environments.gymnasium import Gymnasium
from gspo.environments.textarena import TextArena
from gspo.environments.textworld import TextWorld


class Pole(Gymnasium):
    """CartPole, for 42 steps: keep the pole upright, by pushing the cart three steps at a time.

    A digit says how fast the pole turns, from 0 to the left to 9 to the right; the model writes
    `0` to push to the left and `9` to the right. Each step that the pole stands earns its share of
    1. Another answer ends the game.
    """

    max_turns = 14
    max_tokens = 2

    def __init__(self):
        super().__init__("CartPole-v1", ("0", "9"), max_episode_steps=3 * self.max_turns)

    def reset(self, seed: int) -> str:
        return self._told(super().reset(seed))

    def instance(self, seed: int) -> str:
        return super().reset(seed)  # all four numbers: the digits of a beginning are alike

    def step(self, action: Action) -> Step:
        if action.text not in ("0", "9"):
            return Step(done=True)
        earned, step = 0.0, Step()
        for _ in range(3):
            step = super().step(action)
            earned += step.reward / (3 * self.max_turns)
            if step.done:
                break
        return replace(step, text=self._told(str(step.text)), reward=earned)

    def _told(self, text: str) -> str:
        turning = float(text.strip("[]").split()[-1])
        self.possible = "009" if turning < 0 else "099"  # twice: to that side it is kept upright
        return str(min(max(int(turning // 0.3) + 5, 0), 9))


class Guess(TextArena):
    """GuessTheNumber with three digits and three guesses; the last one earns by how near it is.

    `+` says that the number is higher, `-` that it is lower. What is no number ends the game at 0.
    """

    max_turns = 3
    max_tokens = 4
    possible = tuple(map(str, range(100, 1000)))

    def __init__(self):
        most = self.max_turns - 1  # the game ends at the guess after these
        super().__init__("GuessTheNumber-v0", min_number=100, max_number=999, max_turns=most)

    def reset(self, seed: int) -> str:
        super().reset(seed)
        return "?"

    def step(self, action: Action) -> Step:
        if action.text not in self.possible:
            return Step(done=True)
        step = super().step(action)
        said = [sign for sign, word in (("+", "higher"), ("-", "lower")) if word in step.text]
        return replace(step, text=said[0] if said else "?")


KEYS = {"go north": "8", "go east": "6", "go south": "2", "go west": "4", "take coin": "5"}


class Coins(TextWorld):
    """The coin collector: rooms in a row, and a coin in the last.

    The model is told what is possible, and writes one of it: 8, 6, 2 and 4 go north, east, south
    and west as on a keypad, 5 takes the coin. Another answer does nothing.
    """

    max_tokens = 2

    def __init__(self, level: int, games: int = 100):
        super().__init__("coin_collector", games, level=level)
        self.max_turns = level + 2
        self.possible: Sequence[str] = ()

    def reset(self, seed: int) -> str:
        return self._told(super().reset(seed))

    def step(self, action: Action) -> Step:
        step = super().step(Action(self._commands.get(action.text, "look")))
        return replace(step, text=self._told(str(step.text)))

    def _told(self, text: str) -> str:
        commands = text.splitlines()[-1].split("; ")
        self._commands = {KEYS[c]: c for c in commands if c in KEYS}
        self.possible = "".join(self._commands)
        return self.possible
