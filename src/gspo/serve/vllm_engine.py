"""An engine whose completions vLLM servers sample; see `gspo.weights.vllm_publisher`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from gspo.core.draws import seed_of
from gspo.core.errors import RequestError
from gspo.policy.policy import Policy
from gspo.serve.engine import Completion, Piece, Request, TopLogprobs, check_fits
from gspo.serve.tokens import ModelTokenizer, chat_format, end_tokens, ends_of
from gspo.weights.receipt import Probe, Receipts
from gspo.weights.vllm_publisher import VllmServers

_PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
"""Else vLLM takes what the model's generation_config.json says; the ends are told in each request.
"""


class VllmEngine:
    """Token ids in and out of vLLM servers, which each publication proves one by one.

    `receipts` tells of that proof. A request is not refused while a publication goes on: it waits
    for a server that has its receipt, and is sent to no other.

    What a request without a seed gets depends on the engine's seed, the request's purpose, its
    prompt, and how often that was asked since `reseed`; and, in the last digits, on what vLLM
    computes beside it.

    Args:
        policy: the trainer's, for its tokenizer and sizes.
        servers: what samples. The engine closes them.
        seed: of requests that have none.
    """

    def __init__(self, policy: Policy, servers: VllmServers, *, seed: int = 0):
        self.tokenizer = ModelTokenizer(policy.tokenizer, policy.context)
        self._ends = end_tokens(policy).nonzero().flatten().tolist()
        self.chat = chat_format(policy, self.tokenizer, self._ends)
        self.receipts: Receipts | None = None
        self._policy = policy
        self._size = policy.entries or policy.head.size
        self._servers, self._seed = servers, seed
        self._drawn: Counter[int] = Counter()

    @property
    def policy_version(self) -> int:
        return -1 if self.receipts is None else self.receipts.version

    @property
    def traffic(self) -> tuple[int, int]:
        return sum(server.running for server in self._servers.servers), self._servers.waiting

    def score(self, probe: Probe) -> list[float]:
        """Those of the server that is farthest from the trainer, as the publication asked it."""
        return self._servers.farthest.scores

    def check(self, request: Request) -> None:
        self._params(request)

    def reseed(self, seed: int) -> None:
        self._seed = seed
        self._drawn.clear()

    def close(self) -> None:
        self._servers.close()

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """All of a completion's tokens come at once, when it has ended."""
        for index, completion in enumerate(await self.complete(request)):
            for piece in completion.pieces(index, len(completion.token_ids)):
                yield piece

    async def complete(self, request: Request) -> list[Completion]:
        params = self._params(request)

        def read(answer: Any, version: int) -> list[Completion]:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(params["n"])):
                raise ValueError(f"{len(choices)} completions of {params['n']}")
            return [self._completion(choice, request, params, version) for choice in choices]

        seeded = {**params, "seed": self._key(request)}
        sampled = self._servers.ask(self._servers.sample(list(request.prompt), seeded, read))
        return await asyncio.wrap_future(sampled) * (request.params.n // params["n"])

    def _params(self, request: Request) -> dict[str, Any]:
        """The request in vLLM's words, but for its seed.

        Raises:
            RequestError: see `Engine.check`; or what changes the distribution, since vLLM's
                log-probs would be those of the changed one.
        """
        limit = check_fits(request, self._policy.context, self._size)
        params = request.params
        altering = {*params.altered_by} - {"temperature"}
        for name in (*sorted(altering), *["return_routes"] * params.expert_choices):
            raise RequestError(
                f"{name}: vLLM returns log-probs of the distribution that this changes, and no "
                "expert choices: leave it out, or sample in this process (no engines=)",
                param=name,
            )
        if params.temperature and not 0.01 <= params.temperature <= 2:  # it raises what is lower
            told = f"temperature = {params.temperature:g}: vLLM samples at 0, and at 0.01 to 2"
            raise RequestError(told, param="temperature")
        ends = ends_of(params, self._policy.tokenizer, self._size)
        return _PLAIN | {
            "n": params.n if params.temperature else 1,  # else vLLM refuses: all are the same
            "max_tokens": limit,
            "temperature": params.temperature,
            "logprobs": params.top_logprobs,
            "stop_token_ids": sorted(ends if params.ignore_eos else ends.union(self._ends)),
            "stop": list(params.stop),
            "skip_special_tokens": params.skip_special_tokens,
        }

    def _key(self, request: Request) -> int:
        """The seed that vLLM gets: completion i draws with this + i."""
        params = request.params
        if params.seed is not None:
            return seed_of("seeded", params.seed) >> 1
        asked = seed_of(self._seed, *params.purpose, "prompt", *request.prompt)
        self._drawn[asked] += params.n
        return seed_of(asked, self._drawn[asked]) >> 1

    def _completion(
        self, choice: dict[str, Any], request: Request, asked: dict[str, Any], version: int
    ) -> Completion:
        """What vLLM says of one completion that it was `asked` for.

        Raises:
            KeyError, TypeError, ValueError: it says something else.
        """
        params, content = request.params, choice["logprobs"]["content"]
        tokens = tuple(int(token) for token in choice["token_ids"])
        logprobs = tuple(float(entry["logprob"]) for entry in content)
        known = all(0 <= token < self._size for token in tokens)
        named = [entry["token_id"] for entry in content] == list(tokens)
        numbers = all(-9999 < p < 1e-3 for p in logprobs)  # which vLLM says in place of a NaN
        reason, stop = choice["finish_reason"], choice["stop_reason"]
        ended = tokens[-1:] if tokens and tokens[-1] in asked["stop_token_ids"] else ()
        stopped = bool(ended) or isinstance(stop, str)
        whole = stopped if reason == "stop" else len(tokens) == asked["max_tokens"]
        if not (tokens and known and named and numbers and whole):
            raise ValueError(f"{reason!r}: tokens {tokens[:8]}... with log-probs {logprobs[:8]}...")
        special = not params.skip_special_tokens
        text = self.tokenizer.decode(tokens[: len(tokens) - len(ended)], special=special)
        if isinstance(stop, str):
            text = text.split(stop)[0]
        tops: list[TopLogprobs] = []
        for entry in content if params.top_logprobs else ():
            pairs = ((top["token_id"], top["logprob"]) for top in entry["top_logprobs"])
            ranked = sorted(pairs, key=lambda pair: -pair[1])
            tops.append(tuple(ranked[: params.top_logprobs]))
        return Completion(
            token_ids=tokens,
            logprobs=logprobs,
            text=text,
            finish_reason=reason,
            policy_versions=(version,) * len(tokens),
            temperature=params.temperature or 1.0,
            top_logprobs=tuple(tops),
            altered_by=params.altered_by,
        )
