"""What an engine is: token ids in, sampled token ids with their log-probs out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from gspo.core.errors import RequestError, shown
from gspo.serve.params import SamplingParams

if TYPE_CHECKING:  # `import gspo` is light
    from gspo.serve.chat import ChatFormat
    from gspo.weights.receipt import Probe, Receipts

FinishReason = Literal["stop", "length"]
TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]
"""Token ids with their log-probs, likeliest first."""


@dataclass(frozen=True)
class Request:
    """What is asked of an engine.

    Attributes:
        prompt: P >= 1 token ids.
        params: how it is continued.

    >>> Request((5, 6), SamplingParams(n=2)).params.n
    2
    """

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of L tokens.

    Attributes:
        token_ids: all sampled tokens, the end token included.
        logprobs: float32 log-prob of each one under softmax(logits / `temperature`), not
            renormalised by top_p: what the trainer's ratio needs.
        text: decoded, without special tokens and without the stop text.
        finish_reason: `stop` at an end token or stop text, `length` at max_tokens or the context.
        policy_versions: version of the weights that sampled each token. They differ if weights were
            published in between.
        temperature: of `logprobs`: the request's, or 1 for greedy decoding.
        expert_choices: if asked for, [R, N, K] experts of the prompt's and the completion's tokens
            but the last, which was never fed; R = prompt + L - 1. One byte per expert up to 256.
        top_logprobs: if asked for, (token id, log-prob) of the likeliest tokens at each token's
            place, likeliest first, under the distribution of `logprobs`.
        altered_by: names of the parameters because of which the tokens were drawn from another
            distribution than that of `logprobs`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_versions: tuple[int, ...]
    temperature: float
    expert_choices: np.ndarray | None = field(default=None, compare=False)
    top_logprobs: tuple[TopLogprobs, ...] = ()
    altered_by: tuple[str, ...] = ()

    def pieces(self, index: int, size: int = 1) -> list[Piece]:
        """Cut completion `index` of a request into pieces of `size` tokens."""
        parts = [slice(start, start + size) for start in range(0, len(self.token_ids), size)]
        pieces = [
            Piece(index, self.token_ids[part], self.logprobs[part], self.top_logprobs[part])
            for part in parts
        ]
        return [*pieces[:-1], replace(pieces[-1], completion=self)]


@dataclass(frozen=True)
class Piece:
    """What one decode step added to one of a request's completions.

    Attributes:
        index: number of the completion, 0 to n - 1.
        token_ids, logprobs, top_logprobs: of its new tokens, as in `Completion`.
        completion: with its last piece: the whole of it.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()
    completion: Completion | None = None


class TokenizerView(Protocol):
    """What a server asks of an engine's tokenizer.

    Attributes:
        most_characters: a text of more characters has more tokens than the model's context.
    """

    most_characters: int

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around one (a BOS)."""
        ...

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; with `special`, special tokens too."""
        ...

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token; a token may be a part of a character."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Samples completions. Engines know nothing of HTTP or training.

    Nobody looks behind this protocol: new weights reach an engine through its `Publisher` only
    (`gspo.weights.publisher`), and each publication is proved (`gspo.weights.receipt`).

    Attributes:
        chat: how its conversations are written (`gspo.serve.verbatim.chat_tokens`), and its answers
            read.
        tokenizer: between texts and token ids.
        receipts: `complete` and `stream` ask `receipts.require` first, so that nothing is sampled
            with weights that were not proved. None: the weights never change.
    """

    chat: ChatFormat
    receipts: Receipts | None

    @property
    def tokenizer(self) -> TokenizerView: ...

    @property
    def traffic(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        ...

    @property
    def policy_version(self) -> int:
        """Version of the weights that it samples with."""
        ...

    def score(self, probe: Probe) -> list[float]:
        """Log-probs of the probe's tokens but the first, by the weights that it samples with."""
        ...

    def check(self, request: Request) -> None:
        """Refuse a request that this engine cannot sample, before it joins others.

        Raises:
            RequestError: see `check_fits`; stop texts or tokens that the engine cannot see; or
                `SamplingParams.expert_choices`, if it has none to return.
        """
        ...

    async def complete(self, request: Request) -> list[Completion]:
        """Sample the request's n completions. To cancel it, cancel the task that awaits it.

        Requests may come from several event loops. Those that arrive together are decoded together.

        Raises:
            RequestError: see `check`.
            BusyError: too many requests wait.
            ServeError: the engine failed, is stuck or closed.
        """
        ...

    def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Sample as `complete` does, and hand over each step's tokens. To cancel it, close it.

        Raises:
            ServeError: as of `complete`, at the first or a later piece.
        """
        ...

    def reseed(self, seed: int) -> None:
        """Start the draws of requests without a seed again, from `seed`."""
        ...

    def close(self) -> None:
        """Refuse new requests, and fail those that are not answered."""
        ...


def check_fits(request: Request, context: int, vocabulary: int) -> int:
    """Return how many tokens each completion of the request may have.

    Raises:
        RequestError: an empty prompt, one that leaves no room in the context, or an id that is no
            token of the model, in the prompt or in logit_bias.
    """
    length = len(request.prompt)
    if length == 0:
        raise RequestError("the prompt is empty: it needs at least one token", param="prompt")
    ends = (min(request.prompt), max(request.prompt))
    named = [("prompt", "the prompt has", token) for token in ends]
    named += [("logit_bias", "logit_bias names", token) for token, _ in request.params.logit_bias]
    for param, told, token in named:
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"{told} the token id {shown(token)}, but the model's vocabulary is "
                f"0..{vocabulary - 1}",
                param,
            )
    room = context - length
    wanted = request.params.max_tokens
    if room < 1 or (wanted is not None and wanted > room):
        raise RequestError(
            f"the prompt has {length} tokens and max_tokens is {wanted}, "
            f"but the model's context is {context}",
            param="max_tokens",
        )
    if request.params.min_tokens > (wanted or room):
        raise RequestError(
            f"min_tokens is {request.params.min_tokens}, but at most {wanted or room} tokens fit",
            param="min_tokens",
        )
    return room if wanted is None else wanted
