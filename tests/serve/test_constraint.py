"""Grammars of answers: what they let through is what the parser reads as calls."""

from __future__ import annotations

from typing import Any

import pytest

from gspo.core.errors import RequestError
from gspo.serve.chat import ChatFormat
from gspo.serve.constraint import answer_grammar
from gspo.serve.schemas import ChatBody

llguidance = pytest.importorskip("llguidance")


class Template:
    eos_token = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, text: str):
        self.chat_template = text

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any:
        raise NotImplementedError


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "s": {"type": "string"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}}, "required": ["z"]}
FORMS = {
    "hermes": (
        "<tool_call> arguments",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "s": "x"}}\n</tool_call>',
    ),
    "qwen3-coder": (
        "<function=",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\nhi <x>\nyo\n"
        "</parameter>\n</function>\n</tool_call>",
    ),
    "llama3": ('ipython "parameters"', '{"name": "add", "parameters": {"a": 3}}'),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]'),
}
TOKENIZER = llguidance.LLTokenizer("byte")


def grammar_of(
    chat: ChatFormat,
    tools: Any,
    must_call: str | bool = False,
    parallel: bool = True,
    schema: Any = None,
) -> str:
    """The grammar of a request that asks for this."""
    named = {"type": "function", "function": {"name": must_call}}
    body = ChatBody(
        model="m",
        messages=[{"role": "user", "content": "?"}],
        tools=tools,
        tool_choice=named if isinstance(must_call, str) else "required" if must_call else None,
        parallel_tool_calls=parallel,
        response_format=schema and {"type": "json_schema", "json_schema": {"schema": schema}},
    )
    return answer_grammar(chat, body)


def fits(grammar: str, text: str) -> bool:
    """Whether the grammar lets this text through, and may end after it."""
    matcher = llguidance.LLMatcher
    read = matcher.grammar_from_json_schema if grammar[0] == "{" else matcher.grammar_from_lark
    matcher = llguidance.LLMatcher(TOKENIZER, read(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = TOKENIZER.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("form", FORMS)
def test_what_must_be_a_call(form: str):
    template, call = FORMS[form]
    chat = ChatFormat(Template(template))
    assert chat.form is not None and chat.form.name == form
    assert [c.name for c in chat.parse(call, tools=TOOLS).tool_calls] == ["add"]
    for must_call in (True, "add"):
        grammar = grammar_of(chat, TOOLS, must_call=must_call)
        assert fits(grammar, call)
        assert not fits(grammar, "Sure. " + call) and not fits(grammar, "No.")
        assert fits(grammar, f"<think>\nhm\n</think>\n\n{call}")
    assert not fits(grammar_of(chat, TOOLS, must_call="now"), call)
    assert not fits(grammar_of(chat, TOOLS, must_call=True), call.replace("add", "sub"))


@pytest.mark.parametrize("form", FORMS)
def test_one_call_at_most(form: str):
    template, call = FORMS[form]
    grammar = grammar_of(ChatFormat(Template(template)), TOOLS, parallel=False)
    assert fits(grammar, call) and fits(grammar, "No.") and fits(grammar, "")
    assert not fits(grammar, f"{call}\n{call}")
    if form != "llama3":  # its calls have no mark, and begin the answer
        assert fits(grammar, f"Sure. {call}")
    one = grammar_of(ChatFormat(Template(template)), TOOLS, must_call=True, parallel=False)
    assert fits(one, call) and not fits(one, f"{call}\n{call}")


@pytest.mark.parametrize("form", FORMS)
def test_calls_or_an_answer_in_a_schema(form: str):
    template, call = FORMS[form]
    grammar = grammar_of(ChatFormat(Template(template)), TOOLS, schema=SCHEMA)
    assert fits(grammar, call) and fits(grammar, '{"z": 1}')
    assert not fits(grammar, "No.") and not fits(grammar, '{"y": 1}')


def test_any_text_has_no_grammar():
    chat = ChatFormat(Template("<tool_call> arguments"))
    assert grammar_of(chat, TOOLS) == grammar_of(chat, None) == ""
    assert fits(grammar_of(chat, None, schema=SCHEMA), '{"z": 1}')
    with pytest.raises(RequestError, match="is not known here"):
        grammar_of(ChatFormat(Template("none")), TOOLS, must_call=True)
