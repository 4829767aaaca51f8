"""What a task is: problems by split and index, and a score for an answer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Problem:
    """A prompt for the user turn, the reference answer, and what the scorer needs besides."""

    prompt: str
    answer: str
    entry: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Problems with a verifiable reward. The splits never share a prompt.

    A task of your own derives from it, and has `max_tokens`, `draw` and `score`; the rest has
    defaults. `task = "module:Class"` in a run's file names it.

        class Parity(Task):
            max_tokens = 4

            def draw(self, key):
                return Problem(str(key % 10_000), "odd" if key % 2 else "even")

            def score(self, problem, completion):
                return float(completion.strip() == problem.answer)

    Attributes:
        name: as given to `load_task`.
        max_tokens: default limit of a completion, in tokens.
        system_prompt: None, or the system turn that goes before every prompt.
        options: what the constructor takes.
        ends: a right answer ends by itself; else it is cut at `max_tokens`.
    """

    name: str
    max_tokens: int
    system_prompt: ClassVar[str | None] = None
    options: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[bool] = True

    @abstractmethod
    def draw(self, key: int) -> Problem:
        """The problem of a random key: the same key gives the same problem."""

    @abstractmethod
    def score(self, problem: Problem, completion: str) -> float:
        """The reward of a completion's text, usually in [0, 1]."""

    def problem(self, split: Split, index: int, seed: int = 0) -> Problem:
        """Problem `index` of a split: a function of its arguments alone."""
        return drawn_in_split(self.draw, split, index, seed)

    def messages(self, problem: Problem) -> list[dict[str, Any]]:
        """The conversation that asks for a completion."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": problem.prompt}]


def drawn_in_split(
    draw: Callable[[int], Problem], split: Split, index: int, seed: int, tries: int = 1000
) -> Problem:
    """Draw until the prompt falls in `split`: a tenth of all prompts, by hash, is held out.

    The split is a property of the prompt itself, so that no prompt is ever in both, also where
    the space of problems is small.
    """
    for attempt in range(tries):
        text = f"{split}/{seed}/{index}/{attempt}"
        problem = draw(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))
        held_out = hashlib.sha256(problem.prompt.encode()).digest()[0] % 10 == 0
        if held_out == (split == "heldout"):
            return problem
    raise RuntimeError(f"no {split} problem in {tries} draws: the task has too few problems")
