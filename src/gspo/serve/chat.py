"""Conversations: rendered by the model's own chat template, with tools; its answers parsed back.

What the template's text shows decides how calls are read:

| form | shown by | such as |
|---|---|---|
| hermes | `<tool_call>` and `arguments` | Qwen 2.5 and 3, Hermes, SmolLM |
| qwen3-coder | `<function=` | Qwen3-Coder |
| llama3 | `"parameters"` and the role `ipython` | Llama 3.1, 3.2, 3.3 |
| mistral | `[TOOL_CALLS]` | Mistral, Ministral |
| harmony | `<|channel|>` | gpt-oss |

Reasoning between `<think>` and `</think>` stays in the content, where every client sends it back
and where Qwen3's template looks for it. Only harmony has a field of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from gspo.core.errors import RequestError, suggestion
from gspo.serve.call_formats import FORMATS, Format
from gspo.serve.harmony import HARMONY, HarmonyParser
from gspo.serve.messages import tools_of, with_objects
from gspo.serve.tool_calls import CallParser, Parsed, Parser, joined

_PROBE = {
    "name": "probe",
    "description": "probe",
    "parameters": {"type": "object", "properties": {}},
}


ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Tokenizer(Protocol):
    """What a chat needs of a tokenizer, transformers' or another."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...


class ChatFormat:
    """How a model's conversations are written.

    Args:
        tokenizer: with the chat template.
        source: names the model in errors.
        ends: texts of the tokens that end an answer; None: the tokenizer's.

    Attributes:
        form: of its tool calls; None: it has none, or one that is not known here.
        special: texts of the special tokens, which are no part of a message.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: str = "this model", ends: Sequence[str] | None = None
    ):
        self.tokenizer, self.source = tokenizer, source
        own = getattr(tokenizer, "eos_token", None)
        self.ends: tuple[str, ...] = tuple(ends) if ends is not None else (str(own),) if own else ()
        template = tokenizer.chat_template
        parts = template.values() if isinstance(template, Mapping) else [template or ""]
        self._template = "".join(parts)
        self.form = _form(self._template)
        self.special = frozenset(
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        )

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        hello = [{"role": "user", "content": "hello"}]
        tools = [{"type": "function", "function": _PROBE}]
        try:
            plain, shown_tool = self._apply(hello), self._apply(hello, tools=tools)
        except RequestError:
            return True  # it wants more than a hello: the request will tell
        return plain != shown_tool

    def wants_special(self, tools: Sequence[dict] | None) -> bool:
        """Whether answers are to be parsed, and so sampled with skip_special_tokens=False."""
        return bool(tools) or self.form is HARMONY

    def mentions(self, variable: str) -> bool:
        """Whether the template uses this variable."""
        return variable in self._template

    def render(
        self,
        messages: Sequence[dict],
        *,
        tools: Sequence[dict] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool = False,
        ask: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: OpenAI's, contents as text or None.
            tools: OpenAI's, which the model may call.
            template_kwargs: passed to the template, such as Qwen3's `enable_thinking`.
            continue_final: the last message is the beginning of the answer.
            ask: end with what asks for the assistant's next turn.

        Raises:
            RequestError: no template; one that refuses; tools for a model without them; or a name
                of `template_kwargs` that is the server's own.
        """
        if not self._template:
            raise RequestError(
                f"{self.source} has no chat template: use the completions route", param="messages"
            )
        options = dict(template_kwargs or {})
        if reserved := sorted(_RESERVED & options.keys()):
            raise RequestError(
                f"chat_template_kwargs: {reserved[0]!r} is set by the server: only variables of "
                "the template itself can be given",
                param="chat_template_kwargs",
            )
        if tools:
            self.check_tools(tools)
            options["tools"] = [dict(tool) for tool in tools]
        if continue_final:
            if messages[-1].get("role") != "assistant" or not messages[-1].get("content"):
                raise RequestError(
                    "continue_final_message: the last message must be the assistant's, with text",
                    param="continue_final_message",
                )
            options["continue_final_message"] = True
        else:
            options["add_generation_prompt"] = ask
        plain = [self._plain(message) for message in messages]
        try:
            return self._apply([with_objects(message) for message in plain], **options)
        except RequestError as error:
            if not any("tool_calls" in message for message in plain):
                raise
            try:  # some templates add the arguments' text to their own
                return self._apply(plain, **options)
            except RequestError:
                raise error from None

    def check_tools(self, tools: Sequence[dict]) -> None:
        """Refuse tools that this model cannot be offered.

        Raises:
            RequestError: a tool without a name, a template without tools, or calls in a form that
                is not known here.
        """
        tools_of(tools)
        if not self._template or not self.takes_tools:
            raise RequestError(
                f"the chat template of {self.source} has no place for tools: use a model that was "
                "taught to call tools, or describe them in the system message",
                param="tools",
            )
        if self.form is None:
            known = ", ".join([*FORMATS, HARMONY.name])
            raise RequestError(
                f"the chat template of {self.source} writes tool calls in a form that is not known "
                f"here: known are {known}",
                param="tools",
            )

    def marked_tokens(
        self, messages: Sequence[dict], *, tools: Sequence[dict] | None = None
    ) -> tuple[list[int], list[int]] | None:
        """Tokens of a conversation, and 1 for each of an answer, by the template's `generation`
        marks; None if it has none."""
        if not re.search(r"{%-?\s*generation", self._template):
            return None
        marked = self.tokenizer.apply_chat_template(
            [with_objects(self._plain(message)) for message in messages],
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return marked["input_ids"], marked["assistant_masks"]

    def parser(self, tools: Sequence[dict] | None = None, key: str = "") -> Parser:
        """What reads one answer piece by piece: text with its special tokens, which it leaves out.

        Args:
            tools: those that may be called; None: calls stay text.
            key: names the completion: its prompt and its number. Ids are made of it.
        """
        named = tools_of(tools or ())
        if self.form is HARMONY:
            return HarmonyParser(named, key, self.special)
        form = self.form if named and self.form else _NONE
        return CallParser(form, named, key, self.special)

    def parse(self, text: str, *, tools: Sequence[dict] | None = None, key: str = "") -> Parsed:
        """The message that a whole answer is."""
        return joined(self.parser(tools, key).feed(text, last=True))

    def _plain(self, message: dict) -> dict[str, Any]:
        """A message as templates expect it: without what is None, its content a text."""
        plain = {name: value for name, value in message.items() if value is not None}
        plain["content"] = plain.get("content", "")
        role = str(plain.get("role"))
        if role not in ROLES and not any(self.mentions(mark + role + mark) for mark in "'\""):
            raise RequestError(
                f"messages: role = {role!r} is no role of OpenAI's, nor of the chat template of "
                f"{self.source}.{suggestion(role, ROLES)}",
                param="messages",
            )
        if not plain.get("tool_calls", True):
            del plain["tool_calls"]
        if plain.get("role") == "developer" and "developer" not in self._template:
            plain["role"] = "system"
        if self.form is HARMONY and (thought := plain.pop("reasoning_content", None)):
            plain["thinking"] = thought
        if self.form is FORMATS["mistral"]:  # its template takes no other ids
            if "tool_call_id" in plain:
                plain["tool_call_id"] = self._short(plain["tool_call_id"])
            if "tool_calls" in plain:
                calls = plain["tool_calls"]
                plain["tool_calls"] = [c | {"id": self._short(c.get("id"))} for c in calls]
        return plain

    def _short(self, call_id: Any) -> str:
        name = str(call_id)
        fine = len(name) == 9 and name.isalnum()
        return name if fine else FORMATS["mistral"].call_id(name)

    def _apply(self, messages: list[dict], **options: Any) -> str:
        try:
            options = {"add_generation_prompt": False} | options
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # templates raise whatever their author wrote
            raise RequestError(f"the chat template refuses: {error}", param="messages") from None


_NONE = Format("none", "", "", lambda text, tools: [])
"""For answers in which nothing is a call."""


def _form(template: str) -> Format | None:
    """The form of the calls that a template shows to its model; None if it is not known."""
    if "<|channel|>" in template:
        return HARMONY
    if "<function=" in template:
        return FORMATS["qwen3-coder"]
    if "<tool_call>" in template and "arguments" in template and "<arg_key>" not in template:
        return FORMATS["hermes"]
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral"]
    if "ipython" in template and "parameters" in template:
        return FORMATS["llama3"]
    return None


_RESERVED = frozenset(
    {"conversation", "messages", "tools", "chat_template", "add_generation_prompt", "padding"}
    | {"continue_final_message", "tokenize", "sanitize_control_tokens", "truncation", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""Names that are not the template's own: the rest of transformers' `apply_chat_template`."""
