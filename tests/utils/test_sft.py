"""SFT from a file: what it learns, what it refuses, and what it leaves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import gspo as art
from gspo.core.errors import ConfigError, DataError
from gspo.utils.sft import read_trajectories, train_sft_from_file


def lesson(number: int) -> dict[str, Any]:
    """A question that the sorting model doesn't answer: which digit is the largest?"""
    digits = str(number * 7919 % 9973).zfill(4)
    answer = {"role": "assistant", "content": max(digits)}
    return {"messages": [{"role": "user", "content": digits}, answer]}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


async def right(model: art.TrainableModel) -> float:
    """The share of right answers to questions that are not in the file."""

    async def one(number: int) -> bool:
        asked, told = lesson(number)["messages"]
        answer = await model.openai_client().chat.completions.create(
            model=model.name, messages=[asked], max_tokens=3, temperature=0
        )
        return answer.choices[0].message.content == told["content"]

    found = await asyncio.gather(*(one(1000 + i) for i in range(16)))
    return sum(found) / len(found)


async def test_it_learns_is_one_step_and_goes_on(tmp_path: Path):
    data = written(tmp_path / "data.jsonl", [lesson(i) for i in range(128)])
    async with art.LocalBackend(tmp_path) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
        await model.register(backend)
        result = await train_sft_from_file(model, data, epochs=2, batch_size=16, peak_lr=3e-3)
        assert await right(model) > 0.5
        assert result.metrics["sft/loss_last"] < 0.5 * result.metrics["sft/loss_first"]
        assert result.metrics["sft/tokens"] == 2 * 2 * 128
        assert result.metrics["publish/probe_max_diff"] == 0
        assert (result.step, await model.get_step()) == (1, 1)
        assert result.checkpoint_path == backend.run(model).checkpoints / "0001"
        assert backend.run(model).line(1)["sft/batches"] == 16
        weights = backend.policy(model).lm.state_dict()
    async with art.LocalBackend(tmp_path) as backend:
        await model.register(backend)
        assert await model.get_step() == 1
        loaded = backend.policy(model).lm.state_dict()
        assert all((loaded[name] == value).all() for name, value in weights.items())


async def test_what_is_refused_changes_nothing(tmp_path: Path):
    rows = [lesson(0), {"messages": lesson(1)["messages"][:1]}]
    data = written(tmp_path / "data.jsonl", rows)
    asked, answer = {"role": "user", "content": "1" * 9}, lesson(0)["messages"][1]
    long = written(
        tmp_path / "long.jsonl",
        [lesson(0), {"messages": [asked, answer]}],
    )
    async with art.LocalBackend(tmp_path) as backend:
        load = art.dev.InternalModelConfig(max_context=12)
        model = art.TrainableModel(
            name="m", project="p", base_model="embedded:sort", _internal_config=load
        )
        await model.register(backend)
        with pytest.raises(DataError, match=r"data\.jsonl, row 2 has no assistant turn"):
            await train_sft_from_file(model, data)
        with pytest.raises(DataError, match=r"long\.jsonl, row 2 has 13 tokens.*context is 12"):
            await train_sft_from_file(model, long)
        with pytest.raises(ConfigError, match=r"config is 5 .*; give a TrainSFTConfig"):
            await model.train_sft([], 5)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match="unknown option 'batch'"):
            await backend.train_sft(model, [], {"batch": 1})  # pyright: ignore[reportArgumentType]
        with pytest.raises(DataError, match="got no trajectories"):
            await model.train_sft(iter(()))
        with pytest.raises(ConfigError, match=r"initial_step.*one step"):
            await train_sft_from_file(model, data, initial_step=3)  # pyright: ignore[reportCallIssue]
        assert await model.get_step() == 0
        assert not backend.run(model).metrics()


async def test_a_backend_without_it_says_so():
    model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
    async with art.FakeBackend() as backend:
        await model.register(backend)
        with pytest.raises(ConfigError, match="FakeBackend has no train_sft: use LocalBackend"):
            await model.train_sft([])


def test_reading(tmp_path: Path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = lesson(0) | {"tools": tools, "id": 5}
    (tmp_path / "x.jsonl").write_text(f"\n{json.dumps(row)}\n\n{json.dumps(lesson(1))}\n")
    first, second = read_trajectories(tmp_path / "x.jsonl")
    assert first.messages() == row["messages"] and first.tools == tools
    assert second.tools is None
    assert second.metadata == {"row": f"{tmp_path / 'x.jsonl'}, row 4"}


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "x.jsonl is empty"),
        (" \n\n", "x.jsonl is empty"),
        ('{"messages": []}', "row 1 has no assistant turn"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "row 1 has no assistant turn"),
        ('{"messages": [{"content": "hi"}]}', "row 1, message 0 is .* it needs a role"),
        (json.dumps(lesson(0)) + "\n{", "x.jsonl, row 2 is not JSON"),
        ('{"prompt": 1, "answer": 2}', 'row 1 has no column "messages"; it has: prompt, answer'),
        ("[1]", r"row 1 is \[1\] \(list\); give an object"),
        ('{"messages": "hi"}', "row 1: messages are 'hi' .*; give a list"),
        ('{"messages": [5]}', "row 1, message 0 is 5"),
        (json.dumps(lesson(0) | {"tools": 5}), "row 1: Trajectory: tools"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, told: str):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=told):
        read_trajectories(tmp_path / "x.jsonl")


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(DataError, match=r"there is no file .*no.jsonl"):
        read_trajectories(tmp_path / "no.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="is not text in UTF-8"):
        read_trajectories(tmp_path / "x.jsonl")
