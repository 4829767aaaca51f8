"""Bodies of requests: what reaches the engine, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gspo.core.draws import drawing_for
from gspo.core.errors import RequestError
from gspo.serve.engine import SamplingParams
from gspo.serve.schemas import DEEPEST, ChatBody, CompletionBody, TokenizeBody

MESSAGES = [{"role": "user", "content": "?"}]


def chat(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "m", "messages": MESSAGES, **fields})


def test_each_field_reaches_the_engine():
    body = chat(
        n=2,
        temperature=0.5,
        top_p=0.9,
        stop="a",
        seed=3,
        return_routes=True,
        ignore_eos=True,
        stop_token_ids=[7],
        min_tokens=1,
        skip_special_tokens=False,
    )
    with drawing_for("train", 3):
        params = body.sampling(9)
    assert params == SamplingParams(
        n=2,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stop=("a",),
        seed=3,
        purpose=("train", 3),
        expert_choices=True,
        ignore_eos=True,
        stop_token_ids=(7,),
        min_tokens=1,
        skip_special_tokens=False,
    )


def test_null_is_the_default():
    fields = (
        "temperature",
        "top_p",
        "stop",
        "seed",
        "stop_token_ids",
        "stream_options",
        "logprobs",
    )
    assert chat(**dict.fromkeys(fields)).sampling(None) == chat().sampling(None) == SamplingParams()
    assert chat(stop=["a", "b"]).sampling(None).stop == ("a", "b")


def test_the_limit_under_both_of_its_names():
    assert chat().params().max_tokens is None
    assert chat(max_tokens=3).params().max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=3).params().max_tokens == 3
    with pytest.raises(
        RequestError, match="max_tokens = 3, max_completion_tokens = 5: they are one"
    ):
        chat(max_tokens=3, max_completion_tokens=5).params()
    for given in ({}, {"max_tokens": None}):
        assert CompletionBody(model="m", prompt="x", **given).params().max_tokens == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False},
        {"n": None},
        {"top_k": -1},
        {"top_k": 0},
        {"best_of": 1},
        {"tools": []},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"suffix": ""},
        {"user": "me", "metadata": {"a": 1}},
    ],
)
def test_values_that_ask_for_nothing_are_taken(fields: dict[str, Any]):
    assert chat(**fields).sampling(None) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options is for streams"),
        ({"temprature": 1.0}, "unknown parameter 'temprature'. Did you mean 'temperature'"),
        ({"logit_bias": {"1": "a"}}, "logit_bias: .* 'a' .* no number"),
        ({"logit_bias": {"1": True}}, "logit_bias: .* True .* no number"),
        ({"logit_bias": {"01": 1}}, "logit_bias: '01' .* is no token id"),
        ({"guided_json": {}}, r"unknown parameter 'guided_json'\.$"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        chat(**fields).sampling(None)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": 0},
        {"presence_penalty": False},
        {"n": "2"},
        {"n": True},
        {"messages": []},
        {"seed": 1.5},
    ],
)
def test_values_of_another_type_are_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        chat(**fields)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_prompts_one_by_one(prompt: Any, prompts: list[Any]):
    assert CompletionBody(model="m", prompt=prompt).prompts() == prompts


def test_a_list_without_prompts_is_refused():
    with pytest.raises(RequestError, match="at least one prompt"):
        CompletionBody(model="m", prompt=[]).prompts()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", [1] * 10**6),
        ("stop", [1] * 10**6),
        ("stop_token_ids", ["a"] * 10**6),
        ("tools", [None] * 10**6),
    ],
)
def test_of_a_million_faults_one_is_noted(name: str, value: Any):
    with pytest.raises(ValidationError) as caught:
        chat(**{name: value})
    assert caught.value.error_count() <= 2  # one of each kind that the field may be of


def test_what_is_nested_too_deep_is_refused():
    deep: Any = "x"
    for _ in range(DEEPEST - 1):
        deep = [deep]
    assert chat(response_format={"x": deep[0]}).response_format
    with pytest.raises(ValidationError, match=f"nested more than {DEEPEST} deep"):
        chat(response_format={"x": deep})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens is of a prompt"),
        ({"prompt": "a", "tools": [{}]}, "tools is of messages"),
        ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is of messages"),
        ({}, "give either prompt, a text, or messages"),
    ],
)
def test_what_is_tokenized_is_a_text_or_a_chat(fields: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        TokenizeBody(model="m", **fields).content()
