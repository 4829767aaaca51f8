"""Which conversation a call goes on with: the histories of a trajectory, as calls come in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from openai.types.chat.chat_completion import Choice

from gspo.trajectories import History, Message, Tools, Trajectory

Form: TypeAlias = tuple[Any, ...]
"""What is compared of a message: all that clients send back as they got it."""


@dataclass
class _Conversation:
    """A history and what the next call must begin with to go on in it.

    Attributes:
        history: what is recorded; the trajectory itself, or one of its additional histories.
        forms: of its messages, the model's own included.
        ids: tool call ids in its messages.
        text: of a text completion's prompt and answers; None in a chat.
        tokens: prompt and answer of its last choice.
    """

    history: Trajectory | History
    forms: list[Form] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    text: str | None = None
    tokens: list[int] = field(default_factory=list)


class Conversations:
    """Sorts calls into the histories of a trajectory.

    A call goes on in a history if it offers the same tools, and its messages begin with the
    history's, the model's own turns as a client sends them back. It may have written them anew: the
    arguments of a tool call are compared as JSON, texts without the white space around them,
    reasoning not at all. If several histories fit, the longest is taken; then the one whose tokens
    the prompt begins with; then the one with the same tool call ids. Any other call begins a
    history of its own. There, earlier turns of the model are context: each sampled token is
    recorded once.

    Args:
        trajectory: gets the first history and, as `additional_histories`, all others.
    """

    def __init__(self, trajectory: Trajectory):
        self._trajectory = trajectory
        self._conversations: list[_Conversation] = []

    def add(self, messages: Sequence[Message], tools: Tools | None, choice: Choice) -> None:
        """Record a choice of a chat."""
        forms, ids = [form(m) for m in messages], [i for m in messages for i in call_ids(m)]
        fitting = [
            c
            for c in self._conversations
            if c.text is None and c.history.tools == tools and c.forms == forms[: len(c.forms)]
        ]
        conversation = self._best(fitting, choice, ids) or self._new(tools)
        history = conversation.history
        history.messages_and_choices += [*messages[len(conversation.forms) :], choice]
        answer = choice.message.model_dump(exclude_none=True)
        conversation.forms = [*forms, form(answer)]
        conversation.ids = [*ids, *call_ids(answer)]
        conversation.tokens = _tokens(choice)

    def add_text(self, prompt: str, choice: Choice) -> None:
        """Record a choice of a text completion. What is new in its prompt is a user's message."""
        fitting = [
            c for c in self._conversations if c.text is not None and prompt.startswith(c.text)
        ]
        conversation = self._best(fitting, choice, []) or self._new(None)
        if added := prompt[len(conversation.text or "") :]:
            conversation.history.messages_and_choices.append({"role": "user", "content": added})
        conversation.history.messages_and_choices.append(choice)
        conversation.text = prompt + (choice.message.content or "")
        conversation.tokens = _tokens(choice)

    def _best(
        self, fitting: Sequence[_Conversation], choice: Choice, ids: Sequence[str]
    ) -> _Conversation | None:
        prompt: list[int] = getattr(choice, "prompt_token_ids", None) or []

        def rank(c: _Conversation) -> tuple[int, bool, bool]:
            begins = prompt[: len(c.tokens)] == c.tokens
            return len(c.forms) + len(c.text or ""), begins, c.ids == ids[: len(c.ids)]

        return max(fitting, key=rank, default=None)

    def _new(self, tools: Tools | None) -> _Conversation:
        """A conversation in a history that is empty."""
        history: Trajectory | History = self._trajectory
        if self._conversations or history.messages_and_choices:
            history = History()
            self._trajectory.additional_histories.append(history)
        history.tools = tools
        self._conversations.append(_Conversation(history))
        return self._conversations[-1]


def _tokens(choice: Choice) -> list[int]:
    """Prompt and answer of a choice."""
    fields = (getattr(choice, name, None) or [] for name in ("prompt_token_ids", "token_ids"))
    return [token for tokens in fields for token in tokens]


def form(message: Message) -> Form:
    """What is compared of a message.

    >>> form({"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"})
    ('user', 'hi', 'ann', ())
    >>> calls = [{"id": "1", "function": {"name": "add", "arguments": '{"b": 2,"a": 1}'}}]
    >>> form({"role": "assistant", "content": None, "tool_calls": calls})
    ('assistant', '', None, (('add', '{"a": 1, "b": 2}'),))
    """
    content, role = message.get("content") or "", message.get("role")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    calls = (call.get("function") or {} for call in message.get("tool_calls") or ())
    named = tuple((call.get("name"), _canonical(call.get("arguments"))) for call in calls)
    # Frameworks put a name of their own on what the model said.
    name = None if role in ("assistant", "tool") else message.get("name")
    return role, content.strip() if role == "assistant" else content, name, named


def call_ids(message: Message) -> list[str]:
    """The tool call ids in a message, its own or those that it answers."""
    ids = [call.get("id") for call in message.get("tool_calls") or ()]
    return [i for i in (*ids, message.get("tool_call_id")) if i]


def _canonical(arguments: Any) -> str:
    """The arguments of a tool call as JSON in one way of writing it; other text as it is."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        return json.dumps(parsed, sort_keys=True)
    except (ValueError, RecursionError):
        return str(arguments)
