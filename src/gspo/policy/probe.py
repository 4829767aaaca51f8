"""Prove on the loaded model itself that the packed log-probs are the model's own.

Architectures differ in what their attention and heads do. Instead of a list of names, random texts
are scored both ways; the first way of packing that agrees is used, and prompts are shared if that
agrees too. One text is longer than the model's sliding window, if that costs little. Last, the pass
that training makes, with gradients, is compared with the plain one.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.errors import ModelError
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.policy.context import chunk_in, probe_length
from gspo.policy.policy import WITH_GSPO_ATTENTION, Packing, Policy

log = logging.getLogger("gspo")

_ORDER: tuple[Packing, ...] = ("tiles", "mask", "single")
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
_UNRELATED = (9, 4, 7)  # tokens of texts that have nothing in common
_SHARED, _PROMPTS, _COMPLETIONS = 16, (19, 18), (5, 8)  # tokens
_TEMPERATURE = 0.7
_TOLERANCE = 1e-3  # nats; a leak between samples or an unknown logit transform costs far more


def choose_packing(policy: Policy) -> None:
    """Set `policy.packing` to the fastest way that reproduces the model's own log-probs, and
    `policy.shares_prompts` if it still does so when shared prompts are computed once.

    Raises:
        ModelError: none does: the architecture transforms its logits in a way gspo doesn't know; or
            activation checkpointing doesn't work with it.
    """
    samples, gap = _random_samples(policy), float("nan")
    (apart,) = pack(samples, budget=10_000)
    (shared,) = pack(samples, budget=10_000, share=True)
    # What is proved is the structure; rounding would blur it.
    exact = copy.copy(policy)
    exact.compute_dtype = torch.float32
    with torch.no_grad():
        expected = _reference(exact, samples)
        for packing in _ways(policy, apart):
            policy.packing = exact.packing = packing
            gap = _gap(exact, apart, expected, f"{packing} packing")
            if gap <= _TOLERANCE and not _leaks(exact, apart):
                break
        else:
            raise ModelError(
                f"{policy.source}: gspo's log-probs differ from the model's own by {gap:.3g} nats, "
                "one text at a time too: between its last layer and its logits it computes "
                f"something that gspo doesn't; {type(policy.lm).__name__} is not supported"
            )
        policy.shares_prompts = (
            packing != "single" and _gap(exact, shared, expected, "sharing prompts") <= _TOLERANCE
        )
        if policy.checkpointing:
            _check_checkpointing(exact, apart, expected)
    if policy.packing not in WITH_GSPO_ATTENTION:
        log.warning("%s: samples are packed by %r", policy.source, policy.packing)
    if not policy.shares_prompts:
        log.warning("%s: a prompt is computed once for each of its completions", policy.source)


def _ways(policy: Policy, microbatch: Microbatch) -> tuple[Packing, ...]:
    """What to try; on a GPU, flex_attention first."""
    chunk = chunk_in(policy.lm, policy.context)
    if chunk is not None:
        # Chunks count from a sample's start, which neither gspo's attention nor a mask knows.
        log.info("%s: max_context <= %d would pack samples", policy.source, chunk)
        return ("single",)
    on_gpu = policy.device.type == "cuda"
    return ("flex", *_ORDER) if on_gpu and _flex_trains(policy, microbatch) else _ORDER


def _flex_trains(policy: Policy, microbatch: Microbatch) -> bool:
    """Whether its kernels compile here as training uses them, in the policy's precision."""
    policy.packing = "flex"
    try:
        _trained(policy, microbatch, list(policy.trainable.values())[:1])
    except _REFUSALS as error:
        log.warning("%s: without flex_attention: %s", policy.source, error)
        return False
    return True


def _check_checkpointing(policy: Policy, microbatch: Microbatch, expected: Tensor) -> None:
    """Layers that are computed again in the backward pass compute what they did before.

    Raises:
        ModelError: a pass with gradients differs from one without, or its backward pass fails.
    """
    try:
        logprobs = _trained(policy, microbatch, [*policy.trainable.values()])
    except _REFUSALS as error:
        raise ModelError(
            f"{policy.source}: activation_checkpointing does not work with "
            f"{type(policy.lm).__name__}: {error} Leave the option out"
        ) from error
    gap = (logprobs - expected).abs().max().item()
    if not gap <= _TOLERANCE:
        raise ModelError(
            f"{policy.source}: with activation_checkpointing, log-probs differ by {gap:.3g} nats; "
            "leave the option out"
        )


def _trained(policy: Policy, microbatch: Microbatch, parameters: Sequence[Tensor]) -> Tensor:
    """Log-probs of a pass with gradients, whose backward pass has been run."""
    with torch.enable_grad():
        logprobs = policy.logprobs(microbatch).logprobs
        torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)
    return logprobs.detach()


def _gap(policy: Policy, microbatch: Microbatch, expected: Tensor, way: str) -> float:
    """The largest difference in nats; infinite if this way doesn't work at all."""
    try:
        gap = (policy.logprobs(microbatch).logprobs - expected).abs().max().item()
    except _REFUSALS as error:
        log.info("%s: %s: %s", policy.source, way, error)
        return float("inf")
    if gap > _TOLERANCE:
        log.info("%s: %s is off by %.3g nats", policy.source, way, gap)
    return gap


def _leaks(policy: Policy, microbatch: Microbatch) -> bool:
    """Whether a sample's log-probs depend on its neighbours in the microbatch.

    The gradient says so, which is exactly 0 if they don't: a convolution over the tokens reaches
    the neighbours by less than a gap in nats would show while its weights are small.
    """
    if policy.packing == "single":
        return False
    inputs: list[Tensor] = []

    def remember(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    hook = policy.lm.get_input_embeddings().register_forward_hook(remember)
    middle = len(microbatch.lengths) // 2
    start = sum(microbatch.lengths[:middle])
    stop = start + microbatch.lengths[middle]
    try:
        with torch.enable_grad():
            logprobs = policy.logprobs(microbatch).logprobs
            inside = (microbatch.targets >= start) & (microbatch.targets < stop)
            total = logprobs[inside.to(logprobs.device)].sum()
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    finally:
        hook.remove()
    leaked = any(
        bool(gradient[0, :start].any() or gradient[0, stop:].any())
        for gradient in gradients
        if gradient is not None
    )
    if leaked:
        log.info("%s: %s packing lets a sample see its neighbours", policy.source, policy.packing)
    return leaked


def _random_samples(policy: Policy) -> list[Sample]:
    """Some that have nothing in common; two prompts that start alike, with two completions; and one
    that is longer than the model's window."""
    rng = np.random.default_rng(0)

    def text(length: int) -> list[int]:
        return rng.integers(0, policy.head.size, length).tolist()

    texts = [(text(length), 1) for length in _UNRELATED]  # tokens, and how many are the prompt
    start = text(_SHARED)
    for length in _PROMPTS:
        prompt = start + text(length - _SHARED)
        texts += [(prompt + text(more), length) for more in _COMPLETIONS]
    reach = probe_length(policy.lm, policy.context)
    if reach > _SHARED:
        texts.append((text(reach), reach - _SHARED))
    return [
        sample_of(
            [Turn(tokens[:prompt], tokens[prompt:], [0.0] * (len(tokens) - prompt), _TEMPERATURE)],
            trajectory_id=number,
        )
        for number, (tokens, prompt) in enumerate(texts)
    ]


def _reference(policy: Policy, samples: Sequence[Sample]) -> Float[Tensor, " M"]:
    """The plain way: one call of the whole model per sample, full logits, float32."""
    logprobs_of_samples = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens)[None].to(policy.device)
        logits = policy.lm(input_ids=tokens, use_cache=False).logits[0, :-1, : policy.head.size]
        logprobs = (logits.float() / _TEMPERATURE).log_softmax(-1)
        logprobs = logprobs.gather(-1, tokens[0, 1:, None]).squeeze(-1)
        sampled = torch.from_numpy(sample.ratio_mask[1:]).to(policy.device)
        logprobs_of_samples.append(logprobs[sampled])
    return torch.cat(logprobs_of_samples)
