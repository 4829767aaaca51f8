"""Tool calls in what a model writes, in each form: read whole and piece by piece."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.serve.call_formats import FORMATS
from gspo.serve.harmony import HarmonyParser
from gspo.serve.tool_calls import CallParser, Parsed, completion_key, joined

TOOLS = {
    "f": {"properties": {"x": {"type": "integer"}, "s": {"type": "string"}, "o": {}}},
    "g": {},
}
SPECIAL = ["<|end|>", "</s>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]


def parser(form: str, key: str = "") -> Any:
    if form == "harmony":
        return HarmonyParser(TOOLS, key)
    return CallParser(FORMATS[form], TOOLS, key, SPECIAL)


def read(form: str, *pieces: str, key: str = "") -> Parsed:
    one = parser(form, key)
    return joined(
        [delta for piece in pieces for delta in one.feed(piece)] + one.feed("", last=True)
    )


def calls(parsed: Parsed) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls]


ONE = '{"name": "f", "arguments": {"x": 1}}'
TWO = '{"arguments": {}, "name": "g"}'
XML = "<function=f>\n<parameter=x>\n1\n</parameter>\n</function>"
LLAMA = '{"name": "f", "parameters": {"x": 1}}'
CHANNEL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>'
F, G = ("f", {"x": 1}), ("g", {})
GOOD = [
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call><|end|>", None, [F]),
    (
        "hermes",
        f"Well \n <tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>\n",
        "Well",
        [F, G],
    ),
    ("hermes", f"<tool_call>{ONE}</tool_call> so", " so", [F]),
    ("hermes", f"<tool_call>{ONE}", None, [F]),  # ended in place of the mark
    ("qwen3-coder", f"<tool_call>\n{XML}\n</tool_call>", None, [F]),
    ("qwen3-coder", f"a<tool_call>{XML}</tool_call><tool_call>{XML}</tool_call>", "a", [F, F]),
    ("llama3", LLAMA, None, [F]),
    ("llama3", f" <|python_tag|>{LLAMA}<|end|>", None, [F]),
    ("llama3", f"{LLAMA}; {LLAMA}", None, [F, F]),
    ("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]</s>", None, [F, G]),
    ("mistral", 'hm[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g{}</s>', "hm", [F, G]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"x": 1}', None, [F]),
    ("harmony", CHANNEL, None, [F]),
    ("harmony", ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>', None, [F]),
    ("harmony", f"<|channel|>commentary<|message|>a<|end|><|start|>assistant{CHANNEL}", "a", [F]),
]


@pytest.mark.parametrize(("form", "text", "content", "expected"), GOOD)
def test_calls_are_read(form: str, text: str, content: str | None, expected: list):
    parsed = read(form, text)
    assert (parsed.content, calls(parsed)) == (content, expected)


BAD = [
    ("hermes", "<tool_call>oh</tool_call>"),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
    ("hermes", f"<tool_call>{ONE} {ONE}</tool_call>"),
    ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>"),
    ("hermes", f"<think>maybe <tool_call>{ONE}</tool_call>"),
    ("hermes", "<tool_call>"),
    ("hermes", "1 < 2 <tool"),
    ("hermes", "bare " + ONE),
    ("qwen3-coder", f"<tool_call>{ONE}</tool_call>"),
    ("qwen3-coder", "<tool_call><function=f>x</function></tool_call>"),
    ("llama3", "Look: " + LLAMA),
    ("llama3", '{"name": "f"}'),
    ("llama3", f"{LLAMA} {{"),
    ("mistral", f"[TOOL_CALLS] {ONE}"),
    ("mistral", "[TOOL_CALLS]f[ARGS][1]"),
    ("harmony", "plain text"),
]


@pytest.mark.parametrize(("form", "text"), BAD)
def test_a_malformed_call_is_text(form: str, text: str):
    assert read(form, text + "<|end|>") == Parsed(text)


def test_a_good_call_after_a_bad_one_is_read():
    text = f'<tool_call>{{"name": "f</tool_call>\n<tool_call>{ONE}</tool_call>'
    parsed = read("hermes", text)
    assert parsed.content == '<tool_call>{"name": "f</tool_call>'
    assert calls(parsed) == [F]


def test_the_end_mark_may_stand_in_a_string():
    inside = {"s": 'say "</tool_call>" twice: </tool_call>'}
    text = f'<tool_call>{{"name": "f", "arguments": {json.dumps(inside)}}}</tool_call>'
    assert calls(read("hermes", text)) == [("f", inside)]


def test_the_schema_types_what_xml_writes_as_text():
    values = {"x": "7", "s": "7", "o": '{"a": [1]}', "other": "two\nlines"}
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    ((_, found),) = calls(
        read("qwen3-coder", f"<tool_call><function=f>{body}</function></tool_call>")
    )
    assert found == {"x": 7, "s": "7", "o": {"a": [1]}, "other": "two\nlines"}


def test_ids_are_of_the_form_that_the_models_take():
    (hermes,) = read("hermes", GOOD[0][1]).tool_calls
    assert hermes.id.startswith("call_")
    mistral = read("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]").tool_calls
    assert [len(call.id) for call in mistral] == [9, 9]
    assert all(call.id.isalnum() for call in mistral)
    assert hermes.wire() == {
        "id": hermes.id,
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": 1}'},
    }


def test_ids_are_the_same_for_the_same_completion_only():
    text = f"<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>"
    key = completion_key([1, 2], 0)
    first, second = read("hermes", text, key=key).tool_calls
    assert read("hermes", text, key=key).tool_calls == (first, second)
    ids = {first.id, second.id}
    for other in (completion_key([1, 2], 1), completion_key([12], 0), completion_key([1, 3], 0)):
        ids |= {call.id for call in read("hermes", text, key=other).tool_calls}
    assert len(ids) == 8


PARTS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", ONE, TWO, XML, LLAMA, "[TOOL_CALLS]"),
    *("[ARGS]", f"[{ONE}]", "<|python_tag|>", CHANNEL, "<|channel|>", "final", "<|message|>"),
    *(
        "<|end|>",
        "<|call|>",
        "<|return|>",
        "</s>",
        " ",
        "\n",
        "{",
        '"',
        "\\",
        "é",
        "to=functions.f",
    ),
)
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=4)), max_size=12).map("".join)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, form=st.sampled_from([*FORMATS, "harmony"]), data=st.data())
def test_the_message_is_the_same_wherever_the_pieces_end(text: str, form: str, data: st.DataObject):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert read(form, *pieces) == read(form, text) == read(form, *text)


@pytest.mark.parametrize(("form", "text", "content", "expected"), GOOD)
def test_good_calls_come_letter_by_letter_too(form: str, text: str, content: str, expected: list):
    assert read(form, *text) == read(form, text)


@pytest.mark.parametrize("form", [*FORMATS])
def test_content_is_passed_on_at_once(form: str):
    one = parser(form)
    said = ["1 ", "< 2", "<x", " y", "[", "[b]"]
    passed = ["".join(delta.content for delta in one.feed(piece)) for piece in said]
    assert "".join(passed) == "".join(said)
    assert passed[0] == "1"
    assert one.feed("", last=True) == []
