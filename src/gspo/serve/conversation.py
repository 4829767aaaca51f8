"""A chat that was asked for: its prompt's tokens, and what its answer is made of.

`/v1/chat/completions` and `/v1/responses` are two ways to write the same chat down.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gspo.serve.answers import chat_logprobs, head, token_fields, training_fields, usage
from gspo.serve.engine import Completion, Engine, Piece, Request, SamplingParams
from gspo.serve.episodes import Episode
from gspo.serve.streaming import GrowingText
from gspo.serve.tool_calls import Delta, completion_key


@dataclass(frozen=True)
class Conversation:
    """A chat, ready to be sampled.

    Attributes:
        engine: what samples it.
        model: its name in the request.
        messages: as they were asked.
        prompt: P token ids.
        params: how it is continued.
        tools: what was offered to the model.
        reads: whether the answer is read for calls and channels. Its text then has the special
            tokens, which the message leaves out.
        calls: whether the model may call the tools; else what looks like a call is text.
        logprobs: whether choices carry log-probs in OpenAI's form.
        tokens: whether they carry token ids.
        episode: what records the choices.
    """

    engine: Engine
    model: str
    messages: Sequence[dict[str, Any]]
    prompt: tuple[int, ...]
    params: SamplingParams
    tools: Sequence[dict[str, Any]] | None = None
    reads: bool = False
    calls: bool = False
    logprobs: bool = False
    tokens: bool = True
    episode: Episode | None = None

    @property
    def request(self) -> Request:
        return Request(self.prompt, self.params)

    def answer(self, completions: list[Completion]) -> dict[str, Any]:
        """The whole answer, in the form of a chat completion."""
        choices = [self.choice(i, completion) for i, completion in enumerate(completions)]
        sampled = sum(len(completion.token_ids) for completion in completions)
        counts = {"usage": usage(len(self.prompt), sampled)}
        return head("chatcmpl", "chat.completion", self.model) | {"choices": choices} | counts

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """The whole choice that a completion is; the episode records it."""
        message = GrowingMessage(self, index)
        reason = completion.finish_reason
        last = Piece(index, completion.token_ids, (), (), reason, completion=completion)
        whole = joined(message.deltas(last))
        choice = {
            "index": index,
            "message": whole,
            "logprobs": chat_logprobs(self.engine, completion) if self.logprobs else None,
            "finish_reason": message.finish_reason(completion),
            "prompt_token_ids": list(self.prompt),
            **token_fields(completion.token_ids, completion.logprobs),
            **training_fields(completion),
        }
        self._record(completion, choice)
        hidden = () if self.tokens else ("prompt_token_ids", "token_ids", "token_logprobs")
        return {name: value for name, value in choice.items() if name not in hidden}

    def prompt_fields(self) -> dict[str, Any]:
        """The prompt's token ids, if choices carry token ids."""
        return {"prompt_token_ids": list(self.prompt)} if self.tokens else {}

    def token_fields(
        self, token_ids: Sequence[int] = (), logprobs: Sequence[float] = ()
    ) -> dict[str, Any]:
        """Tokens and their log-probs, if choices carry token ids."""
        return token_fields(token_ids, logprobs) if self.tokens else {}

    def _record(self, completion: Completion, choice: dict[str, Any]) -> None:
        """Keep a choice in its episode, and its tokens for the prompts to come."""
        if self.episode is None:
            return
        tokens = completion.token_ids
        ids = [call["id"] for call in choice["message"].get("tool_calls", ())]
        if self.episode.memory is not None:
            text = self.engine.decode(tokens, special=True)
            self.episode.memory.remember(self.prompt, tokens, text, ids)
        self.episode.record(self.messages, self.tools, choice)


class GrowingMessage:
    """One message of a chat that is being sampled.

    Args:
        call: the chat.
        index: number of the completion.
    """

    def __init__(self, call: Conversation, index: int):
        self._call, self._text = call, GrowingText(call.engine, call.params)
        self._calls = 0
        self._before: tuple[int, ...] = ()
        self._parser = None
        if call.reads:
            key = completion_key(call.prompt, index)
            self._parser = call.engine.chat.parser(call.tools if call.calls else None, key)

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to the message, in the form of a chunk's deltas."""
        text = self._text.read(piece)
        if self._parser is None:
            return [{"content": text}] if text else []
        found = self._parser.feed(text)
        if piece.completion is not None:
            found += self._parser.end()
        return [self._written(delta) for delta in found]

    def _written(self, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if delta.content:
            fields["content"] = delta.content
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.call is not None:
            fields["tool_calls"] = [{"index": self._calls, **delta.call.wire()}]
            self._calls += 1
        return fields

    def finish_reason(self, completion: Completion) -> str:
        """Why the message ended."""
        return (
            "tool_calls"
            if self._calls and completion.finish_reason == "stop"
            else (completion.finish_reason)
        )

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Log-probs of the piece's tokens, if they are asked for."""
        before, self._before = self._before, piece.token_ids[-1:]
        return chat_logprobs(self._call.engine, piece, before) if self._call.logprobs else None


def joined(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message that deltas add up to.

    >>> joined([{"content": "a"}, {"content": "b"}])["content"]
    'ab'
    """
    texts = {"content": "", "reasoning_content": ""}
    calls = []
    for delta in deltas:
        for name in texts:
            texts[name] += delta.get(name, "")
        calls += delta.get("tool_calls", ())
    content = texts["content"] or (None if calls else "")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if texts["reasoning_content"]:
        message["reasoning_content"] = texts["reasoning_content"]
    if calls:
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in calls
        ]
    return message


async def chat_chunks(
    call: Conversation, pieces: AsyncGenerator[tuple[int, Piece], None], with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """Write a stream of pieces as chunks of a chat completion.

    Each choice begins with the role and the prompt's token ids, then comes a chunk for each piece
    with its tokens, and at its end one with the reason and what training needs besides.
    """
    start = head("chatcmpl", "chat.completion.chunk", call.model)
    if with_usage:
        start["usage"] = None
    messages: dict[int, GrowingMessage] = {}
    sampled = 0

    def chunk(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return start | {"choices": [choice | call.token_fields() | fields]}

    async with aclosing(pieces):
        async for _, piece in pieces:
            index = piece.index
            sampled += len(piece.token_ids)
            if index not in messages:
                messages[index] = GrowingMessage(call, index)
                first = {"role": "assistant", "content": ""}
                yield chunk(index, first, **call.prompt_fields())
            message = messages[index]
            tokens = call.token_fields(piece.token_ids, piece.logprobs)
            first, *others = message.deltas(piece) or [{}]
            yield chunk(index, first, **tokens, logprobs=message.logprobs(piece))
            for delta in others:
                yield chunk(index, delta)
            if piece.completion is not None:
                call.choice(index, piece.completion)  # for the episode
                reason = message.finish_reason(piece.completion)
                yield chunk(index, {}, finish_reason=reason, **training_fields(piece.completion))
    if with_usage:
        yield start | {"choices": [], "usage": usage(len(call.prompt), sampled)}
