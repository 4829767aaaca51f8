"""A dataset as a task: what is held out, the order of the rows, and rows that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.core.errors import ConfigError, DataError
from gspo.core.rows import read_rows
from gspo.tasks.dataset import Data, DatasetTask, load_dataset

USER = {"role": "user", "content": "hi"}


def dataset(rows: Any, rewards: Any = (), **options: Any) -> DatasetTask:
    return load_dataset(rows, rewards, None, Data(**options))


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}", "answer": n} for n in range(count)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_no_prompt_is_in_both_splits_and_no_row_is_lost(numbers: list[int], share: float):
    if len(set(numbers)) < 2:
        return
    task = dataset([{"prompt": f"{n}"} for n in numbers], heldout=share)
    train, held = ([p.prompt for p in task.problems[s]] for s in ("train", "heldout"))
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(f"{n}" for n in numbers)
    assert train and held
    size = max(1, min(len(set(numbers)) - 1, round(share * len(set(numbers)))))
    assert len(set(held)) == size


def test_what_is_held_out_depends_on_the_prompts_alone():
    rows = numbered(50)
    held = {p.prompt for p in dataset(rows).problems["heldout"]}
    assert held == {p.prompt for p in dataset(rows[::-1]).problems["heldout"]}
    assert len(held) == 5


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.integers(0, 5))
def test_each_epoch_has_each_row_once_in_an_order_of_its_own(count: int, seed: int):
    task = dataset(numbered(count), heldout=0.0)
    epochs = [
        [task.problem("train", e * count + i, seed).prompt for i in range(count)] for e in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == sorted(p.prompt for p in task.problems["train"])
    if count > 10:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert [task.problem("train", i, seed + 1).prompt for i in range(count)] != epochs[0]
    plain = dataset(numbered(count), heldout=0.0, shuffle=False)
    assert [plain.problem("train", i).prompt for i in range(count, 2 * count)] == [
        f"{n}" for n in range(count)
    ]


def test_prompts_messages_and_the_system_turn():
    rows = [{"prompt": "hi", "answer": 5, "x": 1}, {"prompt": [USER]}, {"messages": [USER, USER]}]
    task = dataset(rows, heldout=0.0, system_prompt="Be brief.", shuffle=False)
    system = {"role": "system", "content": "Be brief."}
    asked = [task.messages(task.problem("train", n)) for n in range(3)]
    assert asked == [[system, USER], [system, USER], [system, USER, USER]]
    first = task.problem("train", 0)
    assert (first.prompt, first.answer, first.where) == ("hi", "5", "dataset[0]")
    assert first.entry == rows[0]


def test_the_digest_is_of_the_rows_their_order_and_their_split():
    rows = numbered(20)
    digest = dataset(rows).digest
    assert digest == dataset([dict(row) for row in rows]).digest
    assert digest != dataset([*rows[1:], rows[0]]).digest
    assert digest != dataset([*rows[:-1], rows[-1] | {"answer": "x"}]).digest
    assert digest != dataset(rows, heldout=0.2).digest


def test_held_out_rows_of_a_file(tmp_path: Path):
    (tmp_path / "test.csv").write_text("prompt,answer\n90,1\n91,2\n")
    task = dataset(numbered(5), heldout=str(tmp_path / "test.csv"))
    assert task.sizes == {"train": 5, "heldout": 2}
    (tmp_path / "test.csv").write_text("prompt,answer\n90,1\n4,2\n")
    told = r"test\.csv, row 2 has the prompt of dataset\[4\]: what is trained on cannot be held out"
    with pytest.raises(DataError, match=told):
        dataset(numbered(5), heldout=str(tmp_path / "test.csv"))
    with pytest.raises(ConfigError, match=r"data\.heldout = 'test': there is no file /"):
        dataset(numbered(5), heldout="test")


def exact(completions, answer):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a"}, r'no value in a column "prompt" or "messages"; it has: question'),
        ({"prompt": None, "answer": 1}, r"dataset\[2\] has no value in a column"),
        ({"prompt": "a", "messages": [USER]}, r"dataset\[2\] has both columns"),
        ({"prompt": 5}, r"dataset\[2\]: prompt is 5 \(int\)"),
        ({"messages": "hi"}, r"dataset\[2\]: messages is 'hi'"),
        ({"messages": [], "answer": 1}, r"dataset\[2\]: its messages must end with what is asked"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "must end with what is ask"),
        ({"messages": [USER, "x"]}, r"dataset\[2\], message 1 is 'x'"),
        ({"messages": [{"content": "x"}]}, r"dataset\[2\], message 0 .* needs a role"),
        ({"messages": [{"role": "user"}]}, r"message 0: content is None .*; give a text"),
        ({"prompt": "a"}, r"dataset\[2\] has no column 'answer', which the reward 'exact' takes"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], told: str):
    with pytest.raises(DataError, match=told):
        dataset([*numbered(2), row], [exact])


def test_splits_that_are_empty():
    with pytest.raises(ConfigError, match="not two different prompts"):
        dataset([{"prompt": "a"}, {"prompt": "a"}])
    whole = dataset([{"prompt": "a"}], heldout=0.0)
    assert whole.sizes == {"train": 1, "heldout": 0}
    with pytest.raises(DataError, match="no row of 1 rows in memory is held out"):
        whole.problem("heldout", 0)
    with pytest.raises(DataError, match=r"dataset\[0\] has a system turn of its own"):
        dataset([{"messages": [{"role": "system", "content": "x"}, USER]}], system_prompt="y")
    with pytest.raises(DataError, match="has no row to train on"):
        DatasetTask("x", {}, read_rows(numbered(2)), [], Data())


@pytest.mark.parametrize("heldout", [1.0, -0.1, 2])
def test_a_share_that_is_none(heldout: Any):
    with pytest.raises(ConfigError, match="a share from 0 to below 1"):
        Data(heldout=heldout)
