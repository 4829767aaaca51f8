"""Chats: a stream adds up to the answer without one; calls of tools, by openai's own client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel

from gspo.serve.fake_engine import END, FakeEngine
from gspo.serve.local_client import in_process_client
from gspo.serve.torch_engine import TorchEngine
from support import app_of, embedded

ASK: Any = [{"role": "user", "content": "add"}]
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a choice's deltas."""
    text = "".join(delta.get("content", "") for delta in deltas)
    calls = [dict(call) for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    content = text or (None if calls else "")
    message = {"role": deltas[0]["role"], "content": content, "refusal": None}
    return message | ({"tool_calls": calls} if calls else {})


async def streamed(client: AsyncOpenAI, **options: Any) -> list[dict[str, Any]]:
    """The choices that the chunks of a stream add up to."""
    choices: dict[int, dict[str, Any]] = {}
    deltas: dict[int, list[dict[str, Any]]] = {}
    stream: Any = await client.chat.completions.create(model="m", stream=True, **options)
    async for chunk in stream:
        for part in chunk.model_dump(exclude_unset=True)["choices"]:
            index = part["index"]
            if index not in choices:
                assert part["delta"] == {"role": "assistant", "content": ""}
                empty = {"token_ids": [], "token_logprobs": [], "logprobs": None}
                choices[index] = {"index": index, **empty}
            choice = choices[index]
            deltas.setdefault(index, []).append(part.pop("delta"))
            for name in ("token_ids", "token_logprobs"):
                choice[name] += part.pop(name, [])
            entries = (part.pop("logprobs") or {}).get("content")
            if entries is not None:
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"] += entries
            assert choice.get("finish_reason") is None, "nothing comes after the end"
            choice |= part
    for index, choice in choices.items():
        choice["message"] = joined(deltas[index])
    return [choices[index] for index in sorted(choices)]


TEXT = st.text(st.sampled_from("ab<\n é漢"), max_size=12)
CALLS = st.sampled_from([CALL, "<tool_call>{}</tool_call>", "<think>x</think>", "<tool_"])
REPLIES = st.lists(st.one_of(TEXT, CALLS), max_size=4).map("".join)


@settings(max_examples=30, deadline=None)
@given(
    replies=st.lists(REPLIES, min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {},
        optional={
            "stop": st.lists(st.sampled_from(["a", "<t", "é漢", " \n"]), min_size=1, max_size=2),
            "max_tokens": st.integers(1, 9),
            "tools": st.just([ADD]),
            "logprobs": st.just(True),
            "tool_choice": st.just("none"),
        },
    ),
)
def test_a_stream_adds_up_to_the_answer(replies: list[str], options: dict[str, Any]):
    async def both() -> tuple[Any, Any]:
        app = app_of(FakeEngine(lambda prompt, index: replies[index]))
        async with in_process_client(app) as client:
            asked = {"messages": ASK, "n": len(replies), **options}
            plain: Any = await client.chat.completions.create(model="m", **asked)
            whole = plain.model_dump(exclude_unset=True)["choices"]
            return whole, await streamed(client, **asked)

    whole, parts = asyncio.run(both())
    assert parts == whole


async def test_a_stream_begins_with_the_role_and_ends_with_the_counts():
    app = app_of(FakeEngine(lambda prompt, index: "hi"))
    async with in_process_client(app) as client:
        stream = await client.chat.completions.create(
            model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks: list[Any] = [chunk async for chunk in stream]
    first, *middle, last, counts = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].prompt_token_ids
    assert [chunk.choices[0].token_ids for chunk in middle] == [[104], [105], [END]]
    assert (last.choices[0].finish_reason, last.choices[0].policy_version) == ("stop", 0)
    assert counts.choices == [] and counts.usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_calls_come_as_openais_client_reads_them():
    engine = FakeEngine(lambda prompt, index: "Well." + CALL + CALL.replace("2", "3"))
    async with in_process_client(app_of(engine)) as client:
        answer = await client.chat.completions.create(model="m", messages=ASK, tools=[ADD])
        choice: Any = answer.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Well."
        calls = choice.message.tool_calls
        assert [json.loads(call.function.arguments) for call in calls] == [{"a": 2}, {"a": 3}]
        assert engine.tokenizer.decode(choice.token_ids) == "Well." + CALL + CALL.replace("2", "3")
        async with client.chat.completions.stream(model="m", messages=ASK, tools=[ADD]) as stream:
            async for _ in stream:
                pass
            final = (await stream.get_final_completion()).choices[0]
        again: Any = final.message.tool_calls
        assert [call.function.arguments for call in again] == ['{"a": 2}', '{"a": 3}']
        assert [call.id for call in again] == [call.id for call in calls]


async def test_grammars_of_calls_and_schemas_reach_the_engine():
    engine = FakeEngine(lambda prompt, index: CALL)
    async with in_process_client(app_of(engine)) as client:

        async def grammar(**options: Any) -> str:
            await client.chat.completions.create(model="m", messages=ASK, **options)
            return engine.requests[-1].params.grammar

        assert await grammar(tools=[ADD]) == ""
        assert '"const": "add"' in await grammar(tools=[ADD], tool_choice="required")
        named: Any = {"type": "function", "function": {"name": "add"}}
        assert "start: thought? calls" in await grammar(tools=[ADD], tool_choice=named)
        assert await grammar(response_format={"type": "json_object"}) == '{"type": "object"}'
        assert "before" in await grammar(tools=[ADD], parallel_tool_calls=False)


class Sum(BaseModel):
    total: int


async def test_the_parse_helper():
    app = app_of(FakeEngine(lambda prompt, index: '{"total": 5}'))
    async with in_process_client(app) as client:
        answer = await client.chat.completions.parse(model="m", messages=ASK, response_format=Sum)
    assert answer.choices[0].message.parsed == Sum(total=5)


async def test_choices_without_token_ids_if_nobody_wants_them():
    async with in_process_client(app_of(FakeEngine())) as client:
        extra = {"return_token_ids": False}
        answer = await client.chat.completions.create(model="m", messages=ASK, extra_body=extra)
        assert not hasattr(answer.choices[0], "token_ids")
        (part,) = await streamed(client, messages=ASK, extra_body=extra)
        assert part["token_ids"] == [] and "prompt_token_ids" not in part


async def test_what_alters_the_distribution_is_told():
    async with in_process_client(app_of(FakeEngine())) as client:
        answer: Any = await client.chat.completions.create(
            model="m", messages=ASK, logprobs=True, top_logprobs=1, extra_body={"top_k": 3}
        )
        choice = answer.choices[0]
        assert choice.altered_by == ["top_k"]
        assert all(len(entry.top_logprobs) == 1 for entry in choice.logprobs.content)
        (part,) = await streamed(client, messages=ASK, extra_body={"top_k": 3})
        assert part["altered_by"] == ["top_k"]


@pytest.mark.parametrize("streams", [False, True])
async def test_special_tokens_and_tools_dont_mix(streams: bool):
    async with in_process_client(app_of(FakeEngine())) as client:
        with pytest.raises(BadRequestError, match="calls of tools are read from the special"):
            await client.chat.completions.create(
                model="m",
                messages=ASK,
                tools=[ADD],
                stream=streams,
                extra_body={"skip_special_tokens": False},
            )


async def test_a_stream_of_the_embedded_engine_is_its_answer():
    engine = TorchEngine(embedded())
    digit: Any = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    add: Any = {"type": "function", "function": {"name": "add", "parameters": digit}}
    asked: dict[str, Any] = {"messages": ASK, "tools": [add], "logprobs": True, "seed": 3}
    asked["logit_bias"] = {str(engine.tokenizer.encode("h")[0]): -100}  # it must call, not <think>
    async with in_process_client(app_of(engine)) as client:
        for choice in ("none", "required"):
            asked |= {"tool_choice": choice, "max_tokens": 8 if choice == "none" else 90}
            plain: Any = await client.chat.completions.create(model="m", **asked)
            whole = plain.model_dump(exclude_unset=True)["choices"]
            assert await streamed(client, **asked) == whole
            assert ("tool_calls" in whole[0]["message"]) == (choice == "required")
        items: Any = {"input": "918273", "include": ["message.output_text.logprobs"]}
        items |= {"max_output_tokens": 8, "extra_body": {"seed": 5}}
        answer: Any = await client.responses.create(model="m", **items)
        events: Any = await client.responses.create(model="m", stream=True, **items)
        last = [event async for event in events][-1].response
    engine.close()
    for one, other in zip(answer.output, last.output, strict=True):
        assert one.content == other.content and one.content[0].logprobs
    assert (answer.token_ids, answer.usage) == (last.token_ids, last.usage)
