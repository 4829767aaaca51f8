"""A chat that was asked for: its prompt's tokens, and what its answer is made of.

`/v1/chat/completions` and `/v1/responses` are two ways to write the same chat down.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from gspo.serve.answers import chat_logprobs, head, token_fields, training_fields, usage
from gspo.serve.engine import Completion, Engine, Piece, Request, SamplingParams
from gspo.serve.streaming import GrowingText


@dataclass(frozen=True)
class Conversation:
    """A chat, ready to be sampled.

    Attributes:
        engine: what samples it.
        model: its name in the request.
        prompt: P token ids.
        params: how it is continued.
        logprobs: whether choices carry log-probs in OpenAI's form.
        tokens: whether they carry token ids.
    """

    engine: Engine
    model: str
    prompt: tuple[int, ...]
    params: SamplingParams
    logprobs: bool = False
    tokens: bool = True

    @property
    def request(self) -> Request:
        return Request(self.prompt, self.params)

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """The whole choice that a completion is."""
        sampled = (completion.token_ids, completion.logprobs)
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": chat_logprobs(self.engine, *sampled) if self.logprobs else None,
            "finish_reason": completion.finish_reason,
            **self.prompt_fields(),
            **self.token_fields(*sampled),
            **training_fields(completion),
        }

    def prompt_fields(self) -> dict[str, Any]:
        """The prompt's token ids, if choices carry token ids."""
        return {"prompt_token_ids": list(self.prompt)} if self.tokens else {}

    def token_fields(
        self, token_ids: Sequence[int] = (), logprobs: Sequence[float] = ()
    ) -> dict[str, Any]:
        """Tokens and their log-probs, if choices carry token ids."""
        return token_fields(token_ids, logprobs) if self.tokens else {}

    def answer(self, completions: list[Completion]) -> dict[str, Any]:
        """The whole answer, in the form of a chat completion."""
        choices = [self.choice(i, completion) for i, completion in enumerate(completions)]
        sampled = sum(len(completion.token_ids) for completion in completions)
        counts = {"usage": usage(len(self.prompt), sampled)}
        return head("chatcmpl", "chat.completion", self.model) | {"choices": choices} | counts


@dataclass
class GrowingMessage:
    """One message of a chat that is being sampled."""

    call: Conversation
    text: GrowingText = field(init=False)
    before: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.text = GrowingText(self.call.engine, self.call.params)

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to the message."""
        text = self.text.read(piece)
        return [{"content": text}] if text else []

    def finish_reason(self, completion: Completion) -> str:
        """Why the message ended."""
        return completion.finish_reason

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Log-probs of the piece's tokens, if they are asked for."""
        before, self.before = self.before, piece.token_ids[-1:]
        if not self.call.logprobs:
            return None
        return chat_logprobs(self.call.engine, piece.token_ids, piece.logprobs, before)


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
                messages[index] = GrowingMessage(call)
                first = {"role": "assistant", "content": ""}
                yield chunk(index, first, **call.prompt_fields())
            message = messages[index]
            tokens = call.token_fields(piece.token_ids, piece.logprobs)
            first, *others = message.deltas(piece) or [{}]
            yield chunk(index, first, **tokens, logprobs=message.logprobs(piece))
            for delta in others:
                yield chunk(index, delta)
            if piece.completion is not None:
                reason = message.finish_reason(piece.completion)
                yield chunk(index, {}, finish_reason=reason, **training_fields(piece.completion))
    if with_usage:
        yield start | {"choices": [], "usage": usage(len(call.prompt), sampled)}
