"""The embedded engine: samples from the trainer's own weights, in this process.

Prompts are computed once each and left-padded to one length, so that all rows of a batch write
the same cache position. A finished row leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.errors import GspoError, RequestError
from gspo.policy.load import Policy, autocast
from gspo.policy.logprob import full_logits
from gspo.serve.cache import SlabCache, slab_bytes
from gspo.serve.engine import Completion, FinishReason, Request, SamplingParams, check_fits
from gspo.serve.route_watch import RouteWatch
from gspo.serve.sampling import RowRandom, sample
from gspo.timing import timed

KV_BYTES = 2 * 2**30
"""Memory that one batch's KV cache may take; more rows than fit are decoded in turns."""
_PLANNED = 1024  # a completion counts as no longer than this when memory is planned
_FIRST_SLAB = 256


@dataclass
class _Row:
    """One completion in the making."""

    request: int
    index: int
    params: SamplingParams
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None
    text: str | None = None
    routes: list[np.ndarray] = field(default_factory=list)


class TorchEngine:
    """Batched decoding of a `Policy`. Unseeded requests follow the engine's own `seed`."""

    def __init__(self, policy: Policy, *, seed: int = 0, max_rows: int = 512):
        self.policy = policy
        self.max_rows = max_rows
        self._seed = seed
        self._served = 0
        self._end_tokens = _end_tokens(policy)

    @property
    def context(self) -> int:
        return self.policy.context

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

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.policy.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        return str(self.policy.tokenizer.decode([token_id], skip_special_tokens=False))

    def check_routes(self) -> None:
        try:
            self.policy.routing.require("return_routes")
        except GspoError as error:
            raise RequestError(str(error), param="return_routes") from None

    def reseed(self, seed: int) -> None:
        """Start the stream of unseeded requests anew, as a resumed run must."""
        self._seed, self._served = seed, 0

    @timed("sampling")
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        rows, keys = [], []
        for r, request in enumerate(requests):
            limit = check_fits(request, self.context)
            if request.params.routes:
                self.check_routes()
            seed = request.params.seed
            for index in range(request.params.n):
                rows.append(_Row(r, index, request.params, limit))
                # Seeded and unseeded streams never meet: their second words differ in sign.
                keys.append((seed, index) if seed is not None else (self._seed, -1 - self._served))
                self._served += seed is None
        self.policy.lm.eval()
        with torch.no_grad(), autocast(self.policy):
            for part in self._parts(requests, rows):
                self._decode(requests, [rows[i] for i in part], [keys[i] for i in part])
        out: list[list[Completion]] = [[] for _ in requests]
        for row in rows:
            out[row.request].append(self._completion(row))
        return out

    def _parts(self, requests: Sequence[Request], rows: Sequence[_Row]) -> Iterator[range]:
        """Batches of consecutive rows that respect `max_rows` and `KV_BYTES`."""
        config = self.policy.lm.config.get_text_config()
        start, prompt, limit = 0, 0, 0
        for i, row in enumerate(rows):
            grown = (
                max(prompt, len(requests[row.request].prompt)),
                max(limit, min(row.limit, _PLANNED)),
            )
            size = i - start + 1
            full = size > self.max_rows or slab_bytes(size, sum(grown), config) > KV_BYTES
            if full and i > start:
                yield range(start, i)
                start = i
                grown = len(requests[row.request].prompt), min(row.limit, _PLANNED)
            prompt, limit = grown
        if rows:
            yield range(start, len(rows))

    def _decode(
        self, requests: Sequence[Request], rows: list[_Row], keys: list[tuple[int, int]]
    ) -> None:
        """Fill in `rows`. Only rows that still run are computed."""
        device = self.policy.device
        watch = RouteWatch(self.policy, rows)
        cache, logits, mask = self._prefill(requests, rows, watch)
        random = RowRandom(keys, device)
        running = rows
        settings = _settings(running, device)
        while True:
            tokens, logprobs = sample(logits, *settings, random.draw())
            for row, token, logprob in zip(
                running, tokens.tolist(), logprobs.tolist(), strict=True
            ):
                self._append(row, token, logprob)
            alive = [i for i, row in enumerate(running) if row.finish is None]
            if not alive:
                return
            if len(alive) < len(running):
                keep = torch.tensor(alive, device=device)
                running = [running[i] for i in alive]
                tokens, settings = tokens[keep], (settings[0][keep], settings[1][keep])
                random.keep(keep)
                cache.select(keep)
                mask = None if mask is None else mask[keep]
            with watch.decoding(running):
                logits, mask = self._advance(tokens, cache, mask)

    def _append(self, row: _Row, token: int, logprob: float) -> None:
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if token in self._end_tokens:
            row.finish = "stop"
        elif row.params.stop and (text := self._cut(row)) is not None:
            row.finish, row.text = "stop", text
        elif len(row.tokens) >= row.limit:
            row.finish = "length"

    def _cut(self, row: _Row) -> str | None:
        """The text before the first stop text, or None where there is none yet."""
        text = self.decode(row.tokens)
        found = [at for at in (text.find(stop) for stop in row.params.stop) if at >= 0]
        return text[: min(found)] if found else None

    def _prefill(
        self, requests: Sequence[Request], rows: list[_Row], watch: RouteWatch
    ) -> tuple[SlabCache, Float[Tensor, "R V"], Tensor | None]:
        """Compute each distinct prompt once, then spread its cache over its rows."""
        device = self.policy.device
        number: dict[tuple[int, ...], int] = {}
        of_row = [number.setdefault(requests[r.request].prompt, len(number)) for r in rows]
        prompts = list(number)
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        real = torch.zeros(len(prompts), width, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            real[i, width - len(prompt) :] = True
        tokens, real = tokens.to(device), real.to(device)
        mask = None if bool(real.all()) else real
        layers = self.policy.lm.config.get_text_config().num_hidden_layers
        longest = max(row.limit for row in rows)
        cache = SlabCache(layers, width + min(longest, _FIRST_SLAB))
        positions = (real.cumsum(-1) - 1).clamp_(min=0)
        with watch.prefill(rows, of_row, real):
            hidden = self.policy.backbone(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        logits = full_logits(hidden, self.policy.head)
        spread = torch.tensor(of_row, device=device)
        cache.select(spread)
        return cache, logits[spread], None if mask is None else mask[spread]

    def _advance(
        self, tokens: Int[Tensor, " R"], cache: SlabCache, mask: Tensor | None
    ) -> tuple[Float[Tensor, "R V"], Tensor | None]:
        """One token further in every row."""
        length = cache.get_seq_length()
        if mask is None:
            positions = torch.full_like(tokens, length)
        else:
            positions = mask.sum(-1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = self.policy.backbone(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return full_logits(hidden, self.policy.head), mask

    def _completion(self, row: _Row) -> Completion:
        assert row.finish is not None
        return Completion(
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            text=self.decode(row.tokens) if row.text is None else row.text,
            finish_reason=row.finish,
            policy_version=self.policy.version,
            temperature=row.params.temperature or 1.0,
            routes=np.concatenate(row.routes) if row.routes else None,
        )


def _settings(
    rows: Sequence[_Row], device: torch.device
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Temperature and top_p of each row."""
    return (
        torch.tensor([row.params.temperature for row in rows], device=device),
        torch.tensor([row.params.top_p for row in rows], device=device),
    )


def _end_tokens(policy: Policy) -> frozenset[int]:
    """The end tokens that the model's generation config and its tokenizer name."""
    config = getattr(policy.lm, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [named])
    ids.add(policy.tokenizer.eos_token_id)
    return frozenset(i for i in ids if i is not None)
