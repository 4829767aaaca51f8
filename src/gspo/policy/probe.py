"""Prove on the loaded model itself that the packed log-probs are the model's own.

Architectures differ in what their attention and heads do. Instead of a list of names, random texts
are scored both ways; the first way of packing that agrees is used, and prompts are shared if that
agrees too. One text is longer than the model's sliding window, if that costs little. What is tried
is the pass that training makes: with gradients, and with recomputed layers if these are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.errors import ModelError
from gspo.core.log import log
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.policy.context import chunk_in, probe_length
from gspo.policy.policy import Packing, Policy

_ORDER: tuple[Packing, ...] = ("flex", "tiles", "mask", "single")
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model raises that is called in a way that it doesn't know."""
_UNRELATED = (9, 4, 7)  # tokens of texts that have nothing in common
_SHARED, _PROMPTS, _COMPLETIONS = 16, (19, 18), (5, 8)  # tokens
_TEMPERATURE = 0.7
_TOLERANCE = 1e-3  # nats; a leak between samples or an unknown logit transform costs far more
_ROUNDED = 0.3  # nats: where several ranks compute in bfloat16


def choose_packing(policy: Policy) -> None:
    """Set `policy.packing` to the fastest way that reproduces the model's own log-probs, and
    `policy.shares_prompts` if it still does so when shared prompts are computed once.

    Before `Policy.round_weights`: what is proved is the structure, and rounding would blur it.

    Raises:
        ModelError: none does: the architecture transforms its logits in a way gspo doesn't know, or
            activation checkpointing doesn't work with it.
    """
    samples, faults = _random_samples(policy), []
    (apart,) = pack(samples, budget=10_000)
    (shared,) = pack(samples, budget=10_000, share=True)
    expected = plain_logprobs(policy, samples)
    for packing in _ways(policy):
        policy.packing = packing
        fault = _fault(policy, apart, expected)
        if packing == "flex" and policy.dtype != torch.float32:  # its kernels must compile for it
            with torch.autocast(policy.device.type, dtype=policy.dtype):
                fault = fault or _fault(policy, apart, expected, math.inf)
        if fault is None:
            break
        faults.append(f"{packing}: {fault}")
    else:
        remedy = "leave activation_checkpointing out" if policy.checkpointing else "not supported"
        remedy = "leave cp_size out" if policy.workers.parts.size > 1 else remedy
        raise ModelError(
            f"{policy.source}: gspo's log-probs differ from those of {type(policy.lm).__name__} "
            f"itself, one text at a time too ({faults[-1]}): {remedy}"
        )
    if faults:
        log.warning("%s is packed by %r (%s)", policy.source, packing, "; ".join(faults))
    fault = "one by one" if packing == "single" else _fault(policy, shared, expected)
    policy.shares_prompts = fault is None
    if fault is not None:
        log.warning("%s: prompts are computed per completion (%s)", policy.source, fault)


def _ways(policy: Policy) -> tuple[Packing, ...]:
    """Return what to try, the fastest first."""
    chunk = chunk_in(policy.lm, policy.context)
    if chunk is not None:
        # Chunks count from a sample's start, which neither gspo's attention nor a mask knows.
        log.warning("%s: max_context <= %d would pack samples", policy.source, chunk)
        return ("single",)
    return _ORDER if policy.device.type == "cuda" else _ORDER[1:]


def _fault(
    policy: Policy, microbatch: Microbatch, expected: Tensor, tolerance: float | None = None
) -> str | None:
    """Say what is wrong with the log-probs of a microbatch; None if nothing is."""
    try:
        logprobs, leaks = _trained(policy, microbatch)
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"
    gap = (logprobs - expected).abs().max().item()
    if tolerance is None:
        rounds = policy.workers.size > 1 and policy.dtype != torch.float32
        tolerance = _ROUNDED if rounds else _TOLERANCE
    if not gap <= tolerance:  # also if it is NaN
        return f"off by {gap:.3g} nats"
    return "a sample sees its neighbours" if leaks else None


def _trained(policy: Policy, microbatch: Microbatch) -> tuple[Tensor, bool]:
    """Make a pass with gradients, as training does, and its backward pass.

    Returns:
        The log-probs, and whether those of a sample depend on its neighbours in the microbatch. The
        gradient says so, which is exactly 0 if they don't: a convolution over the tokens reaches
        the neighbours by less than a gap in nats would show while its weights are small.
    """
    inputs: list[Tensor] = []

    def remember(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    hook = policy.lm.get_input_embeddings().register_forward_hook(remember)
    middle = len(microbatch.lengths) // 2  # each sample is a sequence here
    try:
        with torch.enable_grad():
            logprobs = policy.logprobs(microbatch).logprobs
            total = logprobs[(microbatch.sequence_ids == middle).to(logprobs.device)].sum()
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    finally:
        hook.remove()
    outside = torch.ones(microbatch.token_count, dtype=torch.bool)
    outside[microbatch.index.split(microbatch.lengths)[middle]] = False
    parts = policy.workers.parts
    outside = parts.take(outside).to(logprobs.device)
    beyond = [g[0, outside] for g in gradients if g is not None and policy.packing != "single"]
    leaks = sum(
        (gradient.any().float() for gradient in beyond), torch.zeros((), device=logprobs.device)
    )
    return logprobs.detach(), bool(parts.sum(leaks))


def _random_samples(policy: Policy) -> list[Sample]:
    """Draw texts that have nothing in common, two prompts that start alike with two completions
    each, and one text that is longer than the model's window."""
    rng = np.random.default_rng(0)

    def text(length: int) -> list[int]:
        return rng.integers(0, policy.head.size, length).tolist()

    texts = [(text(1), text(length - 1)) for length in _UNRELATED]  # prompts and completions
    start = text(_SHARED)
    for length in _PROMPTS:
        prompt = start + text(length - _SHARED)
        texts += [(prompt, text(more)) for more in _COMPLETIONS]
    reach = probe_length(policy.lm, policy.context)
    if reach > _SHARED:
        texts.append((text(reach - _SHARED), text(_SHARED)))
    turns = [Turn(prompt, new, [0.0] * len(new), _TEMPERATURE) for prompt, new in texts]
    return [sample_of([turn], trajectory_id=number) for number, turn in enumerate(turns)]


@torch.no_grad()
def plain_logprobs(policy: Policy, samples: Sequence[Sample]) -> Float[Tensor, " M"]:
    """Compute log-probs the plain way: a call of the model per sample, full logits, float32."""
    logprobs_of_samples = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens)[None].to(policy.device)
        logits = policy.lm(input_ids=tokens, use_cache=False).logits[0, :-1, : policy.head.size]
        temperatures = torch.from_numpy(sample.temperatures[1:, None]).to(policy.device)
        logprobs = (logits.float() / temperatures).log_softmax(-1)
        logprobs = logprobs.gather(-1, tokens[0, 1:, None]).squeeze(-1)
        sampled = torch.from_numpy(sample.ratio_mask[1:]).to(policy.device)
        logprobs_of_samples.append(logprobs[sampled])
    return torch.cat(logprobs_of_samples)
