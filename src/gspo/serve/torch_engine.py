"""The embedded engine: samples from the trainer's own weights, in this process.

Prompts are computed once each. Completions are decoded together; a finished one leaves, and one
that waits takes its place.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.draws import seed_of
from gspo.core.errors import GspoError, RequestError
from gspo.core.timing import timed
from gspo.kernels.attention import PACKED
from gspo.kernels.hf import attention_implementation
from gspo.kernels.kv_cache import (
    Layout,
    ModelCache,
    SharedPrompts,
    kv_bytes,
    padded,
    prefill,
)
from gspo.kernels.logprob import full_logits
from gspo.policy.policy import WITH_GSPO_ATTENTION, Policy
from gspo.serve.decoding import OpenCompletion, Running, record_expert_choices
from gspo.serve.engine import Completion, Request, check_fits
from gspo.serve.tokens import end_tokens, ends_of, token_bytes
from gspo.weights.receipt import Probe, Receipts, score

KV_BYTES = 2 * 2**30
"""Memory that keys and values may take; completions beyond it wait for their turn."""
_PLANNED = 1024  # a completion counts as no longer than this when memory is planned
_REMEMBERED = 2**20
"""Unseeded requests whose repetitions are counted, about 100 bytes each."""
_DEAD = 8  # finished completions are dropped if they are 1 of 8: dropping copies the others


class TorchEngine:
    """Batched decoding of a `Policy`.

    What a request without a seed gets depends on the engine's own `seed`, on what the request is
    for, on its prompt, and on how often the same was asked since `reseed`; not on other requests.
    """

    def __init__(self, policy: Policy, *, seed: int = 0, max_running: int = 512):
        self.policy = policy
        self.receipts: Receipts | None = None
        self.max_running = max_running
        packed = attention_implementation(policy.lm) == PACKED
        self.layout: Layout = (
            "shared" if packed and policy.packing in WITH_GSPO_ATTENTION else "model_cache"
        )
        """How keys and values are kept; `check_engine` goes on to the next if one isn't exact."""
        self._seed = seed
        self._drawn: Counter[int] = Counter()
        self._ends = end_tokens(policy)

    @property
    def policy_version(self) -> int:
        return self.policy.version if self.receipts is None else self.receipts.version

    def score(self, probe: Probe) -> list[float]:
        return score(self.policy, probe).tolist()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.policy.tokenizer(text, add_special_tokens=special)["input_ids"]

    def encode_chat(self, messages: Sequence[dict]) -> list[int]:
        tokenizer = self.policy.tokenizer
        if tokenizer.chat_template is None:
            raise RequestError(
                f"{self.policy.source} has no chat template: use the completions route",
                param="messages",
            )
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise whatever their author wrote
            raise RequestError(f"the chat template refuses: {error}", param="messages") from None
        return self.encode(str(text))

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        ids = list(token_ids)
        return str(self.policy.tokenizer.decode(ids, skip_special_tokens=not special))

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        return token_bytes(self.policy.tokenizer, token_ids)

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
        return limit, ends_of(request.params, self.policy.tokenizer, self.policy.head.size)

    def reseed(self, seed: int) -> None:
        self._seed = seed
        self._drawn.clear()

    @timed("sampling")
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        if self.receipts is not None:
            self.receipts.require(self.policy.version, self)
        opened: list[list[OpenCompletion]] = []
        for request in requests:
            limit, ends = self._prepare(request)
            keys = self._keys(request)
            opened.append([OpenCompletion(request, limit, key, ends) for key in keys])
        self.policy.lm.eval()
        with torch.no_grad(), self.policy.autocast():
            self._decode([completion for group in opened for completion in group])
        return [[self._closed(completion) for completion in group] for group in opened]

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

    def _decode(self, completions: Sequence[OpenCompletion]) -> None:
        """Sample `completions` to their ends."""
        waiting = deque(completions)
        while waiting:
            new = self._admitted(waiting, [])
            kv, logits = self._start(new)
            running = Running(new, self._ends, self.decode)
            while True:
                tokens = running.sample(logits)
                if not running.alive:
                    break
                dead = len(running.completions) - running.alive
                new = self._admitted(waiting, running.completions) if dead else []
                if new or dead * _DEAD > len(running.completions):
                    stay = running.keep()
                    kv.keep(stay)
                    tokens = tokens[torch.from_numpy(stay).to(tokens.device)]
                places = (slice(i, i + 1) for i in range(len(running.completions)))
                with record_expert_choices(self.policy, running.completions, places):
                    logits = full_logits(kv.advance(tokens), self.policy.head)
                if new:
                    joining, first = self._start(new)
                    assert isinstance(kv, SharedPrompts) and isinstance(joining, SharedPrompts)
                    kv.join(joining)
                    running.add(new)
                    logits = torch.cat([logits, first])

    def _admitted(
        self, waiting: deque[OpenCompletion], running: Sequence[OpenCompletion]
    ) -> list[OpenCompletion]:
        """Take the completions whose turn it is from `waiting`: all that `max_running` and
        `KV_BYTES` allow beside those that run. A few wait for more: their prompts cost a pass.

        Only the layout "shared" lets completions join while others run.
        """
        shared = self.layout == "shared"
        if not waiting or (running and not shared):
            return []
        token = kv_bytes(1, 1, self.policy.lm.config.get_text_config())
        busy = [completion for completion in running if completion.finish is None]
        prompts = {completion.request.prompt for completion in busy}
        limit = max((min(completion.limit, _PLANNED) for completion in busy), default=0)
        width = max((len(prompt) for prompt in prompts), default=0)
        new: list[OpenCompletion] = []
        first = len(waiting[0].request.prompt)
        for completion in waiting:
            prompt = completion.request.prompt
            prompts.add(prompt)
            limit, width = max(limit, min(completion.limit, _PLANNED)), max(width, len(prompt))
            size = len(busy) + len(new) + 1
            copies = len(prompts) if shared else size
            planned = token * (size * limit + copies * width)
            if size > 1 and (size > self.max_running or planned > KV_BYTES):
                break
            if self.layout == "equal_lengths" and new and len(prompt) != first:
                break
            new.append(completion)
        if busy and len(new) < min(len(waiting), self.max_running // 16):
            return []
        for _ in new:
            waiting.popleft()
        return new

    def _start(
        self, new: Sequence[OpenCompletion]
    ) -> tuple[SharedPrompts | ModelCache, Float[Tensor, "R V"]]:
        """Compute each distinct prompt once; returns keys, and logits of the first tokens."""
        prompts: dict[tuple[int, ...], int] = {}
        owner = [prompts.setdefault(completion.request.prompt, len(prompts)) for completion in new]
        tokens, real = padded(list(prompts))
        longest = max(completion.limit for completion in new)
        ends = [(prompt + 1) * tokens.shape[1] for prompt in owner]  # padded on the left
        lengths = (len(completion.request.prompt) for completion in new)
        places = (slice(end - length, end) for end, length in zip(ends, lengths, strict=True))
        with record_expert_choices(self.policy, new, places):
            kv, hidden = prefill(
                self.policy.backbone,
                tokens,
                real,
                np.array(owner),
                longest,
                layout=self.layout,
                device=self.policy.device,
            )
        logits = full_logits(hidden, self.policy.head)
        return kv, logits[torch.tensor(owner, device=logits.device)]

    def _closed(self, completion: OpenCompletion) -> Completion:
        assert completion.finish is not None
        params, tokens, text = completion.params, completion.tokens, completion.text
        if text is None:
            # The text is without a token of the request that ended it.
            ended = tokens[-1] in completion.ends
            text = self.decode(
                tokens[:-1] if ended else tokens, special=not params.skip_special_tokens
            )
        return Completion(
            token_ids=tokens,
            logprobs=completion.logprobs,
            text=text,
            finish_reason=completion.finish,
            policy_version=self.policy_version,
            temperature=params.temperature or 1.0,
            expert_choices=np.concatenate(completion.expert_choices)
            if completion.expert_choices
            else None,
        )
