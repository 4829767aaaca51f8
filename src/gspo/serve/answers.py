"""Completions in the shapes of OpenAI's answers, whole or as the chunks of a stream: what all have
in common, and those of texts. Those of chats: `gspo.serve.conversation`.

Beside OpenAI's fields, each choice carries what training needs: `token_ids`, `prompt_token_ids`,
`token_logprobs`, `temperature` and `policy_version`; `policy_versions`, one of each token, if
weights were published while it was sampled; `altered_by`, if tokens were drawn from another
distribution than that of the log-probs; with `return_routes: true`, an MoE engine's
`routed_experts`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from gspo.data.expert_choices import encode_expert_choices
from gspo.serve.engine import Completion, Engine, Piece, Request, SamplingParams
from gspo.serve.episodes import Episode
from gspo.serve.schemas import ChatBody, CompletionBody
from gspo.serve.streaming import GrowingText

_TOKENS = {"prompt_token_ids", "token_ids", "token_logprobs"}
_numbers = itertools.count(1)  # numbers the answers of this process


class GrowingChoice(Protocol):
    """A choice that is being sampled. With its end its episode records it."""

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        """What a piece adds to it, as choices of chunks."""
        ...

    def whole(self, completion: Completion) -> dict[str, Any]:
        """All of it at once."""
        ...


@dataclass(frozen=True)
class Asked:
    """What a request asks to be sampled, and how its answer is written.

    Attributes:
        engine: what samples.
        body: of the request.
        prompts: token ids of each prompt.
        params: how they are continued.
        episode: what records the choices.
        kinds: of the id, of an answer and of a chunk.
    """

    engine: Engine
    body: ChatBody | CompletionBody
    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    episode: Episode | None
    kinds: ClassVar[tuple[str, str, str]]

    def begin(self, index: int, prompt: Sequence[int]) -> GrowingChoice:
        """Begin the choice of this number."""
        raise NotImplementedError

    @property
    def logprobs(self) -> bool:
        """Whether choices carry log-probs in OpenAI's form."""
        return self.body.logprobs is not None and self.body.logprobs is not False

    @property
    def requests(self) -> list[Request]:
        return [Request(prompt, self.params) for prompt in self.prompts]

    def answer(self, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The whole answer, of the completions of each prompt."""
        pairs = [(p, c) for p, done in zip(self.prompts, answers, strict=True) for c in done]
        choices = [self.begin(i, prompt).whole(c) for i, (prompt, c) in enumerate(pairs)]
        sampled = sum(len(c.token_ids) for _, c in pairs)
        return self._body(self.kinds[1], choices) | {"usage": self._usage(sampled)}

    async def chunks(
        self, pieces: AsyncGenerator[tuple[int, Piece], None], with_usage: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Write a stream of pieces, each with its prompt's number, as chunks."""
        start = self._body(self.kinds[2], []) | ({"usage": None} if with_usage else {})
        growing: dict[int, GrowingChoice] = {}
        sampled = 0
        async with aclosing(pieces):
            async for number, piece in pieces:
                index = number * self.params.n + piece.index
                sampled += len(piece.token_ids)
                if index not in growing:
                    growing[index] = self.begin(index, self.prompts[number])
                for choice in growing[index].chunks(piece):
                    yield start | {"choices": [self.shown(choice)]}
        if with_usage:
            yield start | {"usage": self._usage(sampled)}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.kinds[0]}-{next(_numbers)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.body.model,
            "choices": [self.shown(choice) for choice in choices],
        }

    def shown(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice without token ids, if nobody wants them."""
        left_out = _TOKENS if self.body.return_token_ids is False else ()
        return {k: value for k, value in choice.items() if k not in left_out}

    def _usage(self, sampled: int) -> dict[str, int]:
        asked = sum(map(len, self.prompts))
        counts = {"prompt_tokens": asked, "completion_tokens": sampled}
        return counts | {"total_tokens": asked + sampled}


class TextCompletion(Asked):
    """Prompts that are to be continued, ready to be sampled."""

    kinds = ("cmpl", "text_completion", "text_completion")

    def begin(self, index: int, prompt: Sequence[int]) -> GrowingCompletion:
        return GrowingCompletion(self, index, prompt)


class GrowingCompletion:
    """One choice of a text completion: a chunk for each piece, with its tokens.

    Args:
        asked: the request.
        index: number of the choice.
        prompt: what it continues.
    """

    def __init__(self, asked: TextCompletion, index: int, prompt: Sequence[int]):
        self._asked, self._index = asked, index
        self._text = GrowingText(asked.engine, asked.params)
        self._prompt = {"prompt_token_ids": list(prompt)}
        self._begun = False
        self._offset = 0  # characters of the tokens so far

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        choice = self._choice(self._text.read(piece), piece)
        if not self._begun:
            self._begun = True
            choice |= self._prompt
        if piece.completion is not None:
            whole = self.whole(piece.completion)
            choice |= training_fields(piece.completion)
            choice["finish_reason"] = whole["finish_reason"]
        yield choice

    def whole(self, completion: Completion) -> dict[str, Any]:
        self._offset = 0
        choice = self._choice(completion.text, completion)
        choice |= self._prompt | training_fields(completion)
        choice["finish_reason"] = completion.finish_reason
        if self._asked.episode is not None:
            prompt = self._asked.engine.tokenizer.decode(
                self._prompt["prompt_token_ids"], special=True
            )
            self._asked.episode.record_text(prompt, choice)
        return choice

    def _choice(self, text: str, sampled: Completion | Piece) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs:
            logprobs = text_logprobs(self._asked.engine, sampled, self._offset)
            self._offset += sum(map(len, logprobs["tokens"]))
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": None,
            **token_fields(sampled),
        }


def training_fields(completion: Completion) -> dict[str, Any]:
    """What training needs of a completion beside its tokens."""
    fields: dict[str, Any] = {
        "temperature": completion.temperature,
        "policy_version": completion.policy_versions[0],
    }
    if len(set(completion.policy_versions)) > 1:
        fields["policy_versions"] = list(completion.policy_versions)
    if completion.altered_by:
        fields["altered_by"] = list(completion.altered_by)
    if completion.expert_choices is not None:
        fields["routed_experts"] = encode_expert_choices(completion.expert_choices)
    return fields


def token_fields(sampled: Completion | Piece | None = None) -> dict[str, Any]:
    """The tokens of a choice or a chunk, and their log-probs."""
    if sampled is None:
        return {"token_ids": [], "token_logprobs": []}
    return {"token_ids": list(sampled.token_ids), "token_logprobs": list(sampled.logprobs)}


def chat_logprobs(
    engine: Engine, sampled: Completion | Piece, before: Sequence[int] = ()
) -> dict[str, Any]:
    """Log-probs of tokens in the form of a chat's choice.

    Args:
        engine: what decodes them.
        sampled: the tokens.
        before: tokens before them: a tokenizer may drop the space that a text begins with.
    """
    raws = engine.tokenizer.token_bytes([*before, *sampled.token_ids])[len(before) :]
    entries = []
    for i, (token, logprob) in enumerate(zip(sampled.token_ids, sampled.logprobs, strict=True)):
        top = [
            _entry(engine, other, its, *engine.tokenizer.token_bytes([other]))
            for others in sampled.top_logprobs[i : i + 1]
            for other, its in others
        ]
        entries.append(_entry(engine, token, logprob, raws[i]) | {"top_logprobs": top})
    return {"content": entries, "refusal": None}


def _entry(engine: Engine, token: int, logprob: float, raw: bytes) -> dict[str, Any]:
    text = engine.tokenizer.decode([token], special=True)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def text_logprobs(engine: Engine, sampled: Completion | Piece, offset: int = 0) -> dict[str, Any]:
    """Log-probs of tokens in the form of a text completion's choice.

    Args:
        engine: what decodes them.
        sampled: the tokens.
        offset: characters of the tokens before them.
    """

    def read(token: int) -> str:
        return engine.tokenizer.decode([token], special=True)

    texts = [read(token) for token in sampled.token_ids]
    top = [{read(t): p for t, p in reversed(others)} for others in sampled.top_logprobs]
    return {
        "tokens": texts,
        "token_logprobs": list(sampled.logprobs),
        "top_logprobs": top or None,
        "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[:-1],
    }
