"""The shapes of OpenAI's answers; of texts, a stream adds up to the answer without one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError

from gspo.serve.answers import chat_logprobs, text_logprobs, training_fields
from gspo.serve.engine import Completion
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import in_process_client
from support import app_of

DONE = Completion(
    token_ids=(97, 0x6F22),
    logprobs=(-1.0, -2.0),
    text="a漢",
    finish_reason="stop",
    policy_versions=(1, 2),
    temperature=0.5,
    top_logprobs=(((97, -1.0), (98, -1.5)), ((0x6F22, -2.0),)),
    altered_by=("top_p",),
)


def test_logprobs_of_a_chat():
    first, second = chat_logprobs(FakeEngine(), DONE)["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -1.0, [97])
    assert [entry["token"] for entry in first["top_logprobs"]] == ["a", "b"]
    assert bytes(second["bytes"]).decode() == "漢"


def test_logprobs_of_a_text():
    lists = text_logprobs(FakeEngine(), DONE, offset=7)
    assert (lists["tokens"], lists["text_offset"]) == (["a", "漢"], [7, 8])
    assert lists["top_logprobs"] == [{"a": -1.0, "b": -1.5}, {"漢": -2.0}]


def test_what_training_needs():
    assert training_fields(DONE) == {
        "temperature": 0.5,
        "policy_version": 1,
        "policy_versions": [1, 2],
        "altered_by": ["top_p"],
    }


LISTS = ("token_ids", "token_logprobs")


async def streamed(client: AsyncOpenAI, **options: Any) -> list[dict[str, Any]]:
    choices: dict[int, dict[str, Any]] = {}
    stream: Any = await client.completions.create(model="m", stream=True, **options)
    async for chunk in stream:
        for part in chunk.model_dump(exclude_unset=True)["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": None})
            choice["text"] += part.pop("text")
            for name in LISTS:
                choice[name] = choice.get(name, []) + part.pop(name)
            logprobs = part.pop("logprobs")
            for name, values in (logprobs or {}).items():
                whole = choice["logprobs"] = choice["logprobs"] or {}
                whole[name] = None if values is None else [*(whole.get(name) or []), *values]
            choice |= part
    return [choices[index] for index in sorted(choices)]


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {"n": st.integers(1, 3)},
        optional={
            "stop": st.sampled_from(["b漢", ["a", "漢\n"]]),
            "max_tokens": st.integers(1, 6),
            "logprobs": st.integers(0, 2),
        },
    ),
)
def test_a_stream_adds_up_to_the_answer(prompts: list[str], options: dict[str, Any]):
    async def both() -> tuple[Any, Any]:
        app = app_of(FakeEngine(lambda prompt, index: f"{prompt}漢\n{index}"))
        async with in_process_client(app) as client:
            asked = {"prompt": prompts, **options}
            plain: Any = await client.completions.create(model="m", **asked)
            whole = plain.model_dump(exclude_unset=True)["choices"]
            return whole, await streamed(client, **asked)

    whole, parts = asyncio.run(both())
    assert parts == whole


async def test_counts_and_bounds():
    async with in_process_client(app_of(FakeEngine())) as client:
        stream = await client.completions.create(
            model="m", prompt="a", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens == 1
        with pytest.raises(BadRequestError, match="more than 4096 completions"):
            await client.completions.create(model="m", prompt=["a"] * 50, n=100)
