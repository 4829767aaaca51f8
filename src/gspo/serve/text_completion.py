"""`/v1/completions`: texts or token ids, continued."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gspo.serve.answers import head, text_logprobs, token_fields, training_fields, usage
from gspo.serve.engine import Completion, Engine, Piece, Request, SamplingParams
from gspo.serve.episodes import Episode
from gspo.serve.streaming import GrowingText


@dataclass(frozen=True)
class TextCompletion:
    """Prompts that are to be continued, ready to be sampled.

    Attributes:
        engine: what samples them.
        model: its name in the request.
        prompts: token ids of each prompt.
        params: how they are continued.
        logprobs: whether choices carry log-probs in OpenAI's form.
        tokens: whether they carry token ids.
        episode: what records the choices.
    """

    engine: Engine
    model: str
    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    logprobs: bool = False
    tokens: bool = True
    episode: Episode | None = None

    @property
    def requests(self) -> list[Request]:
        return [Request(prompt, self.params) for prompt in self.prompts]

    def answer(self, completions: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The whole answer, of the completions of each prompt."""
        pairs = [
            (prompt, completion)
            for prompt, answers in zip(self.prompts, completions, strict=True)
            for completion in answers
        ]
        choices = []
        for index, (prompt, completion) in enumerate(pairs):
            end = {"finish_reason": completion.finish_reason, **training_fields(completion)}
            choice = self._choice(index, completion.text, completion)
            choices.append(choice | self._prompt_fields(prompt) | end)
            self._record(prompt, choices[-1], completion)
        sampled = sum(len(completion.token_ids) for _, completion in pairs)
        start = head("cmpl", "text_completion", self.model)
        return start | {"choices": choices, "usage": self._usage(sampled)}

    async def chunks(
        self, pieces: AsyncGenerator[tuple[int, Piece], None], with_usage: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Write a stream of pieces as chunks: one for each piece, with its tokens."""
        start = head("cmpl", "text_completion", self.model)
        if with_usage:
            start["usage"] = None
        texts: dict[int, GrowingText] = {}
        offsets: dict[int, int] = {}
        sampled = 0
        async with aclosing(pieces):
            async for number, piece in pieces:
                index = number * self.params.n + piece.index
                sampled += len(piece.token_ids)
                fields: dict[str, Any] = {}
                if index not in texts:
                    texts[index] = GrowingText(self.engine, self.params)
                    fields = self._prompt_fields(self.prompts[number])
                text = texts[index].read(piece)
                if piece.completion is not None:
                    fields |= {"finish_reason": piece.finish_reason}
                    fields |= training_fields(piece.completion)
                choice = self._choice(index, text, piece, offsets.get(index, 0))
                if choice["logprobs"]:
                    lengths = map(len, choice["logprobs"]["tokens"])
                    offsets[index] = offsets.get(index, 0) + sum(lengths)
                if piece.completion is not None:
                    whole = {**choice, **fields, "text": piece.completion.text}
                    self._record(self.prompts[number], whole, piece.completion)
                yield start | {"choices": [choice | fields]}
        if with_usage:
            yield start | {"choices": [], "usage": self._usage(sampled)}

    def _choice(
        self, index: int, text: str, sampled: Completion | Piece, offset: int = 0
    ) -> dict[str, Any]:
        logprobs = text_logprobs(self.engine, sampled, offset) if self.logprobs else None
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": None,
            **(token_fields(sampled.token_ids, sampled.logprobs) if self.tokens else {}),
        }

    def _record(
        self, prompt: tuple[int, ...], choice: dict[str, Any], completion: Completion
    ) -> None:
        """Keep a whole choice in its episode, its tokens too."""
        if self.episode is not None:
            tokens = token_fields(completion.token_ids, completion.logprobs)
            fields = {**choice, **tokens, "prompt_token_ids": list(prompt)}
            self.episode.record_text(self.engine.decode(prompt, special=True), fields)

    def _prompt_fields(self, prompt: tuple[int, ...]) -> dict[str, Any]:
        return {"prompt_token_ids": list(prompt)} if self.tokens else {}

    def _usage(self, sampled: int) -> dict[str, int]:
        return usage(sum(map(len, self.prompts)), sampled)
