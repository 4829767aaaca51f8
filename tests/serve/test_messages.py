"""Messages, tools and calls that a request may bring, and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from gspo.core.errors import RequestError
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.messages import (
    check_whole_characters,
    text_messages,
    texts_in,
    tools_of,
    with_objects,
)
from gspo.serve.verbatim import chat_tokens

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
HI = {"role": "user", "content": "hi"}


def test_messages_with_their_text_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Any] = [{"role": "user", "content": parts}, {"role": "assistant", "x": 1}]
    assert text_messages(messages) == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "x": 1, "content": ""},
    ]
    with pytest.raises(RequestError, match=r"messages\[0\] has no role"):
        text_messages([{"content": "a"}])


def test_half_a_character_is_refused():
    check_whole_characters(["\U0001f600", "a"])
    with pytest.raises(RequestError, match="half a surrogate pair"):
        check_whole_characters(["a", "\ud83d"])


def test_every_text_however_deep():
    deep: Any = "x"
    for _ in range(50_000):
        deep = [deep]
    assert texts_in({"a": [deep, {"b": "c"}]}) == ["a", "x", "b", "c"]


def test_arguments_are_objects_if_their_text_is_one():
    def arguments(text: str | None) -> Any:
        call = {"function": {"name": "add", "arguments": text}}
        (found,) = with_objects({"role": "assistant", "tool_calls": [call]})["tool_calls"]
        return found["function"]["arguments"]

    texts = ['{"a": 1}', "", None, "[1]", "oh", "[" * 100_000]
    assert [arguments(text) for text in texts] == [{"a": 1}, {}, {}, *texts[3:]]
    assert with_objects(HI) is HI


@pytest.mark.parametrize(
    "tools", [[{}], [{"function": {"name": ""}}], [{"function": {"name": "f", "parameters": []}}]]
)
def test_a_tool_has_a_name_and_a_schema(tools: list):
    tools[0].setdefault("type", "function")
    if tools[0].get("function", {}).get("parameters") == []:
        tools[0]["function"]["parameters"] = ["x"]
    with pytest.raises(RequestError, match=r"tools\[0\] = .*must be"):
        tools_of(tools)


def test_two_tools_have_two_names():
    with pytest.raises(RequestError, match=r"tools\[1\]: there are two tools named 'add'"):
        tools_of([TOOL, TOOL])


@pytest.mark.parametrize(
    "calls",
    [
        "x",
        {"function": CALL["function"]},
        [1],
        [{}],
        [{"function": {"name": 1}}],
        [CALL | {"id": 5}],
    ],
)
def test_calls_have_openais_form(calls: Any):
    engine = FakeEngine()
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls is .*must be a list"):
        chat_tokens(engine, [HI, {"role": "assistant", "content": "", "tool_calls": calls}])


@pytest.mark.parametrize("kind", ["custom", "web_search", None, 1])
def test_a_tool_is_a_function(kind: Any):
    with pytest.raises(RequestError, match=r"tools\[0\] = .*must be"):
        tools_of([TOOL | {"type": kind}])
    assert tools_of([{"function": TOOL["function"]}]) == {"add": SCHEMA}


@pytest.mark.parametrize("field", [{"function_call": {"name": "f"}}, {"audio": {"id": "a"}}])
def test_what_no_template_shows_is_refused(field: dict[str, Any]):
    (name,) = field
    with pytest.raises(RequestError, match=rf"messages\[1\]\.{name} is not supported"):
        text_messages([HI, {"role": "assistant", "content": "", **field}])
    assert text_messages([{"role": "assistant", "content": "", name: None}])
