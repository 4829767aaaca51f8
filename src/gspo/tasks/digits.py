"""The built-in tasks: small enough for the embedded model, hard enough to need learning."""

from __future__ import annotations

import random
from collections.abc import Mapping

from gspo.tasks.task import Problem, Task


class Sort(Task):
    """Sort 12 digits.

    >>> Sort().draw(1).prompt, Sort().draw(1).answer
    ('291417776317', '111234677779')
    """

    name = "sort"
    max_tokens = 16
    digits = 12

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        prompt = "".join(rng.choice("0123456789") for _ in range(self.digits))
        return Problem(prompt, "".join(sorted(prompt)))

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)


class Reverse(Task):
    """Reverse 12 letters."""

    name = "reverse"
    max_tokens = 16
    letters = 12

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        prompt = "".join(rng.choice("abcdefghij") for _ in range(self.letters))
        return Problem(prompt, prompt[::-1])

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)


class Add(Task):
    """Add two numbers of 6 digits on a scratchpad, column by column from the right.

    A column is `a+b+carry=sum`; the result follows `;`. The reward looks at the result alone.

    >>> Add.scratchpad(47, 38, width=2)
    '7+8+0=15,4+3+1=08;85'
    """

    name = "add"
    max_tokens = 80
    width = 6

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        a, b = (rng.randrange(10 ** (self.width - 1), 10**self.width) for _ in range(2))
        return Problem(f"{a}+{b}", self.scratchpad(a, b, self.width))

    @staticmethod
    def scratchpad(a: int, b: int, width: int) -> str:
        """The worked solution."""
        carry, columns = 0, []
        for column in range(width):
            left, right = a // 10**column % 10, b // 10**column % 10
            total = left + right + carry
            columns.append(f"{left}+{right}+{carry}={total:02d}")
            carry = total // 10
        return f"{','.join(columns)};{a + b}"

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion.rpartition(";")[2] == problem.answer.rpartition(";")[2])


DIGIT_TASKS: Mapping[str, type[Task]] = {task.name: task for task in (Add, Reverse, Sort)}
