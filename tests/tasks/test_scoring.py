"""Reward functions: their two shapes, what they are given, and what they may return."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.core.errors import ConfigError, DataError, RolloutTimeoutError
from gspo.tasks import scoring
from gspo.tasks.scoring import grade, load_rewards
from gspo.tasks.task import Problem

ROW = {"prompt": "312", "answer": "123", "level": 2}


def graded(*functions: Any, prompt: Any = "312", said: Any = ("123", ""), weights: Any = None):
    rewards = load_rewards(functions, weights)
    return asyncio.run(grade(rewards, Problem("", "", ROW, "data.jsonl, row 7"), prompt, said))


def exact(completions, answer, **columns):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def short(completion, row):
    return -len(completion) / row["level"]


async def late(completion, row):
    await asyncio.sleep(0.01 if completion else 0)
    return short(completion, row)


def test_both_shapes_are_added_up_by_their_weights():
    for second in (short, late):
        first, last = graded(exact, second, weights=[2.0, 0.5])
        name = second.__name__
        assert first == (2.0 - 0.75, {"exact": 1.0, name: -1.5})
        assert last == (0.0, {"exact": 0.0, name: 0.0})
    assert graded("math:copysign", said=()) == []


def test_what_trls_shape_is_given():
    seen: list[dict[str, Any]] = []

    def all_of_it(completions, **columns):
        seen.append({"completions": completions, **columns})
        return [0, 1]

    async def some(prompts, completions, level, log_extra=None):
        seen.append({"completions": completions, "prompts": prompts, "level": level})
        assert log_extra is None
        return [0, 1]

    graded(all_of_it, some)
    columns = {"prompt": ["312"] * 2, "answer": ["123"] * 2, "level": [2, 2]}
    assert seen[0] == {"completions": ["123", ""], "prompts": ["312"] * 2, **columns}
    assert seen[1] == {"completions": ["123", ""], "prompts": ["312"] * 2, "level": [2, 2]}
    messages = [{"role": "user", "content": "312"}]
    graded(all_of_it, prompt=messages)  # as in TRL: a list of one message each
    assert seen[2]["completions"] == [[{"role": "assistant", "content": t}] for t in ("123", "")]
    assert seen[2]["prompts"] == [messages] * 2


def test_a_function_cannot_change_the_row():
    def changes(completion, row):
        row["answer"] = "9"
        return 0

    graded(changes, exact)
    assert ROW["answer"] == "123"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_numbers_of_any_library_count(values: list[float]):
    for made in (
        values,
        tuple(values),
        np.array(values),
        torch.tensor(values, dtype=torch.float64),
    ):
        said = ["x"] * len(values)
        assert [r for r, _ in graded(lambda completions, made=made: made, said=said)] == values
    assert graded(lambda c, row: np.float32(0.5), said=["x"])[0][0] == 0.5
    assert graded(lambda c, row: True, said=["x"])[0][0] == 1.0


BAD: list[tuple[Any, str]] = [
    (lambda completions: 1.0, r"of data.jsonl, row 7: 1.0 \(float\) for 2 completions"),
    (lambda completions: [1.0], r"\[1.0\] \(list\) for 2 completions: return a list of 2 numbers"),
    (lambda completions: None, "None .*return a list of 2 numbers"),
    (lambda completions: "ab", "'ab'"),
    (lambda completions: [1.0, None], r"row 7, completion 1 is None \(NoneType\); return a finite"),
    (lambda completions: [math.nan, 0], r"completion 0 is nan \(float\)"),
    (lambda completions: [0, math.inf], r"completion 1 is inf"),
    (lambda completions: [0, 10**400], "completion 1"),
    (lambda completions: ["1", 0], r"completion 0 is '1' \(str\)"),
    (lambda completions: [[1], [2]], r"completion 0 is \[1\]"),
    (lambda completion, row: None if completion else 0, r"completion 0 is None"),
    (lambda completion, row: "0.5", r"completion 0 is '0.5' \(str\)"),
    (lambda completions: (1 for _ in completions), "generator"),
]


@pytest.mark.parametrize(("function", "told"), BAD)
def test_what_is_no_reward(function: Callable[..., Any], told: str):
    with pytest.raises(DataError, match="the reward '<lambda>' (.|\n)*" + told):
        graded(function)


def test_an_error_of_the_function_names_reward_and_row():
    with pytest.raises(KeyError, match="answr") as caught:
        graded(lambda completion, row: row["answr"])
    assert caught.value.__notes__ == ["in the reward '<lambda>' of data.jsonl, row 7"]


def test_a_function_that_never_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "LIMIT_SECONDS", 0.05)

    async def hangs(completions):
        await asyncio.Event().wait()

    async def refuses(completions):
        raise TimeoutError("its own")

    with pytest.raises(RolloutTimeoutError, match=r"the reward 'hangs' of data\.jsonl, row 7 took"):
        graded(hangs)
    with pytest.raises(TimeoutError, match="its own"):
        graded(refuses)


class Judge:
    def __call__(self, completion, row):
        return 1


@pytest.mark.parametrize(
    ("given", "weights", "told"),
    [
        ([exact, exact], None, "two rewards are called 'exact'"),
        ([exact], [1, 2], "2 reward_weights for 1 rewards"),
        (["math:pi"], None, r"'math:pi'.*is not a callable.*write \(completion, row\)"),
        (["math:nothing"], None, "math has no 'nothing'"),
        (["no_such_rewards:f"], None, "reward = 'no_such_rewards:f': cannot import"),
        ([lambda completion: 1], None, r"too many positional arguments: write \(completion, row\)"),
        ([lambda completion, **columns: 1], None, "too many positional arguments"),
    ],
)
def test_what_is_no_reward_function(given: Any, weights: Any, told: str):
    with pytest.raises(ConfigError, match=told):
        load_rewards(given, weights)


def test_objects_and_partial_functions_have_names():
    names = [r.name for r in load_rewards([Judge(), partial(short, row={"level": 1})][:1])]
    assert names == ["Judge"]


@pytest.mark.parametrize(
    ("function", "row", "told"),
    [
        (exact, {"prompt": "a"}, "row 7 has no column 'answer', which the reward 'exact' takes"),
        (exact, {"answer": "1", "completions": "b"}, "a column 'completions' hides"),
        (lambda completion, answer: 1, ROW, "second argument is the whole row, not the column"),
    ],
)
def test_columns_that_are_missing_or_hide_an_argument(function: Any, row: Any, told: str):
    (reward,) = load_rewards([function])
    with pytest.raises(DataError, match=told):
        reward.columns(row, "data.jsonl, row 7")
