"""What the GPU benchmarks share: the card's limits, models of random weights, counted work.

They have not been run by the authors: no GPU was at hand. `--tiny` runs the same code on the CPU
at sizes of a toy, which proves that it runs and nothing about speed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import Pairs, Unavailable, machine

from gspo.batch.sample import Sample
from gspo.dev import InternalModelConfig
from gspo.policy.embedded import build_tokenizer
from gspo.policy.load import Policy, load_policy
from gspo.policy.probe import choose_packing


@dataclass(frozen=True)
class Card:
    """A device and its data sheet: bfloat16 FLOP/s (dense, not sparse) and bytes/s of memory."""

    name: str
    device: str
    flops: float
    bytes_per_s: float


# By a part of torch's device name, the more special first. Sources: NVIDIA's data sheets.
_CARDS = {
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A100": (312e12, 1.555e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
}


def card(*, tiny: bool = False) -> Card:
    """The CUDA device; with `tiny` the CPU, under made-up limits.

    Raises:
        Unavailable: no CUDA device, or one that isn't in the table.
    """
    if tiny:
        return Card("CPU, tiny", "cpu", 1e12, 1e10)
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA device, and torch sees none (--tiny runs on the CPU)")
    name = torch.cuda.get_device_name()
    for part, (flops, bandwidth) in _CARDS.items():
        if part in name:
            return Card(name, "cuda", flops, bandwidth)
    raise Unavailable(f"{name}: its peak FLOP/s are unknown; add it to _CARDS in gpu.py")


def dense(*, tiny: bool = False) -> Any:
    """Qwen3, 0.53B parameters."""
    from transformers import Qwen3Config

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 3072}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    if tiny:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3Config(**sizes, **heads, **_common(tiny))


def moe(*, tiny: bool = False) -> Any:
    """Qwen3-MoE, 1.1B parameters, of which 4 of 32 experts compute a token."""
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 1024, "num_hidden_layers": 12, "moe_intermediate_size": 768}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    experts = {"num_experts": 32, "num_experts_per_tok": 4}
    if tiny:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        experts = {"num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeConfig(norm_topk_prob=True, **sizes, **heads, **experts, **_common(tiny))


def _common(tiny: bool) -> dict[str, Any]:
    return {
        "vocab_size": 512 if tiny else 151_936,
        "max_position_embeddings": 16_384,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 5,
    }


def policy_of(config: Any, on: Card) -> Policy:
    """The policy as a user loads it: bfloat16 compute, float32 weights from a seed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        policy = load_policy(folder, InternalModelConfig(dtype="bfloat16", device=on.device))
    choose_packing(policy)
    return policy


def sample(prompt: Sequence[int], completion: Sequence[int], number: int, policy: Policy) -> Sample:
    """One sample, as if the policy had sampled it; advantages alternate in sign."""
    length = len(prompt) + len(completion)
    mask = np.arange(length) >= len(prompt)
    vocabulary = policy.head.weight.shape[0]
    logprobs = np.where(mask, -np.log(vocabulary), 0).astype(np.float32)
    return Sample(
        tokens=np.array([*prompt, *completion]),
        ratio_mask=mask,
        loss_mask=mask,
        old_logprobs=logprobs,
        sampling_logprobs=logprobs,
        temperatures=np.ones(length, np.float32),
        turn_ids=np.where(mask, 0, -1),
        policy_versions=np.where(mask, policy.version, -1),
        trajectory_id=number,
        group_id=0,
        advantage=1.0 if number % 2 else -1.0,
    )


def model_flops(config: Any, lengths: Sequence[int], targets: int) -> float:
    """FLOPs of a forward and backward pass: what the model needs, nothing computed twice.

    Matrix products alone, a multiply-add as two; the backward pass is twice the forward pass.
    Attention is causal: position p looks at p + 1 keys. The vocabulary is projected at the targets.

    Args:
        config: of Qwen3 or Qwen3-MoE.
        lengths: tokens of each sample.
        targets: tokens whose log-probs are taken.
    """
    width, layers, head = config.hidden_size, config.num_hidden_layers, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = 2 * width * heads * head + 2 * width * kv_heads * head
    if hasattr(config, "num_experts"):
        weights += width * config.num_experts  # the router
        weights += 3 * width * config.moe_intermediate_size * config.num_experts_per_tok
    else:
        weights += 3 * width * config.intermediate_size
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = 2 * 2 * heads * head * pairs  # queries by keys, and weights by values
    forward = layers * (2 * weights * sum(lengths) + attention)
    return 3 * (forward + 2 * config.vocab_size * width * targets)


def seconds(work: Callable[[], object], on: Card, repeats: int, warmup: int = 2) -> list[float]:
    """Times of the work alone, until the device has done it."""
    times = []
    for at in range(warmup + repeats):
        synchronize(on)
        started = time.perf_counter()
        work()
        synchronize(on)
        if at >= warmup:
            times.append(time.perf_counter() - started)
    return times


def synchronize(on: Card) -> None:
    """Wait for the device."""
    if on.device == "cuda":
        torch.cuda.synchronize()


def against_limit(times: Sequence[float], limit: float) -> Pairs:
    """Measured times beside the time that the card's data sheet allows: ratio = share of it."""
    return Pairs(tuple(times), (limit,) * len(times))


def machine_of(on: Card) -> dict[str, Any]:
    """The machine with its card."""
    return machine() | {"gpu": on.name, "gpu_tflops": on.flops / 1e12}
