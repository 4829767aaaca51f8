"""What the text of one call says, in each form. How calls are found: `test_tool_calls.py`."""

from __future__ import annotations

from typing import Any

import pytest

from gspo.serve.call_formats import FORMATS, Call, json_values

TOOLS: dict[str, Any] = {
    "f": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}, "o": {}}}
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (' {"a": 1}\n[2]', [{"a": 1}, [2]]),
        ("1 x", []),
        ("NaN", []),
        ("[" * 100_000, []),
        ("9" * 5000, []),
    ],
)
def test_json_values(text: str, expected: list[Any]):
    assert json_values(text) == expected


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[1]", "{}", "null", '{"name": "f"}', "f{", "<function=f>"]
)
def test_what_is_no_call_has_none(form: str, text: str):
    assert FORMATS[form].read(text, TOOLS) == []


@pytest.mark.parametrize(
    ("written", "schema", "value"),
    [
        ("7", {"type": "integer"}, 7),
        ("7", {"type": "string"}, "7"),
        ("7", {}, 7),
        ("seven", {"type": "integer"}, "seven"),
        ("null", {"type": ["string", "null"]}, None),
        ("true", {"enum": ["true", "false"]}, "true"),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("two\nlines ", {"type": "string"}, "two\nlines "),
    ],
)
def test_the_schema_types_what_xml_writes_as_text(written: str, schema: dict, value: Any):
    text = f"<function=f>\n<parameter=x>\n{written}\n</parameter>\n</function>"
    tools = {"f": {"properties": {"x": schema}}}
    assert FORMATS["qwen3-coder"].read(text, tools) == [Call("f", {"x": value})]
