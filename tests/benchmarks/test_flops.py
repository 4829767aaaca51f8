"""The formulas for operations against what torch counts while the model runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gpu_parts.flops import Flops, head_flops
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gspo import dev
from gspo.data.packing import Microbatch, pack
from gspo.policy.load import Policy
from gspo.train.minibatches import prepare
from policy.routers import MOE
from policy.test_policy import tiny
from support import embedded, random_groups, recompute_layers

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 5}),
    **{name: MOE[name] for name in ("qwen3_moe", "mixtral", "deepseek_v3") if name in MOE},
}


def plain(policy: Policy) -> Policy:
    """Every product as a matrix product that torch counts: no fused attention or experts."""
    policy.lm.set_attn_implementation("eager")
    if policy.routers.modules:
        policy.lm.set_experts_implementation("eager")
    policy.packing = "single"
    return policy


def model(name: str) -> Policy:
    model_class, config_class, extra = MODELS[name]
    return plain(tiny(model_class, config_class, **extra))


def batch_of(policy: Policy) -> Microbatch:
    batch = prepare(random_groups(policy, groups=1), context=policy.context)
    (row,) = pack([s for own in batch.samples for s in own], 10_000)
    return row


def in_place(total, a, b, **_: Any) -> int:
    """Of addmm_, which torch's table lacks; the arguments are shapes."""
    return 2 * a[0] * a[1] * b[1]


def counted(work) -> float:
    """What torch counts, but for the rotary embedding's outer product."""
    mapping = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as mode:
        work()
    found = mode.get_flop_counts()
    rotary = sum(sum(own.values()) for name, own in found.items() if name.endswith("rotary_emb"))
    return sum(found["Global"].values()) - rotary


def whole_squares(own: Flops, row: Microbatch) -> float:
    """Attention as torch computes and counts it: L x L, without the causal half."""
    return own.pair[0] * sum(length**2 for length in row.lengths)


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_are_what_torch_counts(name: str):
    policy = model(name)
    row, own = batch_of(policy), Flops.of(policy)
    every, heads = row.positions, len(row.targets)
    squares = whole_squares(own, row) - own.pair[0] * own.pairs(every)

    with torch.no_grad():
        found = counted(lambda: policy.logprobs(row))
    assert found == own.forward(every) + squares + head_flops(policy.head, heads)[0]

    loss = policy.logprobs(row).logprobs.sum()
    found = counted(loss.backward)
    assert found == own.backward(every) + 2 * squares + head_flops(policy.head, heads)[1]


def test_of_the_experts_only_the_chosen_count():
    """Two of eight, in the stacked products that training runs."""
    policy = tiny(*MODELS["qwen3_moe"][:2], **MODELS["qwen3_moe"][2])
    weights = 0.0
    for name, parameter in policy.backbone.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            weights += parameter.numel() * (2 / 8 if "experts" in name else 1)
    assert Flops.of(policy).token == (2 * weights, 4 * weights)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_counts_the_pairs_of_the_mask(window: int | None):
    policy = model("llama")
    own = dataclasses.replace(Flops.of(policy), windows={window: 1.0})
    lengths = (7, 1, 4)
    pairs = 0
    for length in lengths:
        at = torch.arange(length)
        distance = at[:, None] - at[None, :]
        pairs += int(((distance >= 0) & (distance < (window or 99))).sum())
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    assert own.pairs(positions) == pairs
    # Decoding token by token computes the same pairs.
    steps = sum(own.pairs(positions[:, i : i + 1]) for i in range(positions.numel()))
    assert steps == pairs


def test_layers_are_counted_by_their_window():
    config = {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    policy = tiny(Gemma3ForCausalLM, Gemma3TextConfig, **config)
    assert Flops.of(policy).windows == {5: 2 / 3, None: 1 / 3}
    assert Flops.of(model("llama")).windows == {None: 1.0}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_recomputed_layers_are_counted_again(name: str):
    policy = model(name)
    once = Flops.of(policy)
    policy.checkpointing = True
    recompute_layers(policy)
    policy.lm.train()
    row, twice = batch_of(policy), Flops.of(policy)
    assert twice.token[0] == once.token[0]
    assert once.token[1] < twice.token[1] <= once.token[1] + once.token[0]
    squares = whole_squares(twice, row) - twice.pair[0] * twice.pairs(row.positions)
    found = counted(policy.logprobs(row).logprobs.sum().backward)
    head = head_flops(policy.head, len(row.targets))[1]
    assert found == twice.backward(row.positions) + 3 * squares + head


def test_with_lora_frozen_weights_have_no_gradient():
    policy = plain(embedded(lora=dev.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    row, own = batch_of(policy), Flops.of(policy)
    every, heads = row.positions, len(row.targets)
    squares = sum(length**2 for length in row.lengths) - own.pairs(every)
    with torch.no_grad():
        found = counted(lambda: policy.logprobs(row))
    head = head_flops(policy.head, heads, grad=False)[0]
    assert found == own.forward(every) + own.pair[0] * squares + head
    found = counted(policy.logprobs(row).logprobs.sum().backward)
    head = head_flops(policy.head, heads)[1]
    assert found == own.backward(every) + own.pair[1] * squares + head
    assert own.token[1] < 1.2 * own.token[0]  # twice as much is needed if all weights are trained


def test_adapters_on_stacked_experts_are_made_once_and_not_per_token():
    whole = Flops.of(embedded())
    adapted = Flops.of(embedded(lora=dev.LoraConfig(r=2)))
    assert whole.token[0] <= adapted.token[0] < 1.2 * whole.token[0]
