"""Models of random weights, made on the device, and batches that such a model could have sampled.

Both models have the same heads, so that they share the compiled attention.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)
from vocabulary import full_tokenizer

from gpu_parts.bench import Card
from gpu_parts.flops import Flops, head_flops
from gspo.data.packing import Microbatch
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.dev import InternalModelConfig
from gspo.policy import load
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.minibatches import RolloutBatch
from gspo.train.trainer import TrainOutput

Sizes = dict[str, Any]
_LARGE: Sizes = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 5,
}
_TOY: Sizes = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_DENSE: Sizes = {"num_hidden_layers": 24, "intermediate_size": 4864}
_MOE: Sizes = {
    "num_hidden_layers": 12,
    "head_dim": 64,
    "moe_intermediate_size": 768,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
_GEMMA: Sizes = {
    "vocab_size": 262_144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
}
_TOY_DENSE: Sizes = {"intermediate_size": 64}
_TOY_MOE: Sizes = {
    "head_dim": 8,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def dense(*, tiny: bool = False, **changes: Any) -> Qwen2Config:
    """Qwen2.5-0.5B's shape, 0.49B parameters."""
    return Qwen2Config(**(_LARGE | _DENSE | (_TOY | _TOY_DENSE if tiny else {}) | changes))


def moe(*, tiny: bool = False, **changes: Any) -> Qwen3MoeConfig:
    """Qwen3-MoE, 0.95B parameters, of which 4 of 32 experts compute a token."""
    return Qwen3MoeConfig(**(_LARGE | _MOE | (_TOY | _TOY_MOE if tiny else {}) | changes))


def gemma(*, tiny: bool = False, **changes: Any) -> Gemma3TextConfig:
    """Gemma 3 1B's shape: 1.0B parameters, of which the vocabulary of 262,144 entries has 0.3B."""
    toy = _TOY | _TOY_DENSE | {"head_dim": 8} if tiny else {}
    fields: dict[str, Any] = _LARGE | _GEMMA | toy | changes
    return Gemma3TextConfig(**fields)


def policy_of(config: Any, card: Card, **options: Any) -> Policy:
    """The policy as `load_policy` gives it to a user, its float32 weights random and from a seed.

    Only the reading of weights is replaced: they are drawn on the device, which takes a second
    where a file of gigabytes would take many.

    Args:
        config: of transformers.
        card: where.
        options: of `dev.InternalModelConfig`; bfloat16 compute unless they say otherwise.
    """

    def drawn(*_: object, **__: object) -> PreTrainedModel:
        torch.manual_seed(0)
        with torch.device(card.device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    given: dict[str, Any] = {"dtype": "bfloat16", "device": card.device} | options
    loading = InternalModelConfig(**given)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(load, "read_model", drawn):
        config.save_pretrained(folder)
        full_tokenizer(config.vocab_size).save_pretrained(folder)
        policy = load.load_policy(folder, loading)
    choose_packing(policy)
    return policy


def make_batch(
    policy: Policy, *, groups: int, size: int, prompt: int, completion: int
) -> RolloutBatch:
    """Random tokens in groups that share a prompt; every second sample has an advantage of -1, the
    others of 1. The old log-probs are 0 until `with_logprobs`."""
    rng = np.random.default_rng(0)
    vocabulary = policy.head.weight.shape[0]
    samples: list[Sample] = []
    for group in range(groups):
        first = rng.integers(vocabulary, size=prompt)
        for _ in range(size):
            tokens = np.concatenate([first, rng.integers(vocabulary, size=completion)])
            samples.append(sample(tokens, prompt, len(samples), group))
    return RolloutBatch(
        samples=tuple((each,) for each in samples),
        rewards=tuple(each.advantage for each in samples),
        dropped=0,
    )


def with_logprobs(batch: RolloutBatch, out: TrainOutput) -> RolloutBatch:
    """The batch with the policy's own log-probs, from a step on it that moved no weight.

    With made-up ones all sequences of one sign would be clipped, and clipped tokens cost no
    backward pass of the head. A step's trace has log-prob less old log-prob, which is 0 here.
    """
    samples = []
    for (own,) in batch.samples:
        (trace,) = out.traces[own.trajectory_id]
        old = np.zeros(len(own), np.float32)
        old[own.ratio_mask] = trace.token_log_ratios
        samples.append((replace(own, old_logprobs=old, sampling_logprobs=old),))
    return replace(batch, samples=tuple(samples))


def sample(tokens: np.ndarray, prompt: int, number: int, group: int) -> Sample:
    """One sample whose log-probs, and the version that sampled it, are not known."""
    ids = tokens.tolist()
    turn = Turn(ids[:prompt], ids[prompt:], [0.0] * (len(ids) - prompt))
    return sample_of([turn], 0, number, group, advantage=1.0 if number % 2 else -1.0)


def step_flops(policy: Policy, microbatches: Sequence[Microbatch]) -> dict[str, float]:
    """Count the operations of forward and backward passes: what the method needs.

    A shared prompt counts once, and what is computed again counts once: the layers under activation
    checkpointing, and the vocabulary projection in the backward pass.
    """
    sizes = Flops.of(policy)
    positions = [microbatch.positions for microbatch in microbatches]
    layers = sum(sizes.forward(each) + sizes.backward(each) for each in positions)
    if policy.checkpointing:  # all weights are trained: backward needs twice the forward pass
        layers = sum(3 * sizes.forward(each) for each in positions)
    head = sum(sum(head_flops(policy.head, len(one.targets))) for one in microbatches)
    return {"layers": layers, "head": head}
