"""The sampled tokens of an episode, used again word for word where a prompt contains them.

A client sends a conversation back as text. Its chat template may write the model's own turns in
another way than the model did (white space in a call, an order of tokens), and tokenizing the text
again may give other tokens. Then the next prompt would not extend what was sampled. Here it does,
as long as the template writes the same message.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from gspo.core.progress import rollout_belongings
from gspo.serve.chat import ChatFormat
from gspo.serve.engine import Engine
from gspo.serve.messages import check_calls
from gspo.serve.tool_calls import Parsed


@dataclass(frozen=True)
class _Sampled:
    """One completion. Its text is made when a prompt first asks for it: most are never asked on."""

    tokens: array[int]
    text: Callable[[], str]
    ids: frozenset[str]


@dataclass
class _Asked:
    """A prompt: who rendered it, its text, tokens and tools, and what was sampled for it."""

    chat: ChatFormat
    text: str
    tokens: array[int]
    tools: Sequence[dict] | None
    sampled: list[_Sampled]


class TokenMemory:
    """What was sampled in one episode. Its methods may be called from any thread.

    >>> from gspo.serve.fake_engine import FakeEngine
    >>> engine, memory = FakeEngine(), TokenMemory()
    >>> prompt = chat_tokens(engine, [{"role": "user", "content": "hi"}], memory=memory)
    >>> memory.remember(prompt, [104, 111, 0], lambda: "ho\\0")
    """

    def __init__(self) -> None:
        self._asked: dict[bytes, _Asked] = {}
        self._reasoning: dict[str, str] = {}
        self._lock = threading.Lock()

    def prompt(
        self, engine: Engine, text: str, tools: Sequence[dict] | None, ids: Collection[str]
    ) -> list[int]:
        """The tokens of a rendered conversation: what was sampled verbatim, the rest encoded.

        The longest remembered prompt that the text begins with, and after which it says what was
        sampled then, gives the tokens.

        Args:
            engine: whose chat format rendered it, and whose tokens they are.
            text: the whole of it.
            tools: those of the request.
            ids: of the tool calls in the conversation: which of several like answers it contains.
        """
        with self._lock:
            extended = self._extended(engine, text, tools, ids)
            tokens = extended or engine.tokenizer.encode(text)
            packed = array("i", tokens)
            self._asked.setdefault(packed.tobytes(), _Asked(engine.chat, text, packed, tools, []))
        return tokens

    def with_reasoning(self, messages: Sequence[dict]) -> list[dict]:
        """The messages, with the reasoning before a call that clients have no field for."""
        out = []
        for message in messages:
            calls = message.get("tool_calls") or ()
            thoughts = [self._reasoning.get(call.get("id", "")) for call in calls]
            lost = bool(thoughts and thoughts[0]) and not message.get("reasoning_content")
            out.append(message | {"reasoning_content": thoughts[0]} if lost else message)
        return out

    def remember(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        text: Callable[[], str],
        ids: Collection[str] = (),
    ) -> None:
        """Remember a completion.

        Args:
            prompt: as `prompt` returned it; the completion of another one is not remembered.
            tokens: sampled, the end token included.
            text: makes that of all of them, with special tokens.
            ids: of the tool calls that were read from it.
        """
        with self._lock:
            asked = self._asked.get(array("i", prompt).tobytes())
            if asked is None:
                return
            sampled = _Sampled(array("i", tokens), cache(text), frozenset(ids))
            asked.sampled.append(sampled)
            if ids and (reasoning := asked.chat.parse(text(), tools=asked.tools).reasoning):
                self._reasoning |= dict.fromkeys(ids, reasoning)

    def _extended(
        self, engine: Engine, text: str, tools: Sequence[dict] | None, ids: Collection[str]
    ) -> list[int] | None:
        chat = engine.chat
        begun = [a for a in self._asked.values() if a.chat is chat and text.startswith(a.text)]
        for asked in sorted(begun, key=lambda asked: -len(asked.text)):
            following = text[len(asked.text) :]
            found = [(_said(sampled, following, chat, tools), sampled) for sampled in asked.sampled]
            # That whose calls the conversation names, the longest, the newest.
            ranked = [
                (not sampled.ids.isdisjoint(ids), size, number)
                for number, (size, sampled) in enumerate(found)
                if size is not None
            ]
            if ranked:
                _, size, number = max(ranked)
                rest = encoded_after(engine, following[size:])
                return [*asked.tokens, *asked.sampled[number].tokens, *rest]
        return None


def rollout_memory() -> TokenMemory | None:
    """The memory of the rollout of a gather that asks in this process, or None."""
    belongings = rollout_belongings.get()
    return None if belongings is None else belongings.setdefault("tokens", TokenMemory())


def _said(
    sampled: _Sampled, text: str, chat: ChatFormat, tools: Sequence[dict] | None
) -> int | None:
    """How many characters of `text` say what was sampled, as the template writes it; or None.

    A message with calls may end otherwise than sampled (Llama's `<|eom_id|>` for `<|eot_id|>`).
    Another message may not: gpt-oss is taught to see `<|end|>` where it has said `<|return|>`.
    """
    exact = sampled.text()
    if text.startswith(exact):
        return len(exact)
    parsed, own = chat.parse(exact, tools=tools), [e for e in chat.ends if exact.endswith(e)]
    ends = own[:1] if own and not parsed.tool_calls else chat.ends
    places = [(size, end) for end in ends if (size := text.find(end)) >= 0]
    if not places:
        return None
    size, end = min(places)
    if _message(chat.parse(text[:size] + end, tools=tools)) != _message(parsed):
        return None
    return size + len(end) if own else size


def _message(parsed: Parsed) -> tuple[object, ...]:
    """What a message says, however it is spaced."""
    calls = [
        (call.name, json.dumps(json.loads(call.arguments), sort_keys=True))
        for call in parsed.tool_calls
    ]
    return (parsed.content or "").split(), calls, (parsed.reasoning or "").split()


def encoded_after(engine: Engine, text: str) -> list[int]:
    """Tokens of a text that follows others: sentencepiece would begin it with a space."""
    encode = engine.tokenizer.encode
    for end in engine.chat.ends:
        if len(encode(end)) == 1:
            return encode(end + text)[1:] if text else []
    return encode(text) if text else []


def chat_tokens(
    engine: Engine,
    messages: Sequence[dict],
    *,
    tools: Sequence[dict] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    continue_final: bool = False,
    memory: TokenMemory | None = None,
) -> list[int]:
    """Token ids of a conversation that asks for the assistant's next turn.

    Args:
        engine: whose prompt it is.
        messages, tools, template_kwargs, continue_final: see `ChatFormat.render`.
        memory: of the episode that the conversation belongs to: what was sampled in it is used word
            for word.

    Raises:
        RequestError: calls that are not in OpenAI's form; and see `ChatFormat.render`.
    """
    check_calls(messages)
    if memory is not None:
        messages = memory.with_reasoning(messages)
    text = engine.chat.render(
        messages, tools=tools, template_kwargs=template_kwargs, continue_final=continue_final
    )
    if memory is None:
        return engine.tokenizer.encode(text)
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    ids = {str(call.get("id")) for call in calls}
    return memory.prompt(engine, text, tools, ids)
