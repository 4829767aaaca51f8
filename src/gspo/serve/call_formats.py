"""The forms of tool calls that models are taught: what a call begins and ends with, and says.

>>> FORMATS["hermes"].read('{"name": "add", "arguments": {"a": 1}}', {})
[Call(name='add', arguments={'a': 1})]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gspo.core.plain import deeper_than

Tools = Mapping[str, Mapping[str, Any]]
"""Name of a tool -> the JSON schema of its arguments."""


class Call(NamedTuple):
    """A call before it has an id."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How a family of models writes its calls.

    Attributes:
        name: of the family.
        opening: what a call begins with.
        closing: what it ends with; "": another `opening`, or the end of the text.
        read: the calls in the text between the two; [] if it is malformed.
        bare: a text that begins with `{` is a call too, without `opening`.
        inside: special tokens that belong to a call.
        id_size: characters of an id, digits and letters.
    """

    name: str
    opening: str
    closing: str
    read: Callable[[str, Tools], list[Call]]
    bare: bool = False
    inside: tuple[str, ...] = ()
    id_size: int = 24

    def call_id(self, text: str) -> str:
        """The id of what `text` stands for: 'call_' and hexadecimal digits, or digits only."""
        digits = hashlib.sha256(text.encode(errors="replace")).hexdigest()[: self.id_size]
        return digits if self.id_size < 24 else f"call_{digits}"


DEEPEST = 100
"""Lists and dicts within one another, in a body or a call: what writes JSON goes only so deep."""


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_constant)


def json_values(text: str, between: str = "") -> list[Any]:
    """The JSON values of a text, with white space and `between` between them; [] if it is none."""
    values, at, blank = [], 0, re.compile(rf"[\s{between}]*")
    try:
        while (at := blank.match(text, at).end()) < len(text):  # pyright: ignore[reportOptionalMemberAccess]
            value, at = _DECODER.raw_decode(text, at)
            values.append(value)
    except (ValueError, RecursionError):
        return []
    return [] if deeper_than(DEEPEST, values) else values


def _calls(values: list[Any], arguments: str = "arguments") -> list[Call]:
    """The calls of some JSON objects; [] if one of them is none."""
    calls = []
    for value in values:
        fine = isinstance(value, dict) and isinstance(value.get("name"), str)
        if not fine or not isinstance(value.get(arguments), dict):
            return []
        calls.append(Call(value["name"], value[arguments]))
    return calls


def _read_hermes(text: str, tools: Tools) -> list[Call]:
    values = json_values(text)
    return _calls(values) if len(values) == 1 else []


def _read_llama(text: str, tools: Tools) -> list[Call]:
    return _calls(json_values(text, between=";"), "parameters")


def _read_mistral(text: str, tools: Tools) -> list[Call]:
    """Either a list of objects (to v7), or `name[CALL_ID]id[ARGS]{...}` (from v11 on)."""
    named = re.match(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+\s*)?(?:\[ARGS\])?\s*(?=\{)", text)
    if named:
        values = json_values(text[named.end() :])
        fine = len(values) == 1 and isinstance(values[0], dict)
        return [Call(named[1], values[0])] if fine else []
    values = json_values(text)
    return _calls(values[0]) if len(values) == 1 and isinstance(values[0], list) else []


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _read_xml(text: str, tools: Tools) -> list[Call]:
    """`<function=f><parameter=x>value</parameter></function>`; the schema types the values."""
    function = _FUNCTION.fullmatch(text)
    if function is None:
        return []
    name, body, at = function[1].strip(), function[2], 0
    schema = tools.get(name, {}).get("properties", {})
    arguments = {}
    while found := _PARAMETER.match(body, at):
        key, at = found[1].strip(), found.end()
        arguments[key] = _typed(found[2], schema.get(key))
    return [] if body[at:].strip() else [Call(name, arguments)]


def _typed(text: str, schema: Any) -> Any:
    """A value that was written as text: text if the schema says so, or if it is no JSON."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string" or (isinstance(schema, Mapping) and "enum" in schema and not kinds):
        return text
    values = json_values(text)
    if len(values) != 1 or (isinstance(kinds, list) and "string" in kinds and values[0]):
        return text
    return values[0]


FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("hermes", "<tool_call>", "</tool_call>", _read_hermes),
        Format("qwen3-coder", "<tool_call>", "</tool_call>", _read_xml),
        Format("llama3", "<|python_tag|>", "", _read_llama, bare=True),
        Format(
            *("mistral", "[TOOL_CALLS]", "", _read_mistral),
            inside=("[ARGS]", "[CALL_ID]"),
            id_size=9,
        ),
    )
}
"""The forms of calls that stand between two marks. gpt-oss' channels: `gspo.serve.harmony`."""
