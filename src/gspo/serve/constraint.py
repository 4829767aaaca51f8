"""What an answer must be, as a grammar for constrained decoding: a schema, a call of a tool, or one
of the two. Calls are written in the form that the model was taught, see `gspo.serve.chat`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gspo.core.errors import RequestError, shown
from gspo.serve.chat import ChatFormat
from gspo.serve.messages import tools_of
from gspo.serve.schemas import ChatBody

_ANY = "/(?s:.*)/"


def required_call(choice: Any, tools: Sequence[dict] | None) -> str | bool:
    """Whether a request's `tool_choice` says that the answer must be a call: the tool's name, or
    True for any.

    Raises:
        RequestError: it means nothing, or names no tool of the request.
    """
    if choice in (None, "auto", "none"):
        return False
    wanted: Any = True
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) else None
        wanted = function.get("name") if isinstance(function, dict) else None
        if not isinstance(wanted, str) or not wanted:
            raise RequestError(
                f"tool_choice = {shown(choice)}: must be auto, none, required, or "
                '{"type": "function", "function": {"name": ...}}',
                "tool_choice",
            )
    names = list(tools_of(tools or ()))
    if not names or (wanted is not True and wanted not in names):
        raise RequestError(
            f"tool_choice = {shown(choice)}: the request's tools are {names}", "tool_choice"
        )
    return wanted


def answer_schema(response_format: dict[str, Any] | None) -> Any:
    """The JSON schema that an answer must keep to; None if it is text.

    Raises:
        RequestError: a `response_format` that means nothing.
    """
    given = response_format or {"type": "text"}
    kind, inner = given.get("type"), given.get("json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if kind == "json_schema" and isinstance(schema, dict | bool):
        return schema
    raise RequestError(
        f'response_format = {shown(given)}: must be {{"type": "text"}}, '
        '{"type": "json_object"} or {"type": "json_schema", "json_schema": {"name": ..., '
        '"schema": a JSON schema}}',
        "response_format",
    )


def answer_grammar(chat: ChatFormat, body: ChatBody) -> str:
    """Return the grammar for `SamplingParams.grammar`; "" if any text will do.

    Args:
        chat: how the model writes calls.
        body: its tools, its `tool_choice`, its `parallel_tool_calls` and its `response_format`.

    Raises:
        RequestError: a model whose calls are of an unknown form; see `required_call` and
            `answer_schema`.
    """
    must_call = required_call(body.tool_choice, body.tools)
    schema, parallel = answer_schema(body.response_format), body.parallel_tool_calls is not False
    offered = tools_of(body.calls() or ())
    if isinstance(must_call, str):
        offered = {must_call: offered[must_call]}
    if not offered:
        return "" if schema is None else json.dumps(schema)
    if schema is None and not must_call and parallel:
        return ""
    calls = _Calls(chat, offered)
    if must_call:
        return calls.lark("start: thought? calls" if parallel else "start: thought? call")
    if schema is not None:
        several = "calls" if parallel else "call"
        return calls.lark(f"start: {several} | answer\nanswer: %json {json.dumps(schema)}")
    return calls.lark(calls.one_at_most())


class _Calls:
    """Rules of the calls of a model.

    Args:
        chat: how it writes them.
        tools: name -> schema of the arguments.
    """

    def __init__(self, chat: ChatFormat, tools: Mapping[str, Mapping[str, Any]]):
        self._chat, self._tools = chat, tools
        self._ids = {str(t): i for i, t in chat.tokenizer.added_tokens_decoder.items() if t.special}
        self._known = {str(t) for t in chat.tokenizer.added_tokens_decoder.values()}

    def lark(self, start: str) -> str:
        """A grammar that begins with the rule `start`, in llguidance's Lark."""
        name = self._chat.form.name if self._chat.form else ""
        writers = {
            "hermes": self._hermes,
            "qwen3-coder": self._xml,
            "llama3": self._llama,
            "mistral": self._mistral,
            "harmony": self._harmony,
        }
        if name not in writers:
            message = f"tool_choice: how {self._chat.source} writes calls is not known here"
            raise RequestError(message, "tool_choice")
        thought = f'thought: "<think>" rest /\\s*/\nrest[suffix="</think>"]: {_ANY}'
        return "\n".join([start, thought, *writers[name]()])

    def one_at_most(self) -> str:
        """The rule of a text that ends with its first call."""
        opening = self._chat.form.opening if self._chat.form else ""
        if opening == "<|channel|>":  # the mark at a call's end is an end token
            return "start: call | TEXT call?\nTEXT: " + _ANY
        if self._chat.form is not None and self._chat.form.bare:
            return "start: call | TEXT\nTEXT: /([^{\\s](?s:.*))?/"
        if opening in self._ids:  # no text has a special token in it
            return f"start: TEXT call?\nTEXT: {_ANY}"
        mark = re.escape(opening).replace("/", r"\/")
        text = f"{_ANY} & ~/(?s:.*){mark}(?s:.*)/"
        before = f"before[suffix={json.dumps(opening)}]: {_ANY}"
        return f"start: TEXT | before tail\nTEXT: {text}\n{before}"

    def _mark(self, text: str) -> str:
        """A mark around a call: a special token is one by its number, else it is text."""
        return f"<[{self._ids[text]}]>" if text in self._ids else json.dumps(text)

    def _object(self, arguments: str) -> dict[str, Any]:
        """The schema of `{"name": ..., <arguments>: {...}}` for any of the tools."""
        return {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, arguments: _of_object(schema)},
                    "required": ["name", arguments],
                    "additionalProperties": False,
                }
                for name, schema in self._tools.items()
            ]
        }

    def _hermes(self) -> list[str]:
        opening, closing = self._mark("<tool_call>"), self._mark("</tool_call>")
        body = json.dumps(self._object("arguments"))
        return [
            'calls: call ("\\n" call)*',
            f"call: {opening} tail",
            f'tail: "\\n" body "\\n" {closing}',
            f"body: %json {body}",
        ]

    def _llama(self) -> list[str]:
        return ["calls: call", f"call: %json {json.dumps(self._object('parameters'))}"]

    def _mistral(self) -> list[str]:
        opening = self._mark("[TOOL_CALLS]")
        if "[ARGS]" in self._known:
            arguments = self._mark("[ARGS]")
            each = [
                f"{json.dumps(name)} {arguments} %json {json.dumps(_of_object(schema))}"
                for name, schema in self._tools.items()
            ]
            return ["calls: call+", f"call: {opening} tail", f"tail: {' | '.join(each)}"]
        items = {"type": "array", "items": self._object("arguments"), "minItems": 1}
        return [
            f"calls: {opening} %json {json.dumps(items)}",
            f"call: {opening} tail",
            f"tail: %json {json.dumps({**items, 'maxItems': 1})}",
        ]

    def _harmony(self) -> list[str]:
        marks = {m: self._mark(f"<|{m}|>") for m in ("channel", "message", "constrain", "call")}
        end = "" if "<|call|>" in self._chat.ends else f" {marks['call']}"
        each = [
            f'{marks["channel"]} "commentary to=functions.{name} " {marks["constrain"]} "json" '
            f"{marks['message']} %json {json.dumps(_of_object(schema))}{end}"
            for name, schema in self._tools.items()
        ]
        return ["calls: call", f"call: {' | '.join(each)}"]

    def _xml(self) -> list[str]:
        opening, closing = self._mark("<tool_call>"), self._mark("</tool_call>")
        rules = ['calls: call ("\\n" call)*']
        functions = []
        for i, (name, schema) in enumerate(self._tools.items()):
            parts = []
            required = schema.get("required", ())
            for j, (key, kind) in enumerate(schema.get("properties", {}).items()):
                parts.append(f"p{i}x{j}" + ("" if key in required else "?"))
                head = json.dumps(f"<parameter={key}>\n")
                if (
                    isinstance(kind, Mapping)
                    and kind.get("type") == "string"
                    and "enum" not in kind
                ):
                    rules.append(f"p{i}x{j}: {head} words")
                else:
                    tail = json.dumps("\n</parameter>\n")
                    rules.append(f"p{i}x{j}: {head} v{i}x{j} {tail}")
                    rules.append(f"v{i}x{j}: %json {json.dumps(kind)}")
            functions.append(" ".join([json.dumps(f"<function={name}>\n"), *parts]))
        rules.append(f'words[suffix="\\n</parameter>\\n"]: {_ANY}')
        rules.append(f"call: {opening} tail")
        rules.append(f'tail: "\\n" ({" | ".join(functions)}) "</function>\\n" {closing}')
        return rules


def _of_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of arguments, which are an object even where it doesn't say so."""
    return {"type": "object", **schema}
