"""The formulas for operations against what torch counts while the model runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
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
from gspo.core.errors import ModelError
from gspo.data.packing import PackedBatch, pack
from gspo.lab import flops
from gspo.lab.flops import Flops, active_weights, head_flops
from gspo.policy.load import recompute_layers
from gspo.policy.policy import Policy
from gspo.train.minibatches import prepare
from policy.routers import MOE
from policy.test_policy import tiny
from support import embedded, random_groups

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
    if policy.routing.routers:
        policy.lm.set_experts_implementation("eager")
    policy.packing = "single"
    return policy


def model(name: str) -> Policy:
    model_class, config_class, extra = MODELS[name]
    return plain(tiny(model_class, config_class, **extra))


def batch_of(policy: Policy) -> PackedBatch:
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


def whole_squares(own: Flops, row: PackedBatch) -> float:
    """Attention as torch computes and counts it: L x L, without the causal half."""
    pairs = sum(length**2 for length in row.lengths)
    return own.pair * sum(own.windows.values()) * pairs


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_are_what_torch_counts(name: str):
    policy = model(name)
    row, own = batch_of(policy), Flops.of(policy)
    every, heads = row.positions, len(row.targets)
    squares = whole_squares(own, row) - own.attention(every)

    with torch.no_grad():
        found = counted(lambda: policy.logprobs(row))
    assert found == own.forward(every) + squares + head_flops(policy.head, heads)[0]

    loss = policy.logprobs(row).logprobs.sum()
    found = counted(loss.backward)
    assert found == own.backward(every) + 2 * squares + head_flops(policy.head, heads)[1]


def test_of_the_experts_only_the_chosen_count():
    policy = model("qwen3_moe")
    active = active_weights(policy)
    found = {n: active[p] for n, p in policy.backbone.named_parameters() if p in active}
    stacked = {n: v for n, v in found.items() if "experts" in n}
    sizes = dict(policy.backbone.named_parameters())
    assert stacked and all(value == sizes[n].numel() * 2 / 8 for n, value in stacked.items())
    assert found["layers.0.mlp.gate.weight"] == sizes["layers.0.mlp.gate.weight"].numel()
    assert "embed_tokens.weight" not in found and "norm.weight" not in found


def test_experts_that_are_modules_of_their_own_count_the_same():
    policy = model("qwen3_moe")

    class Listed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            linears = [torch.nn.Linear(6, 4, bias=False) for _ in range(8)]
            self.experts = torch.nn.ModuleList(linears)

    listed = Listed()
    whole = sum(active_weights(policy).values())
    policy.backbone.extra = listed
    assert sum(active_weights(policy).values()) == whole + 2 * 6 * 4


@pytest.mark.parametrize("window", [None, 3])
def test_attention_counts_the_pairs_of_the_mask(window: int | None):
    policy = model("llama")
    own = dataclasses.replace(Flops.of(policy), windows={window: 2})
    lengths = (7, 1, 4)
    pairs = 0
    for length in lengths:
        at = torch.arange(length)
        distance = at[:, None] - at[None, :]
        pairs += int(((distance >= 0) & (distance < (window or 99))).sum())
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    assert own.attention(positions) == 2 * own.pair * pairs
    # Decoding token by token computes the same pairs.
    steps = sum(own.attention(positions[:, i : i + 1]) for i in range(positions.numel()))
    assert steps == own.attention(positions)


def test_layers_are_counted_by_their_window():
    config = {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    policy = tiny(Gemma3ForCausalLM, Gemma3TextConfig, **config)
    assert Flops.of(policy).windows == {5: 2, None: 1}
    assert Flops.of(model("llama")).windows == {None: 3}


def test_recomputed_layers_are_counted_again():
    policy = model("llama")
    once = Flops.of(policy)
    policy.checkpointing = True
    recompute_layers(policy)
    policy.lm.train()
    row, own = batch_of(policy), Flops.of(policy)
    squares = whole_squares(own, row) - own.attention(row.positions)
    found = counted(policy.logprobs(row).logprobs.sum().backward)
    head = head_flops(policy.head, len(row.targets))[1]
    expected = own.backward(row.positions) + 3 * squares + head
    # torch stops a layer's recomputation before its last product, whose result nobody needs.
    last = 3 * 2 * 32 * 48 * row.token_count
    assert found == expected - last
    assert own.backward(row.positions) > once.backward(row.positions)


def test_with_lora_frozen_weights_have_no_gradient_of_their_own():
    policy = plain(embedded(lora=dev.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    row, own = batch_of(policy), Flops.of(policy)
    every, heads = row.positions, len(row.targets)
    squares = whole_squares(own, row) - own.attention(every)
    with torch.no_grad():
        found = counted(lambda: policy.logprobs(row))
    assert found == own.forward(every) + squares + head_flops(policy.head, heads, grad=False)[0]
    assert own.trained < 0.1 * own.weights
    found = counted(policy.logprobs(row).logprobs.sum().backward)
    expected = own.backward(every) + 2 * squares + head_flops(policy.head, heads)[1]
    # Nobody needs the gradient of what goes into the first adapters.
    assert 0.8 * expected < found < expected


def test_a_model_that_hides_its_experts_per_token_is_refused(monkeypatch):
    monkeypatch.setattr(flops, "_PER_TOKEN", ("nothing",))
    with pytest.raises(ModelError, match="doesn't say how many experts compute a token"):
        Flops.of(model("qwen3_moe"))
