"""`/v1/completions`: texts or token ids, continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gspo.serve.answers import Asked, text_logprobs, token_fields, training_fields
from gspo.serve.engine import Completion, Piece
from gspo.serve.streaming import GrowingText


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

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
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
