"""/v1/responses by openai's own client and types: text, tools, streams; and OpenAI's Agents SDK."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import in_process_client
from gspo.serve.verbatim import chat_tokens
from support import app_of

ADD: Any = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
    "strict": True,
}


def adds(prompt: str, index: int) -> str:
    """Calls `add` once, and tells its result."""
    if "<tool>" in prompt:
        return "It is " + prompt.rpartition("<tool>")[2].partition("\n")[0] + "."
    return 'Sure.<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


@pytest.fixture
async def client():
    async with in_process_client(app_of(FakeEngine(adds))) as client:
        yield client


async def test_a_text(client: AsyncOpenAI):
    answer: Any = await client.responses.create(model="m", input="hi", instructions="Be brief.")
    assert answer.output_text.startswith("Sure.<tool_call>")  # no tool was offered: it is text
    assert (answer.status, answer.usage.output_tokens) == ("completed", len(answer.token_ids))
    engine = FakeEngine()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert answer.prompt_token_ids == chat_tokens(engine, messages)
    assert len(answer.token_logprobs) == len(answer.token_ids)
    short = await client.responses.create(model="m", input="hi", max_output_tokens=3)
    assert (short.status, short.output_text) == ("incomplete", "Sur")
    assert short.incomplete_details and short.incomplete_details.reason == "max_output_tokens"


async def test_a_call_and_its_output_are_one_conversation(client: AsyncOpenAI):
    asked: list[Any] = [{"role": "user", "content": "2 + 3?"}]
    first: Any = await client.responses.create(model="m", input=asked, tools=[ADD])
    text, call = first.output
    assert text.content[0].text == "Sure."
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 2, "b": 3})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    asked += [*(item.model_dump() for item in first.output), output]
    second: Any = await client.responses.create(model="m", input=asked, tools=[ADD])
    assert second.output_text == "It is 5."
    told = "".join(map(chr, second.prompt_token_ids))
    assert told.count("<assistant>") == 2  # text and call are one turn


async def test_the_events_of_a_stream_add_up_to_the_answer(client: AsyncOpenAI):
    stream = await client.responses.create(
        model="m",
        input="2 + 3?",
        tools=[ADD],
        stream=True,
        include=["message.output_text.logprobs"],
    )
    events: list[Any] = [event async for event in stream]
    check = TypeAdapter(ResponseStreamEvent)
    for event in events:
        check.validate_python(event.model_dump(exclude_unset=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-1] == "completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Sure."
    whole = events[-1].response
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in whole.output] == [item.id for item in done]
    assert [item.type for item in done] == ["message", "function_call"]
    plain = await client.responses.create(model="m", input="2 + 3?", tools=[ADD])
    assert plain.output_text == whole.output_text
    assert plain.output[1].arguments == done[1].arguments  # pyright: ignore[reportAttributeAccessIssue]


class Sum(BaseModel):
    total: int


async def test_the_parse_helper():
    engine = FakeEngine(lambda prompt, index: '{"total": 5}')
    async with in_process_client(app_of(engine)) as client:
        answer = await client.responses.parse(model="m", input="2 + 3?", text_format=Sum)
    assert answer.output_parsed == Sum(total=5)
    assert json.loads(engine.requests[0].params.grammar)["properties"]["total"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"previous_response_id": "x"}, "previous_response_id is not supported"),
        ({"store": True}, "store is not supported"),
        ({"n": 2}, "n = 2: a response is one completion"),
        ({"tools": [{"type": "web_search"}]}, "only functions are supported, not 'web_search'"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text"),
        ({"text": {"format": "json"}}, "response_format"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"include": ["file_search_call.results"]}, "include"),
    ],
)
async def test_what_is_refused_by_name(client: AsyncOpenAI, extra: dict, message: str):
    with pytest.raises(BadRequestError) as refused:
        await client.responses.create(model="m", input="x", extra_body=extra)
    assert message in str(refused.value)


async def test_openais_agents_run_unchanged():
    agents = pytest.importorskip("agents")

    @agents.function_tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    agents.set_tracing_disabled(True)
    async with in_process_client(app_of(FakeEngine(adds))) as client:
        model = agents.OpenAIResponsesModel(model="m", openai_client=client)
        agent = agents.Agent(name="a", instructions="Add.", tools=[add], model=model)
        result = await agents.Runner.run(agent, "2 + 3?")
        assert result.final_output == "It is 5."
        streamed = agents.Runner.run_streamed(agent, "2 + 3?")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == "It is 5."
