"""An environment of one's own: say the larger of two digits, twice."""

from __future__ import annotations

import random

from gspo.environments import Action, Environment, Step


class Larger(Environment):
    """Each right answer earns a half."""

    max_turns = 2
    max_tokens = 2

    def reset(self, seed: int) -> str:
        rng = random.Random(seed)
        self.rounds = [rng.sample("0123456789", 2) for _ in range(2)]
        return self._asked()

    def _asked(self) -> str:
        return "{}{}?".format(*self.rounds[0])

    @property
    def possible(self) -> list[str]:
        """What lessons.py may answer."""
        return self.rounds[0]

    def step(self, action: Action) -> Step:
        right = action.text == max(self.rounds.pop(0))
        return Step(self._asked() if self.rounds else "", right / 2, not self.rounds)
