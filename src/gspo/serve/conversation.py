"""A chat that was asked for: its prompt's tokens, and what its answer is made of.

`/v1/chat/completions` and `/v1/responses` are two ways to write the same chat down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gspo.serve.answers import Asked, chat_logprobs, token_fields, training_fields
from gspo.serve.engine import Completion, Piece
from gspo.serve.schemas import ChatBody
from gspo.serve.streaming import GrowingText
from gspo.serve.tool_calls import Delta, completion_key, joined
from gspo.serve.verbatim import TokenMemory


@dataclass(frozen=True)
class Conversation(Asked):
    """A chat, ready to be sampled.

    Attributes:
        messages: as they were asked, but for one that the answer goes on with.
        begun: the text of that one.
        memory: of the episode or the rollout, which remembers the answer.
    """

    body: ChatBody
    messages: Sequence[dict[str, Any]]
    begun: str
    memory: TokenMemory | None
    kinds = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def begin(self, index: int, prompt: Sequence[int]) -> GrowingMessage:
        return GrowingMessage(self, index, prompt)


class GrowingMessage:
    """One message of a chat that is being sampled.

    Its chunks begin with the role and the prompt's token ids; then comes one for each piece with
    its tokens, and at its end one with the reason and what training needs besides.

    Args:
        asked: the chat.
        index: number of the completion.
        prompt: the chat's tokens.
    """

    def __init__(self, asked: Conversation, index: int, prompt: Sequence[int]):
        self._asked, self._index, self._prompt = asked, index, list(prompt)
        self._text = GrowingText(asked.engine, asked.params)
        self._deltas: list[Delta] = []
        self._calls = 0
        self._before: tuple[int, ...] = ()
        self._begun = False
        chat, calls, self._parser = asked.engine.chat, asked.body.calls(), None
        if chat.wants_special(calls):
            self._parser = chat.parser(calls, completion_key(prompt, index))

    def read(self, piece: Piece) -> list[Delta]:
        """What a piece adds to the message."""
        text = self._text.read(piece)
        if self._parser is not None:
            new = self._parser.feed(text, last=piece.completion is not None)
        else:
            new = [Delta(text)] if text else []
        self._deltas += new
        return new

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Log-probs of the piece's tokens, if they are asked for."""
        before, self._before = self._before, piece.token_ids[-1:]
        return chat_logprobs(self._asked.engine, piece, before) if self._asked.logprobs else None

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            first = {"role": "assistant", "content": ""}
            yield self._chunk(first, prompt_token_ids=self._prompt)
        first, *others = [self._wire(delta) for delta in self.read(piece)] or [{}]
        yield self._chunk(first, **token_fields(piece), logprobs=self.logprobs(piece))
        for delta in others:
            yield self._chunk(delta)
        if piece.completion is not None:
            choice = self.recorded(piece.completion)
            reason = choice["finish_reason"]
            yield self._chunk({}, finish_reason=reason, **training_fields(piece.completion))

    def whole(self, completion: Completion) -> dict[str, Any]:
        (piece,) = completion.pieces(self._index, len(completion.token_ids))
        self.read(piece)
        return self.recorded(completion)

    def recorded(self, completion: Completion) -> dict[str, Any]:
        """The choice that all pieces add up to; its episode keeps it and remembers its tokens."""
        asked, message = self._asked, joined(self._deltas)
        called = message.tool_calls and completion.finish_reason == "stop"
        choice = {
            "index": self._index,
            "message": message.wire(),
            "logprobs": chat_logprobs(asked.engine, completion) if asked.logprobs else None,
            "finish_reason": "tool_calls" if called else completion.finish_reason,
            "prompt_token_ids": self._prompt,
            **token_fields(completion),
            **training_fields(completion),
        }
        if asked.memory is not None:
            tokens, ids = completion.token_ids, [call.id for call in message.tool_calls]
            text = partial(asked.engine.tokenizer.decode, tokens, special=True)
            asked.memory.remember(self._prompt, tokens, text, ids)
        if asked.episode is not None:
            whole = choice["message"]
            if asked.begun:  # a client sends both back as one message
                whole = whole | {"content": asked.begun + (whole["content"] or "")}
            asked.episode.record(asked.messages, asked.body.tools, choice | {"message": whole})
        return choice

    def _wire(self, delta: Delta) -> dict[str, Any]:
        if delta.call is not None:
            self._calls += 1
            return {"tool_calls": [{"index": self._calls - 1, **delta.call.wire()}]}
        name = "reasoning_content" if delta.reasoning else "content"
        return {name: delta.content or delta.reasoning}

    def _chunk(self, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        start = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
        return start | token_fields() | fields
