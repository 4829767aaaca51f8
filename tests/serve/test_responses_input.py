"""Items of a conversation become a chat's messages. What is refused: `test_responses.py`."""

from __future__ import annotations

from typing import Any

import pytest

from gspo.core.errors import RequestError
from gspo.serve.responses_input import ResponsesBody, chat_of


def test_reasoning_goes_back_into_its_turn():
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    ]
    body = chat_of(ResponsesBody(model="m", input=items))
    assert [message["role"] for message in body.messages] == ["user", "assistant"]
    turn = body.messages[1]
    assert (turn["reasoning_content"], turn["content"]) == ("hm", "a")
    assert turn["tool_calls"][0]["id"] == "1"
    with pytest.raises(RequestError, match="only text"):
        chat_of(ResponsesBody(model="m", input=[{"role": "user", "content": 5}]))


def test_what_is_no_text_or_no_character_is_refused():
    for kind in ([None], {"a": 1}, None):
        parts = [{"type": kind, "text": "a"}]
        with pytest.raises(RequestError, match="only text"):
            chat_of(ResponsesBody(model="m", input=[{"role": "user", "content": parts}]))
    for fields in ({"metadata": {"a": "\ud800"}}, {"instructions": "\udfff"}):
        with pytest.raises(RequestError, match="half a surrogate pair"):  # the answer repeats them
            chat_of(ResponsesBody(model="m", input="a", **fields))
