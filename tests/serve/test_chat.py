"""Conversations by the model's own template, with tools, in each form of calls."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from chat_templates import TEMPLATES, tokenizer
from gspo.core.errors import RequestError
from gspo.serve.chat import _RESERVED, ChatFormat

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
FORMS = {
    "qwen": "hermes",
    "coder": "qwen3-coder",
    "llama": "llama3",
    "mistral": "mistral",
    "harmony": "harmony",
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
HI = {"role": "user", "content": "hi"}


def chat(name: str, template: str | None = None) -> ChatFormat:
    return ChatFormat(tokenizer(name) if template is None else Template(template), name)


class Template:
    """A tokenizer with this template."""

    def __init__(self, template: Any):
        self.chat_template, self.eos_token = template, "<|im_end|>"
        self.added_tokens_decoder: dict[int, Any] = {}

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any:
        return PreTrainedTokenizerBase.apply_chat_template(
            tokenizer("chatml"), conversation, chat_template=self.chat_template, **options
        )


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_a_call_is_rendered_and_read_back(name: str, form: str):
    one = chat(name)
    assert one.form is not None
    assert (one.form.name, one.takes_tools) == (form, True)
    message = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
    asked = one.render([HI], tools=[TOOL])
    assert '"name": "add"' in asked
    result = {"role": "tool", "tool_call_id": "call_1", "content": "5"}
    text = one.render([HI, message, result], tools=[TOOL])
    assert text.startswith(asked)
    end = {"harmony": "<|call|>"}.get(name, one.ends[0])
    body = text[len(asked) :].partition(end)[0]
    parsed = one.parse(body + end, tools=[TOOL])
    assert parsed.content is None
    (call,) = parsed.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})
    assert "5" in text[len(asked) + len(body) :]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_without_calls_is_what_was_said(name: str):
    one = chat(name)
    said = "<|channel|>final<|message|>" * (name == "harmony") + " 1 < 2 \n" + one.ends[0]
    assert one.parse(said).content == " 1 < 2 \n"
    assert one.wants_special(None) is (name == "harmony")
    assert one.wants_special([TOOL])


def test_without_tools_calls_are_text():
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert chat("qwen").parse(text).content == text
    assert chat("qwen").parse(text, tools=[TOOL]).tool_calls


def test_arguments_that_are_no_object_stay_text():
    call = CALL | {"function": {"name": "add", "arguments": "oh"}}
    text = chat("qwen").render([HI, {"role": "assistant", "tool_calls": [call]}, HI])
    assert '"arguments": "oh"' in text


def test_a_template_that_wants_text_gets_it():
    text = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}<tool_call>"
        "{{ '{\"arguments\": ' + c.function.arguments + '}' }}{% endfor %}{% endfor %}"
    )
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert chat("", text).render([message]) == '<tool_call>{"arguments": {"a": 1}}'


def test_variables_reach_the_template():
    one = chat("qwen")
    assert one.mentions("enable_thinking")
    assert not one.mentions("thinking_budget")
    thinking = one.render([HI])
    assert one.render([HI], template_kwargs={"enable_thinking": False}) == (
        thinking + "<think>\n\n</think>\n\n"
    )
    with pytest.raises(RequestError, match="'add_generation_prompt' is set by the server"):
        one.render([HI], template_kwargs={"add_generation_prompt": False})


def test_no_argument_of_transformers_can_be_given_as_a_variable():
    names = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert names - {"self", "kwargs", "documents"} <= _RESERVED


@pytest.mark.parametrize("name", [*FORMS, "chatml"])
def test_an_answer_is_continued(name: str):
    one = chat(name)
    text = one.render([HI, {"role": "assistant", "content": "I am"}], continue_final=True)
    assert text.endswith("I am")
    with pytest.raises(RequestError, match="the last message must be the assistant's"):
        one.render([HI], continue_final=True)


def test_tools_need_a_template_that_shows_them():
    with pytest.raises(RequestError, match="template of chatml has no place for tools: use a"):
        chat("chatml").render([HI], tools=[TOOL])
    other = "{{ tools | tojson }}{{ messages[0].content }}<|tool_calls_begin|>"
    with pytest.raises(RequestError, match="a form that is not known here: known are hermes, "):
        chat("", other).render([HI], tools=[TOOL])
    with pytest.raises(RequestError, match="no chat template: use the completions route"):
        chat("", "").render([HI])


def test_a_template_for_tools_beside_another():
    both = {"default": TEMPLATES["chatml"][0], "tool_use": TEMPLATES["qwen"][0]}
    one = ChatFormat(Template(both), "two")
    assert one.form is not None
    assert one.form.name == "hermes"


def test_mistral_gets_ids_of_nine_characters():
    message = {"role": "assistant", "tool_calls": [CALL]}
    text = chat("mistral").render([HI, message, {"role": "tool", "tool_call_id": "call_1"}])
    ids = [
        part.split('"')[2] for part in (text.partition('"id"')[2], text.partition('"call_id"')[2])
    ]
    assert len(set(text.split('"')) & {"call_1"}) == 0
    assert ids


def test_a_developer_is_the_system_where_the_template_has_none():
    asked = [{"role": "developer", "content": "Be kind."}, HI]
    assert "system\nBe kind." in chat("qwen").render(asked)


def test_a_role_that_nobody_knows_is_refused():
    for role, near in (("usr", "Did you mean 'user'"), ("None", "no role of OpenAI's")):
        with pytest.raises(RequestError, match=f"messages: role = '{role}'.*{near}"):
            chat("qwen").render([HI, {"role": role, "content": "hi"}])
    own = "{% for m in messages %}{{ m.role == 'judge' }}{% endfor %}"
    assert chat("own", own).render([HI, {"role": "judge", "content": "x"}]) == "FalseTrue"


def test_what_a_template_refuses_is_a_bad_request():
    with pytest.raises(RequestError, match="the chat template refuses: only one call at once"):
        chat("llama").render([HI, {"role": "assistant", "tool_calls": [CALL, CALL]}])
