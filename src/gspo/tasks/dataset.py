"""A dataset of the user's own as a task: its rows are the problems, its rewards the score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from os.path import expanduser
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from gspo.core.draws import seed_of
from gspo.core.errors import ConfigError, DataError, shown
from gspo.core.options import LARGEST_COUNT, Options
from gspo.core.rows import Rows, check_messages, read_rows
from gspo.tasks.scoring import Reward, grade, load_rewards
from gspo.tasks.task import Problem, Split, Task


class Data(Options, title="[data]"):
    """How the rows of a dataset are used."""

    heldout: float | str = 0.1
    """The share of the distinct prompts that is held out; or a file of such rows; or, of what the
    `datasets` library loads, another split."""
    epochs: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Passes over the rows, in place of `steps`."""
    shuffle: bool = True
    """Another order each epoch, by the run's seed. False: the order of the rows."""
    system_prompt: str | None = None
    """The system turn before each prompt."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, such as Qwen3's `enable_thinking`."""
    split: str = "train"
    """Of what the `datasets` library loads."""
    subset: str | None = None

    @field_validator("heldout")
    @classmethod
    def _is_a_share_or_rows(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("a share from 0 to below 1, or the rows: a file, or a split's name")
        return value


class DatasetTask(Task):
    """The rows as problems: a prompt or messages, perhaps an answer, and what else they have.

    Args:
        name: of the dataset, for people.
        rows: all of them, by where they stand.
        heldout: the share that is held out, or the rows that are.
        rewards: score the completions; none for a rollout of the user's own.
        data: the other options.

    Attributes:
        digest: of all rows in their order and split, SHA-256.

    Raises:
        DataError: a row without a prompt or a column that a reward takes; a prompt in both splits;
            or no row to train on.
    """

    max_tokens = 256

    def __init__(
        self, name: str, rows: Rows, heldout: float | Rows, rewards: Sequence[Reward], data: Data
    ):
        self.name, self.rewards, self.shuffle = name, rewards, data.shuffle
        self.system_prompt = data.system_prompt
        self.template_kwargs = data.chat_template_kwargs or None
        problems = [self._problem(where, row) for where, row in rows.items()]
        if isinstance(heldout, float | int):
            held = _held_out({p.prompt for p in problems}, heldout)
            kept = [p for p in problems if p.prompt in held]
        else:
            kept, held = [self._problem(where, row) for where, row in heldout.items()], set[str]()
            trained = {p.prompt: p.where for p in problems}
            if both := [p for p in kept if p.prompt in trained]:
                raise DataError(
                    f"{both[0].where} has the prompt of {trained[both[0].prompt]}: what is trained "
                    "on cannot be held out, leave one of the two out"
                )
        self.problems: dict[Split, list[Problem]] = {
            "train": [p for p in problems if p.prompt not in held],
            "heldout": sorted(kept, key=lambda p: _digest(p.prompt)),
        }
        if not self.problems["train"]:
            raise DataError(f"{name} has no row to train on beside the held-out ones: give more")
        self.sizes = {split: len(problems) for split, problems in self.problems.items()}
        entries = [[dict(p.entry) for p in problems] for problems in self.problems.values()]
        self.digest = _digest(json.dumps(entries, sort_keys=True, default=str))

    def _problem(self, where: str, row: Mapping[str, Any]) -> Problem:
        asked = [name for name in ("prompt", "messages") if row.get(name) is not None]
        if len(asked) != 1:
            has = "both columns" if asked else "no value in a column"
            raise DataError(f'{where} has {has} "prompt" or "messages"; it has: {", ".join(row)}')
        prompt = row[asked[0]]
        if isinstance(prompt, list) and asked:
            text = json.dumps(_checked(where, prompt, self.system_prompt), sort_keys=True)
        elif isinstance(prompt, str) and asked == ["prompt"]:
            text = prompt
        else:
            raise DataError(f"{where}: {asked[0]} is {shown(prompt)}; give a text, or messages")
        for reward in self.rewards:
            reward.columns(row, where)
        answer = row.get("answer")
        return Problem(text, "" if answer is None else str(answer), row, where)

    def draw(self, key: int) -> Problem:
        return self.problem("train", key)

    def problem(self, split: Split, index: int, seed: int = 0) -> Problem:
        problems = self.problems[split]
        if not problems:
            raise DataError(f"no row of {self.name} is held out: give data.heldout")
        epoch, place = divmod(index, len(problems))
        if split == "train" and self.shuffle:
            place = _order(len(problems), seed, epoch)[place]
        return problems[place]

    def messages(self, problem: Problem) -> list[dict[str, Any]]:
        prompt, told = _asked(problem), super().messages(problem)
        return told if isinstance(prompt, str) else [*told[:-1], *prompt]

    async def grade(
        self, problem: Problem, completions: Sequence[str]
    ) -> list[tuple[float, dict[str, float]]]:
        prompt = _asked(problem)
        prompt = prompt if isinstance(prompt, str) else self.messages(problem)
        return await grade(self.rewards, problem, prompt, completions)


def load_dataset(
    source: Any, rewards: Sequence[Any], weights: Sequence[float] | None, data: Data
) -> DatasetTask:
    """The dataset of a run.

    Args:
        source: see `read_rows`.
        rewards, weights: see `load_rewards`.
        data: the other options.

    Raises:
        GspoError: see `read_rows`, `load_rewards` and `DatasetTask`.
    """
    functions = load_rewards(rewards, weights)
    rows, heldout = read_rows(source, data.split, data.subset), data.heldout
    if isinstance(heldout, str):
        path = Path(expanduser(heldout))
        if not path.is_file() and (not isinstance(source, str | Path) or Path(source).is_file()):
            raise ConfigError(f"data.heldout = {heldout!r}: there is no file {path.absolute()}")
        heldout = read_rows(path) if path.is_file() else read_rows(source, heldout, data.subset)
    name = str(source) if isinstance(source, str | Path) else f"{len(rows)} rows in memory"
    return DatasetTask(name, rows, heldout, functions, data)


def _asked(problem: Problem) -> Any:
    row = problem.entry
    return row["prompt"] if row.get("prompt") is not None else row["messages"]


def _checked(where: str, messages: list[Any], system_prompt: str | None) -> list[dict[str, Any]]:
    check_messages(messages, where)
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: its messages must end with what is asked; give what the assistant should "
            'say as "answer"'
        )
    if system_prompt and messages[0]["role"] == "system":
        raise DataError(f"{where} has a system turn of its own: leave data.system_prompt out")
    return messages


def _held_out(prompts: set[str], share: float) -> set[str]:
    """By a hash of the prompt: whatever the order of the rows, and equal ones stay together."""
    if share and len(prompts) < 2:
        raise ConfigError(
            f"data.heldout = {share}, but there are not two different prompts: give more rows, or "
            "data.heldout = 0 and eval_prompts = 0"
        )
    size = max(1, min(len(prompts) - 1, round(share * len(prompts)))) if share else 0
    return set(sorted(prompts, key=_digest)[:size])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in an epoch."""
    return sorted(range(count), key=lambda row: seed_of(seed, "dataset", epoch, row))
