"""gpt-oss' channels. What all forms have in common is in `test_tool_calls.py`."""

from __future__ import annotations

import pytest

from gspo.serve.harmony import HarmonyParser
from gspo.serve.tool_calls import Parsed, joined

CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>'
THOUGHT = "<|channel|>analysis<|message|>hm <|end|><|start|>assistant"


def read(text: str) -> Parsed:
    parser = HarmonyParser({"f": {}})
    return joined(parser.feed(text, last=True))


def test_reasoning_stands_apart():
    assert read(f"{THOUGHT}<|channel|>final<|message|>so<|return|>") == Parsed("so", (), "hm ")
    assert read(THOUGHT + CALL).reasoning == "hm "
    assert read("<|channel|>analysis<|message|>cut") == Parsed("", (), "cut")


@pytest.mark.parametrize("arguments", ["{", "[1]", '{"x": 1} 2', '{"x": NaN}'])
def test_a_malformed_call_in_a_channel_is_text(arguments: str):
    text = f"<|channel|>commentary to=functions.f<|message|>{arguments}<|call|>"
    assert read(text) == Parsed(arguments)
    assert read(CALL.replace("functions.f", "functions.g")) == Parsed('{"x": 1}')


def test_reasoning_and_content_are_passed_on_at_once():
    parser = HarmonyParser({})
    pieces = ["<|channel|>final<|mess", "age|>a", "b<|ret", "urn|>"]
    assert [[d.content for d in parser.feed(piece)] for piece in pieces] == [[], ["a"], ["b"], []]
