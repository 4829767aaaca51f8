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
from typing import Any, Protocol

from gspo.serve.chat import ChatFormat
from gspo.serve.tool_calls import Parsed


@dataclass(frozen=True)
class _Sampled:
    """One completion: its tokens; its text without, and the text of, its end token ("": none)."""

    tokens: array[int]
    text: str
    end: str
    ids: frozenset[str]


@dataclass
class _Asked:
    """A prompt: who rendered it, its text, its tokens, and what was sampled for it."""

    chat: ChatFormat
    text: str
    tokens: array[int]
    sampled: list[_Sampled]


class Chatting(Protocol):
    """What rendering a conversation needs of an engine."""

    chat: ChatFormat

    def encode(self, text: str) -> list[int]: ...


class TokenMemory:
    """What was sampled in one episode. Its methods may be called from any thread.

    >>> from gspo.serve.fake_engine import FakeEngine
    >>> engine, memory = FakeEngine(), TokenMemory()
    >>> prompt = engine.encode_chat([{"role": "user", "content": "hi"}], memory=memory)
    >>> memory.remember(prompt, [104, 111, 0], "ho\\0")
    """

    def __init__(self) -> None:
        self._asked: dict[bytes, _Asked] = {}
        self._lock = threading.Lock()

    def prompt(
        self,
        chat: ChatFormat,
        text: str,
        encode: Callable[[str], list[int]],
        *,
        tools: Sequence[dict] | None = None,
        ids: Collection[str] = (),
    ) -> list[int]:
        """The tokens of a rendered conversation: what was sampled verbatim, the rest encoded.

        The longest remembered prompt that the text begins with, and after which it says what was
        sampled then, gives the tokens.

        Args:
            chat: what rendered it.
            text: the whole of it.
            encode: makes tokens of a text.
            tools: those of the request.
            ids: of the tool calls in the conversation: which of several like answers it contains.
        """
        with self._lock:
            tokens = self._extended(chat, text, encode, tools, ids) or encode(text)
            packed = array("i", tokens)
            self._asked.setdefault(packed.tobytes(), _Asked(chat, text, packed, []))
        return tokens

    def remember(
        self, prompt: Sequence[int], tokens: Sequence[int], text: str, ids: Collection[str] = ()
    ) -> None:
        """Remember a completion.

        Args:
            prompt: as `prompt` returned it; the completion of another one is not remembered.
            tokens: sampled, the end token included.
            text: of all of them, with special tokens.
            ids: of the tool calls that were read from it.
        """
        asked = self._asked.get(array("i", prompt).tobytes())
        if asked is None:
            return
        end = next((end for end in asked.chat.ends if text.endswith(end)), "")
        said = text[: len(text) - len(end)]
        with self._lock:
            asked.sampled.append(_Sampled(array("i", tokens), said, end, frozenset(ids)))

    def _extended(
        self,
        chat: ChatFormat,
        text: str,
        encode: Callable[[str], list[int]],
        tools: Sequence[dict] | None,
        ids: Collection[str],
    ) -> list[int] | None:
        begun = [a for a in self._asked.values() if a.chat is chat and text.startswith(a.text)]
        for asked in sorted(begun, key=lambda asked: -len(asked.text)):
            following = text[len(asked.text) :]
            best, tokens = (False, 0), array("i")
            for sampled in asked.sampled:
                if size := _said(sampled, following, chat, tools):
                    # That whose calls the conversation names, the longest, the newest.
                    rank = (not sampled.ids.isdisjoint(ids), size)
                    if rank >= best:
                        best, tokens = rank, sampled.tokens
            if best[1]:
                rest = _encoded_after(chat, following[best[1] :], encode)
                return [*asked.tokens, *tokens, *rest]
        return None


def _said(
    sampled: _Sampled, text: str, chat: ChatFormat, tools: Sequence[dict] | None
) -> int | None:
    """How many characters of `text` say what was sampled, as the template writes it; or None."""
    exact = sampled.text + sampled.end
    if text.startswith(exact):
        return len(exact)
    for end in [sampled.end] if sampled.end else chat.ends:
        size = text.find(end)
        if size < 0:
            continue
        written = chat.parse(text[:size] + end, tools=tools)
        if _message(written) == _message(chat.parse(exact, tools=tools)):
            return size + len(sampled.end)
    return None


def _message(parsed: Parsed) -> tuple[object, ...]:
    """What a message says, however it is spaced."""
    calls = [
        (call.name, json.dumps(json.loads(call.arguments), sort_keys=True))
        for call in parsed.tool_calls
    ]
    return (parsed.content or "").split(), calls, (parsed.reasoning or "").split()


def _encoded_after(chat: ChatFormat, text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Tokens of a text that follows others: sentencepiece would begin it with a space."""
    for end in chat.ends:
        if len(encode(end)) == 1:
            return encode(end + text)[1:] if text else []
    return encode(text) if text else []


def chat_tokens(
    engine: Chatting,
    messages: Sequence[dict],
    *,
    tools: Sequence[dict] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    continue_final: bool = False,
    memory: TokenMemory | None = None,
) -> list[int]:
    """What `Engine.encode_chat` returns, for any engine that has a `ChatFormat`.

    Raises:
        RequestError: see `ChatFormat.render`.
    """
    text = engine.chat.render(
        messages, tools=tools, template_kwargs=template_kwargs, continue_final=continue_final
    )
    if memory is None:
        return engine.encode(text)
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    ids = {str(call.get("id")) for call in calls}
    return memory.prompt(engine.chat, text, engine.encode, tools=tools, ids=ids)
