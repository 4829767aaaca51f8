"""A deterministic engine for tests: no model, no torch, the whole protocol."""

from __future__ import annotations

import json
import math
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from gspo.core.errors import RequestError
from gspo.serve.chat import ChatFormat
from gspo.serve.engine import Completion, Piece, Request, check_fits

if TYPE_CHECKING:
    from gspo.weights.receipt import Probe, Receipts

END = 0


class FakeTokenizer:
    """Tokens are Unicode code points; 0 ends a completion.

    Writes a conversation as `<role>content`, with tools and calls in Hermes' form.
    """

    most_characters = 4096

    chat_template = '<tools> <tool_call>{"name": ..., "arguments": ...}</tool_call>'
    eos_token = chr(END)
    added_tokens_decoder: Mapping[int, Any] = {END: AddedToken(chr(END), special=True)}

    def apply_chat_template(self, conversation: Sequence[dict], /, **options: Any) -> str:
        tools = options.get("tools")
        text = f"<tools>{json.dumps(tools)}\n" if tools else ""
        for message in conversation:
            text += f"<{message['role']}>{message['content']}"
            for call in message.get("tool_calls", ()):
                text += f"<tool_call>{json.dumps(call['function'])}</tool_call>"
            # A turn of the model ends as it did when it was sampled: the next prompt extends it.
            text += chr(END) if message["role"] == "assistant" else "\n"
        if options.get("continue_final_message"):
            return text[:-1]
        return text + "<assistant>" * options.get("add_generation_prompt", False)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(chr(token) for token in token_ids if special or token != END)

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        return [chr(token).encode() for token in token_ids]


class FakeEngine:
    """Replies with texts that it is given or draws, see `FakeTokenizer`.

    What changes a distribution is noted in `altered_by`, and changes no reply.

    Args:
        reply: text of completion `index` of a prompt; default: random letters a to d, drawn from
            the request's seed (or a counter), the prompt and the index.
        logprob: log-prob that each token gets.

    >>> import asyncio
    >>> engine = FakeEngine(lambda prompt, index: prompt.upper())
    >>> asyncio.run(engine.complete(Request(tuple(engine.tokenizer.encode("hi")))))[0].text
    'HI'
    """

    context = 4096
    vocabulary = 0x110000
    traffic: tuple[int, int] = (0, 0)

    def __init__(
        self, reply: Callable[[str, int], str] | None = None, *, logprob: float = -math.log(4)
    ):
        self.reply = reply
        self.logprob = logprob
        self.policy_version = 0
        self.receipts: Receipts | None = None
        self.tokenizer = FakeTokenizer()
        self.chat = ChatFormat(self.tokenizer, "FakeEngine")
        self.requests: list[Request] = []

    def check(self, request: Request) -> None:
        check_fits(request, self.context, self.vocabulary)
        if request.params.min_tokens:
            message = "min_tokens: FakeEngine replies with the text that it was given"
            raise RequestError(message, param="min_tokens")
        if request.params.grammar and self.reply is None:
            message = "grammar: FakeEngine draws letters; give it a reply that keeps to the grammar"
            raise RequestError(message, param="response_format")
        if request.params.expert_choices:
            message = "return_routes: FakeEngine has no experts, so it returns no expert choices"
            raise RequestError(message, param="return_routes")

    def score(self, probe: Probe) -> list[float]:
        return [self.logprob] * (len(probe.tokens) - 1)

    def reseed(self, seed: int) -> None:
        """Nothing is drawn from an engine's seed here."""

    def close(self) -> None:
        """Nothing is held here, so nothing is let go of."""

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        for index, completion in enumerate(await self.complete(request)):
            for piece in completion.pieces(index):
                yield piece

    async def complete(self, request: Request) -> list[Completion]:
        self.check(request)
        count = len(self.requests)
        self.requests.append(request)
        prompt, seed = self.tokenizer.decode(request.prompt), request.params.seed
        texts = []
        for index in range(request.params.n):
            rng = random.Random(f"{count if seed is None else seed}/{prompt}/{index}")
            letters = "".join(rng.choice("abcd") for _ in range(rng.randint(1, 8)))
            texts.append(letters if self.reply is None else self.reply(prompt, index))
        return [self._completion(request, text) for text in texts]

    def _completion(self, request: Request, text: str) -> Completion:
        """The completion that says `text`, as far as the request lets it."""
        params = request.params
        ends = {END, *params.stop_token_ids}
        tokens = [*self.tokenizer.encode(text), END]
        first_end = next(i for i, token in enumerate(tokens) if token in ends)
        limit = check_fits(request, self.context, self.vocabulary)
        special = not params.skip_special_tokens
        tokens = tokens[: min(first_end + 1, limit)]
        out = self.tokenizer.decode(tokens, special=special)
        # A token is a character: where a stop text ends, and where it begins.
        stops = [(at + len(s), at) for s in params.stop if (at := out.find(s)) >= 0]
        size, cut = min(stops, default=(len(tokens), len(out)))
        tokens = tokens[:size]
        return Completion(
            token_ids=tuple(tokens),
            logprobs=(self.logprob,) * len(tokens),
            text=out[:cut],
            finish_reason="stop" if tokens[-1] in ends or stops else "length",
            policy_versions=(self.policy_version,) * len(tokens),
            temperature=params.temperature or 1.0,
            top_logprobs=tuple(((token, self.logprob),) for token in tokens)
            if params.top_logprobs
            else (),
            altered_by=params.altered_by,
        )
