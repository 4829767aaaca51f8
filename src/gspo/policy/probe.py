"""Prove on the loaded model itself that the packed log-probs are the model's own.

Architectures differ in what their attention and heads do. Instead of a list of names, a random
text is scored both ways; the first way of packing that agrees is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gspo.batch.pack import PackedBatch, pack
from gspo.batch.sample import Sample
from gspo.errors import ModelError
from gspo.policy.forward import forward
from gspo.policy.load import Packing, Policy

log = logging.getLogger("gspo")

_ORDER: tuple[Packing, ...] = ("buckets", "mask", "mask_by_type", "single")
_LENGTHS = (9, 4, 7)
TOLERANCE = 1e-3  # nats; a leak between samples or an unknown logit transform costs far more


def choose_packing(policy: Policy) -> None:
    """Set `policy.packing` to the fastest way that reproduces the model's own log-probs.

    Raises:
        ModelError: none does: the architecture transforms its logits in a way gspo doesn't know.
    """
    batch, gap = _random_batch(policy), float("nan")
    with torch.no_grad(), _in_float32(policy):
        expected = _reference(policy, batch)
        for packing in _ORDER:
            policy.packing = packing
            try:
                got = forward(policy, batch).logprobs
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
                log.info("%s: %s packing: %s", policy.source, packing, error)
                continue
            gap = (got - expected).abs().max().item()
            if gap <= TOLERANCE:
                if packing != "buckets":
                    log.warning("%s: samples are packed by %r", policy.source, packing)
                return
            log.info("%s: %s packing is off by %.3g nats", policy.source, packing, gap)
    raise ModelError(
        f"{policy.source}: gspo's log-probs differ from the model's own by {gap:.3g} nats; "
        f"the architecture {type(policy.lm).__name__} is not supported"
    )


@contextmanager
def _in_float32(policy: Policy) -> Iterator[None]:
    """What is proved is the structure; rounding would blur it."""
    dtype, policy.compute_dtype = policy.compute_dtype, torch.float32
    try:
        yield
    finally:
        policy.compute_dtype = dtype


def _random_batch(policy: Policy) -> PackedBatch:
    rng = np.random.default_rng(0)
    vocabulary = policy.head.weight.shape[0]
    samples = []
    for i, length in enumerate(_LENGTHS):
        mask = np.arange(length) > 0
        samples.append(
            Sample(
                tokens=rng.integers(0, vocabulary, length),
                ratio_mask=mask,
                loss_mask=mask,
                old_logprobs=np.zeros(length, np.float32),
                sampling_logprobs=np.zeros(length, np.float32),
                temperatures=np.full(length, 0.7, np.float32),
                turn_ids=np.zeros(length, np.int64),
                policy_versions=np.zeros(length, np.int64),
                trajectory_id=i,
                group_id=0,
                advantage=0.0,
            )
        )
    return pack(samples, budget=sum(_LENGTHS))[0]


def _reference(policy: Policy, batch: PackedBatch) -> Float[Tensor, " M"]:
    """The plain way: one call of the whole model a sample, full logits, float32."""
    parts = []
    for tokens in batch.tokens.to(policy.device).split(batch.lengths, dim=1):
        logits = policy.lm(input_ids=tokens, use_cache=False).logits[0, :-1].float() / 0.7
        parts.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None]).squeeze(-1))
    return torch.cat(parts)
