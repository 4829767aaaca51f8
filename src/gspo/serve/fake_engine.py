"""A deterministic engine for tests: no model, no torch, the whole protocol."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from gspo.core.errors import RequestError
from gspo.serve.engine import Completion, Request, SamplingParams, check_fits

END = 0


class FakeEngine:
    """Tokens are Unicode code points; 0 ends a completion.

    Args:
        reply: text of completion `index` of a prompt; default: random letters a to d, drawn from
            the request's seed (or a counter), the prompt and the index.
        logprob: log-prob that every token gets.

    >>> engine = FakeEngine(lambda prompt, index: prompt.upper())
    >>> engine.generate([Request(tuple(engine.encode("hi")))])[0][0].text
    'HI'
    """

    context = 4096
    vocabulary = 0x110000

    def __init__(
        self,
        reply: Callable[[str, int], str] | None = None,
        *,
        logprob: float = -math.log(4),
    ):
        self.reply = reply
        self.logprob = logprob
        self.policy_version = 0
        self.requests: list[Request] = []

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(self, messages: Sequence[dict]) -> list[int]:
        # A turn of the model ends as it did when it was sampled: the next prompt extends it.
        parts = [
            f"<{m['role']}>{m.get('content') or ''}"
            + (chr(END) if m["role"] == "assistant" else "\n")
            for m in messages
        ]
        return self.encode("".join(parts) + "<assistant>")

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(chr(token) for token in token_ids if special or token != END)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        return [chr(token).encode() for token in token_ids]

    def check_params(self, params: SamplingParams) -> None:
        if params.min_tokens:
            message = "min_tokens: FakeEngine replies with the text that it was given"
            raise RequestError(message, param="min_tokens")

    def check_expert_choices(self) -> None:
        message = "return_routes: FakeEngine has no experts, so it returns no expert choices"
        raise RequestError(message, param="return_routes")

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> list[Completion]:
        limit = check_fits(request, self.context, self.vocabulary)
        self.check_params(request.params)
        if request.params.expert_choices:
            self.check_expert_choices()
        count = len(self.requests)
        self.requests.append(request)
        prompt = self.decode(request.prompt)
        seed = count if request.params.seed is None else request.params.seed
        return [self._one(request, prompt, i, seed, limit) for i in range(request.params.n)]

    def _one(self, request: Request, prompt: str, index: int, seed: int, limit: int) -> Completion:
        if self.reply is not None:
            text = self.reply(prompt, index)
        else:
            rng = random.Random(f"{seed}/{prompt}/{index}")
            text = "".join(rng.choice("abcd") for _ in range(rng.randint(1, 8)))
        special = not request.params.skip_special_tokens
        ends = {END, *request.params.stop_token_ids}
        cuts = [at for at in (text.find(stop) for stop in request.params.stop) if at >= 0]
        tokens = [*self.encode(text), END]
        first = next(i for i, token in enumerate(tokens) if token in ends)
        tokens = tokens[: min(first + 1, limit)]
        out = self.decode(tokens, special=special)
        return Completion(
            token_ids=tuple(tokens),
            logprobs=(self.logprob,) * len(tokens),
            text=out[: min(cuts)] if cuts else out,
            finish_reason="stop" if tokens[-1] in ends or cuts else "length",
            policy_version=self.policy_version,
            temperature=request.params.temperature or 1.0,
        )
