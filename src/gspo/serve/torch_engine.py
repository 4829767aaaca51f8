"""The embedded engine: samples from the trainer's own weights, in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from gspo.core.compute import ComputeThread
from gspo.core.draws import seed_of
from gspo.core.errors import GspoError, RequestError
from gspo.core.timing import span
from gspo.kernels.attention import PACKED
from gspo.kernels.hf import attention_implementation
from gspo.kernels.kv_cache import Layout
from gspo.policy.policy import WITH_GSPO_ATTENTION, Policy
from gspo.serve.admission import Group, Line
from gspo.serve.batch import Batch
from gspo.serve.decoding import OpenCompletion
from gspo.serve.engine import Completion, Piece, Request, check_fits
from gspo.serve.grammar import Grammars
from gspo.serve.scheduler import Scheduler
from gspo.serve.tokens import ModelTokenizer, chat_format, end_tokens, ends_of
from gspo.weights.receipt import Probe, Receipts, score

_REMEMBERED = 2**20
"""Unseeded requests whose repetitions are counted, about 100 bytes each."""


class TorchEngine:
    """Batched decoding of a `Policy`, which its `Scheduler` shares with whoever trains it.

    What a request without a seed gets depends on the engine's own `seed`, on what the request is
    for, on its prompt, and on how often the same was asked since `reseed`; not on other requests.

    Args:
        policy: the weights, as they are at each step.
        compute: the thread that samples; None: one of its own.
        seed: of requests that have none.
        max_running: completions that run at once.
        sockets: whether requests come through sockets too, see `Scheduler`.
    """

    def __init__(
        self,
        policy: Policy,
        compute: ComputeThread | None = None,
        *,
        seed: int = 0,
        max_running: int = 512,
        sockets: bool = False,
    ):
        self.policy = policy
        self.receipts: Receipts | None = None
        self.max_running = max_running
        packed = attention_implementation(policy.lm) == PACKED
        self.layout: Layout = (
            "shared" if packed and policy.packing in WITH_GSPO_ATTENTION else "model_cache"
        )
        """How keys and values are kept; `check_engine` goes on to the next if one isn't exact."""
        self.tokenizer = ModelTokenizer(policy.tokenizer, policy.context)
        self._seed = seed
        self._drawn: Counter[int] = Counter()
        self._ends = end_tokens(policy)
        ends = self._ends.nonzero().flatten().tolist()
        self.chat = chat_format(policy, self.tokenizer, ends)
        self._grammars = Grammars(policy.tokenizer, policy.head.size, ends)
        self._scheduler = Scheduler(self, compute or ComputeThread(), sockets=sockets)

    @property
    def policy_version(self) -> int:
        return self.policy.version if self.receipts is None else self.receipts.version

    def score(self, probe: Probe) -> list[float]:
        return score(self.policy, probe).tolist()

    @property
    def traffic(self) -> tuple[int, int]:
        return self._scheduler.traffic

    def check(self, request: Request) -> None:
        self._prepare(request)

    def _prepare(self, request: Request) -> tuple[int, frozenset[int]]:
        """Return how many tokens each completion may have, and the tokens that end one.

        Raises:
            RequestError: see `Engine.check`.
        """
        limit = check_fits(request, self.policy.context, self.policy.head.size)
        if request.params.expert_choices:
            try:
                self.policy.routers.require("return_routes")
            except GspoError as error:
                raise RequestError(str(error), param="return_routes") from None
        if request.params.grammar:
            self._grammars.start(request.params.grammar)
        return limit, ends_of(request.params, self.policy.tokenizer, self.policy.head.size)

    def reseed(self, seed: int) -> None:
        self._seed = seed
        self._drawn.clear()

    async def complete(self, request: Request) -> list[Completion]:
        self.check(request)
        return await self._scheduler.complete(request)

    def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        self.check(request)
        return self._scheduler.stream(request)

    def close(self) -> None:
        self._scheduler.close()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """For each request its n completions, sampled in the calling thread with nobody beside."""
        groups = [Group(self.opened(request)) for request in requests]
        line, batch = self.line(), self.batch()
        for group in groups:
            line.add(group)
        with self.computing():
            while line or batch.busy:
                batch.step(line.take(batch.busy))
        return [[*map(self.whole, group.completions)] for group in groups]

    def line(self) -> Line:
        """Make the line in which completions wait."""
        return Line(self.policy, self.layout, self.max_running)

    def batch(self) -> Batch:
        """Make what decodes completions together."""
        return Batch(self.policy, self.layout, self._ends, self.tokenizer.decode)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What steps of a `Batch` run in; the weights must stay the same inside.

        Raises:
            ServeError: they have no receipt.
        """
        if self.receipts is not None:
            self.receipts.require(self.policy.version, self)
        self.policy.lm.eval()
        self.policy.use_threads()
        with span("sampling"), torch.inference_mode():
            yield

    def opened(self, request: Request) -> list[OpenCompletion]:
        """The completions of a request, before their first token.

        Raises:
            RequestError: see `Engine.check`.
        """
        limit, ends = self._prepare(request)
        opened = [OpenCompletion(request, limit, key, ends) for key in self._keys(request)]
        if request.params.grammar:
            for completion in opened:
                completion.matcher = self._grammars.start(request.params.grammar)
        return opened

    def _keys(self, request: Request) -> list[tuple[int, int]]:
        """Return the keys of the random numbers of the request's completions."""
        params = request.params
        if params.seed is not None:
            return [(params.seed, index) for index in range(params.n)]
        if len(self._drawn) >= _REMEMBERED:  # a server, which nobody reseeds
            self.reseed(seed_of(self._seed, "next"))
        seed = seed_of(self._seed, *params.purpose, "prompt", *request.prompt)
        first = self._drawn[seed]
        self._drawn[seed] += params.n
        # Seeded and unseeded draws never meet: their second words differ in sign.
        return [(seed, -1 - index) for index in range(first, first + params.n)]

    def whole(self, completion: OpenCompletion) -> Completion:
        """What became of a completion that has ended."""
        assert completion.finish is not None
        params, tokens, text = completion.params, completion.tokens, completion.text
        if text is None:
            # The text is without a token of the request that ended it.
            ended = tokens[-1] in completion.ends
            text = self.tokenizer.decode(
                tokens[:-1] if ended else tokens, special=not params.skip_special_tokens
            )
        return Completion(
            token_ids=tokens,
            logprobs=completion.logprobs,
            text=text,
            finish_reason=completion.finish,
            policy_versions=completion.versions,
            temperature=params.temperature or 1.0,
            expert_choices=np.concatenate(completion.expert_choices)
            if completion.expert_choices
            else None,
            top_logprobs=tuple(completion.top_logprobs),
            altered_by=params.altered_by,
        )
