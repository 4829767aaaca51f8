"""The embedded engine: samples from the trainer's own weights, in this process.

Prompts are computed once each. Rows are decoded together; a finished one leaves, and one that
waits takes its place.
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
from gspo.policy.policy import OWN, Policy
from gspo.serve.decoding import Row, Running
from gspo.serve.ends import end_tokens, ends_of
from gspo.serve.engine import Completion, Request, SamplingParams, check_fits
from gspo.serve.route_watch import RouteWatch
from gspo.serve.token_bytes import token_bytes

KV_BYTES = 2 * 2**30
"""Memory that keys and values may take; rows beyond it wait for their turn."""
_PLANNED = 1024  # a completion counts as no longer than this when memory is planned
_REMEMBERED = 2**20
"""Unseeded requests whose repetitions are counted, about 100 bytes each."""
_DEAD = 8  # finished rows are dropped once they are one in so many: dropping copies the others


class TorchEngine:
    """Batched decoding of a `Policy`.

    What a request without a seed gets depends on the engine's own `seed`, on what the request is
    for, on its prompt, and on how often the same was asked since `reseed`; not on other requests.
    """

    def __init__(self, policy: Policy, *, seed: int = 0, max_rows: int = 512):
        self.policy = policy
        self.max_rows = max_rows
        own = attention_implementation(policy.lm) == PACKED
        self.layout: Layout = "shared" if own and policy.packing in OWN else "model_cache"
        """How running rows are kept; `check_engine` goes on to the next where one isn't exact."""
        self._seed = seed
        self._drawn: Counter[int] = Counter()
        self._ends = end_tokens(policy)

    @property
    def shared(self) -> bool:
        """One copy of each prompt's keys, and rows that may join while others run."""
        return self.layout == "shared"

    @property
    def context(self) -> int:
        return self.policy.context

    @property
    def vocabulary(self) -> int:
        return self.policy.head.size

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

    def token_text(self, token_id: int) -> str:
        return str(self.policy.tokenizer.decode([token_id], skip_special_tokens=False))

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        return token_bytes(self.policy.tokenizer, token_ids)

    def check_params(self, params: SamplingParams) -> None:
        ends_of(params, self.policy.tokenizer, self.policy.head.size)

    def check_routes(self) -> None:
        try:
            self.policy.routing.require("return_routes")
        except GspoError as error:
            raise RequestError(str(error), param="return_routes") from None

    def reseed(self, seed: int) -> None:
        """From now on, draw for unseeded requests as an engine does that starts with this seed."""
        self._seed = seed
        self._drawn.clear()

    @timed("sampling")
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        rows = []
        for r, request in enumerate(requests):
            limit = check_fits(request, self.context, self.vocabulary)
            if request.params.routes:
                self.check_routes()
            ends = ends_of(request.params, self.policy.tokenizer, self.policy.head.size)
            keys = self._keys(request)
            rows += [Row(r, request.params, limit, key, ends) for key in keys]
        self.policy.lm.eval()
        with torch.no_grad(), self.policy.autocast():
            self._decode(requests, rows)
        out: list[list[Completion]] = [[] for _ in requests]
        for row in rows:
            out[row.request].append(self._completion(row))
        return out

    def _keys(self, request: Request) -> list[tuple[int, int]]:
        """Of the random numbers of each of the request's completions."""
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

    def _decode(self, requests: Sequence[Request], rows: Sequence[Row]) -> None:
        """Fill in `rows`."""
        watch = RouteWatch(self.policy, rows)
        waiting = deque(rows)
        while waiting:
            lot = self._admitted(requests, waiting, [])
            kv, logits = self._start(requests, lot, watch)
            running = Running(lot, self._ends, self.decode)
            while True:
                tokens = running.sample(logits)
                if not running.alive:
                    break
                dead = len(running.rows) - running.alive
                lot = self._admitted(requests, waiting, running.rows) if dead else []
                if lot or dead * _DEAD > len(running.rows):
                    kept = running.keep()
                    kv.keep(kept)
                    tokens = tokens[torch.from_numpy(kept).to(tokens.device)]
                with watch.decoding(running.rows):
                    logits = full_logits(kv.advance(tokens), self.policy.head)
                if lot:
                    more, first = self._start(requests, lot, watch)
                    assert isinstance(kv, SharedPrompts) and isinstance(more, SharedPrompts)
                    kv.join(more)
                    running.add(lot)
                    logits = torch.cat([logits, first])

    def _admitted(
        self, requests: Sequence[Request], waiting: deque[Row], running: Sequence[Row]
    ) -> list[Row]:
        """Waiting rows whose turn it is, taken from `waiting`: all that `max_rows` and `KV_BYTES`
        allow beside those that run. A few alone wait for more, since their prompts cost a pass."""
        if not waiting or (running and not self.shared):
            return []
        token = kv_bytes(1, 1, self.policy.lm.config.get_text_config())
        busy = [row for row in running if row.finish is None]
        prompts = {requests[row.request].prompt for row in busy}
        limit = max((min(row.limit, _PLANNED) for row in busy), default=0)
        width = max((len(prompt) for prompt in prompts), default=0)
        lot: list[Row] = []
        first = len(requests[waiting[0].request].prompt)
        for row in waiting:
            prompt = requests[row.request].prompt
            prompts.add(prompt)
            limit, width = max(limit, min(row.limit, _PLANNED)), max(width, len(prompt))
            size = len(busy) + len(lot) + 1
            copies = len(prompts) if self.shared else size
            planned = token * (size * limit + copies * width)
            if size > 1 and (size > self.max_rows or planned > KV_BYTES):
                break
            if self.layout == "equal_lengths" and lot and len(prompt) != first:
                break
            lot.append(row)
        if busy and len(lot) < min(len(waiting), self.max_rows // 16):
            return []
        for _ in lot:
            waiting.popleft()
        return lot

    def _start(
        self, requests: Sequence[Request], rows: Sequence[Row], watch: RouteWatch
    ) -> tuple[SharedPrompts | ModelCache, Float[Tensor, "R V"]]:
        """Compute each distinct prompt once; the logits of every row's first token."""
        number: dict[tuple[int, ...], int] = {}
        owner = [number.setdefault(requests[row.request].prompt, len(number)) for row in rows]
        tokens, real = padded(list(number))
        longest = max(row.limit for row in rows)
        with watch.prefill(rows, owner, real):
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

    def _completion(self, row: Row) -> Completion:
        assert row.finish is not None
        return Completion(
            token_ids=row.tokens,
            logprobs=row.logprobs,
            text=self._text(row) if row.text is None else row.text,
            finish_reason=row.finish,
            policy_version=self.policy.version,
            temperature=row.params.temperature or 1.0,
            routes=np.concatenate(row.routes) if row.routes else None,
        )

    def _text(self, row: Row) -> str:
        """What the row sampled, without the token of the request that ended it."""
        tokens = row.tokens[:-1] if row.tokens[-1] in row.ends else row.tokens
        return self.decode(tokens, special=not row.params.skip_special_tokens)
