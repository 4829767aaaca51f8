"""Items of a conversation become a chat's messages. What is refused: `test_responses.py`."""

from __future__ import annotations

from typing import Any

import pytest

from gspo.core.errors import RequestError
from gspo.serve.responses_input import ResponsesBody, chat_of
from gspo.serve.schemas import SampledBody, StreamOptions


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
    given: tuple[dict[str, Any], ...] = ({"metadata": {"a": "\ud800"}}, {"instructions": "\udfff"})
    for fields in given:
        with pytest.raises(RequestError, match="half a surrogate pair"):  # the answer repeats them
            chat_of(ResponsesBody(model="m", input="a", **fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"fromat": {"type": "text"}}}, "text.fromat"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
    ],
)
def test_parts_that_are_misspelt_are_refused(fields: dict[str, Any], param: str):
    with pytest.raises(
        RequestError, match=rf"unknown parameter '{param}'\. Did you mean"
    ) as caught:
        chat_of(ResponsesBody(model="m", input="a", **fields))
    assert caught.value.param == param


def test_each_parameter_of_sampling_reaches_the_chat():
    """But those that mean another thing there, none is dropped."""
    given: dict[str, Any] = {
        **{"temperature": 0.5, "top_p": 0.5, "stop": "a", "seed": 3, "return_routes": True},
        **{"return_token_ids": False, "ignore_eos": True, "stop_token_ids": [1]},
        **{"min_tokens": 2, "skip_special_tokens": False, "top_k": 3, "min_p": 0.1},
        **{"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0},
        **{"logit_bias": {"1": 2.0}, "stream": True, "stream_options": StreamOptions()},
    }
    assert given.keys() == SampledBody.model_fields.keys() - {"model", "n"}
    chat = chat_of(ResponsesBody(model="m", input="a", **given))
    assert {name: getattr(chat, name) for name in given} == given
