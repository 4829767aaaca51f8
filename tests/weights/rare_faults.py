"""Further ways in which a publication goes wrong: smaller ones, and those of certain models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from gspo.policy.lora import merged_weights
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.weights.rollout_copy import fake_quantized
from policy.routers import moe
from policy.test_policy import tiny
from support import embedded
from weights import faults
from weights.faults import Fault, Publication, publish_merged


def shared_expert() -> Policy:
    """A Mixture of Experts with a shared expert, and biases in attention."""
    sizes: dict[str, Any] = {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    }
    policy = tiny(Qwen2MoeForCausalLM, Qwen2MoeConfig, **sizes)
    choose_packing(policy)
    return policy


MODELS: dict[str, Callable[[], Policy]] = faults.MODELS | {
    "embedded": embedded,
    "shared expert": shared_expert,
    "deepseek": lambda: moe("deepseek_v3"),
}


def layer_count(on: Publication) -> int:
    return on.sampling.lm.config.get_text_config().num_hidden_layers


def a_layer(on: Publication, below: str = "") -> Any:
    return on.lm.get_submodule(f"model.layers.{on.rng.randrange(layer_count(on))}{below}")


def two_layers(on: Publication, below: str) -> tuple[Any, Any]:
    first, second = on.rng.sample(range(layer_count(on)), 2)
    return (
        on.lm.get_submodule(f"model.layers.{first}{below}"),
        on.lm.get_submodule(f"model.layers.{second}{below}"),
    )


def exchange(first: Tensor, second: Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def place(on: Publication, weight: Tensor) -> tuple[int, ...]:
    return tuple(on.rng.randrange(size) for size in weight.shape)


def exchanged_norms(on: Publication) -> None:
    layer = a_layer(on)
    exchange(layer.input_layernorm.weight, layer.post_attention_layernorm.weight)


def query_as_key_norm(on: Publication) -> None:
    attention = a_layer(on, ".self_attn")
    exchange(attention.q_norm.weight, attention.k_norm.weight)


def head_of_another_layer(on: Publication) -> None:
    first, second = two_layers(on, ".self_attn")
    rows = slice(first.head_dim * on.rng.randrange(4), None)
    first.q_proj.weight[rows][: first.head_dim] = second.q_proj.weight[rows][: first.head_dim]


def permuted_keys(on: Publication) -> None:
    """The key heads of a layer in another order than its value heads."""
    attention = a_layer(on, ".self_attn")
    attention.k_proj.weight.copy_(attention.k_proj.weight.roll(attention.head_dim, 0))


def permuted_values(on: Publication) -> None:
    attention = a_layer(on, ".self_attn")
    attention.v_proj.weight.copy_(attention.v_proj.weight.roll(attention.head_dim, 0))


def interleaved_rotations(on: Publication) -> None:
    """The rows of queries in the order of another way to rotate them."""
    attention = a_layer(on, ".self_attn")
    for projection in (attention.q_proj, attention.k_proj):
        rows = projection.weight.view(-1, 2, attention.head_dim // 2, projection.weight.shape[1])
        projection.weight.copy_(rows.transpose(1, 2).reshape(projection.weight.shape))


def shards_in_another_order(on: Publication) -> None:
    weight = a_layer(on, ".self_attn.o_proj").weight
    weight.copy_(weight.roll(weight.shape[1] // 2, 1))


def exchanged_columns(on: Publication) -> None:
    weight, _ = on.pick("_proj")
    first, second = on.rng.sample(range(weight.shape[-1]), 2)
    weight[..., [first, second]] = weight[..., [second, first]]


def columns_first(on: Publication) -> None:
    """A matrix that was read in the order of another layout of memory."""
    weight = on.rng.choice(on.matrices("_proj"))  # not a bias
    weight.copy_(weight.mT.clone().reshape(weight.shape))


def other_theta(on: Publication) -> None:
    for name, buffer in on.lm.named_buffers():
        if name.endswith("inv_freq"):
            buffer.pow_(1.001)


def rounded_frequencies(on: Publication) -> None:
    """As by a cast of the whole model."""
    for name, buffer in on.lm.named_buffers():
        if name.endswith(".inv_freq"):
            buffer.copy_(buffer.bfloat16().float())


def frequencies_of_another_type(on: Publication) -> None:
    on.lm.get_submodule("model.rotary_emb").bfloat16()


def infinite_number(on: Publication) -> None:
    weight, _ = on.pick("_proj")
    weight[place(on, weight)] = torch.inf


def not_a_number(on: Publication) -> None:
    weight, _ = on.pick("_proj")
    weight[place(on, weight)] = torch.nan


def sign_of_one_number(on: Publication) -> None:
    weight, _ = on.pick("_proj")
    at = place(on, weight)
    weight[at] = -weight[at] if weight[at] else 1e-3


def half_and_back(on: Publication) -> None:
    """One tensor, through a type of fewer digits or a smaller range."""
    weight, _ = on.pick("_proj")
    fewer = torch.float16 if weight.dtype == torch.float32 else torch.float8_e5m2
    weight.copy_(weight.to(fewer).to(weight.dtype))


def last_row_left(on: Publication) -> None:
    weight, old = on.pick("_proj")
    weight[-1] = old[-1]


def last_numbers_left(on: Publication) -> None:
    """As by a copy whose length was counted in other units."""
    weight, old = on.pick("_proj")
    weight.view(-1)[-8:] = old.view(-1)[-8:]


def half_of_a_file(on: Publication) -> None:
    """A tensor in a mapped file that was written to its half."""
    name = on.rng.choice([n for n, _ in on.lm.named_parameters() if "_proj" in n])
    weight = on.lm.get_parameter(name)
    with tempfile.NamedTemporaryFile() as file:
        raw = weight.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        file.write(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))
        file.flush()
        mapped = torch.from_file(file.name, True, len(raw), dtype=torch.uint8)
        weight.data = mapped.view(weight.dtype).view(weight.shape)


def cut_tensor(on: Publication) -> None:
    weight, _ = on.pick("_proj")
    weight.data = weight.data[..., :-1]


def no_tensor(on: Publication) -> None:
    weight, _ = on.pick("_proj")
    weight.data = weight.data.new_empty(0)


def one_row_for_all(on: Publication) -> None:
    """A tensor whose rows lie in the same memory."""
    weight, _ = on.pick("_proj")
    weight.data = weight.data[:1].expand_as(weight)


def mean_of_steps(on: Publication) -> None:
    for name, weight in on.lm.named_parameters():
        weight.lerp_(on.older[-1][name], 0.05)


def update_taken_twice(on: Publication) -> None:
    for name, weight in on.lm.named_parameters():
        weight.add_(weight - on.older[-1][name])


def cut_digits(on: Publication) -> None:
    """Numbers cut to bfloat16, not rounded."""
    whole = dict(merged_weights(on.policy.lm))
    for name, weight in on.lm.named_parameters():
        if "_proj" in name:
            cut = whole[name].float().contiguous().view(torch.int32) & -0x10000
            weight.copy_(cut.view(torch.float32))


def other_grid(on: Publication) -> None:
    """Rounded to 8 bits with one scale for the whole tensor."""
    weight, _ = on.pick("_proj")
    weight.copy_(fake_quantized(weight.reshape(1, -1), 8).view(weight.shape))


def old_head_row(on: Publication) -> None:
    """Of a token that the probe doesn't have."""
    head = on.sampling.head.weight
    names = [n for n, p in on.lm.named_parameters() if p is head]
    row = on.rng.choice(on.unused)
    head[row] = on.older[-1][names[0]][row]


def norm_plus_one(on: Publication) -> None:
    """The convention of another architecture."""
    on.pick("norm")[0].add_(1)


def old_layer(on: Publication) -> None:
    layer = on.rng.randrange(layer_count(on))
    for name, weight in on.lm.named_parameters():
        if f"layers.{layer}." in name:
            weight.copy_(on.older[-1][name])


def further_tensor(on: Publication) -> None:
    """One that the trainer's model doesn't have."""
    layer = a_layer(on)
    layer.extra = nn.Parameter(torch.zeros(3, dtype=on.sampling.dtype), requires_grad=False)


def exchanged_router_rows(on: Publication) -> None:
    weight, _ = on.pick("mlp.gate.weight")
    rows = on.rng.sample(range(len(weight)), 2)
    weight[rows] = weight[rows[::-1]]


def expert_of_another_layer(on: Publication) -> None:
    first, second = two_layers(on, ".mlp.experts")
    expert = on.rng.randrange(len(first.down_proj))
    first.down_proj[expert] = second.down_proj[expert]
    first.gate_up_proj[expert] = second.gate_up_proj[expert]


def down_of_another_expert(on: Publication) -> None:
    weight, _ = on.pick("mlp.experts.down_proj")
    first, second = on.rng.sample(range(len(weight)), 2)
    weight[first] = weight[second]


def interleaved_gate_and_up(on: Publication) -> None:
    weight, _ = on.pick("mlp.experts.gate_up_proj")
    halves = weight.unflatten(1, (2, -1))
    weight.copy_(halves.transpose(1, 2).reshape(weight.shape))


def old_shared_expert(on: Publication) -> None:
    weight, old = on.pick("shared_expert.")
    weight.copy_(old)


def old_shared_gate(on: Publication) -> None:
    weight, old = on.pick("shared_expert_gate")
    weight.copy_(old)


def old_bias(on: Publication) -> None:
    weight, old = on.pick("_proj.bias")
    weight.copy_(old)


def no_bias(on: Publication) -> None:
    names = [n for n, _ in on.lm.named_parameters() if n.endswith("_proj.bias")]
    layer: Any = on.lm.get_submodule(on.rng.choice(names).removesuffix(".bias"))
    layer.bias = None


def other_correction(on: Publication) -> None:
    """A buffer that nothing but the choice of experts depends on."""
    named = [b for n, b in on.lm.named_buffers() if n.endswith("e_score_correction_bias")]
    on.rng.choice(named)[on.rng.randrange(8)] += 0.01


def adapters_of_the_last_step(on: Publication) -> None:
    for name, weight in on.lm.named_parameters():
        weight.copy_(on.older[-1][name])


def a_of_another_layer(on: Publication) -> None:
    """The A of two layers' adapters exchanged, their B left."""
    layers = on.rng.sample(range(3), 2)

    def change(other: Policy) -> None:
        named = other.trainable
        for name, first in named.items():
            if f"layers.{layers[0]}." in name and "lora_A" in name:
                exchange(first, named[name.replace(f"layers.{layers[0]}.", f"layers.{layers[1]}.")])

    publish_merged(on, change)


def merged_twice(on: Publication) -> None:
    base = {n.replace(".base_layer", ""): p for n, p in on.policy.lm.named_parameters()}
    for name, weight in merged_weights(on.policy.lm):
        on.lm.get_parameter(name).copy_(2 * weight - base[name])


def merged_in_half_precision(on: Publication) -> None:
    base = {n.replace(".base_layer", ""): p for n, p in on.policy.lm.named_parameters()}
    for name, weight in merged_weights(on.policy.lm):
        added = (weight - base[name]).bfloat16()
        on.lm.get_parameter(name).copy_(base[name].bfloat16() + added)


def another_row_of_an_adapter(on: Publication) -> None:
    """One row of one B is zero."""
    chosen = on.rng.choice([n for n in on.policy.trainable if "lora_B" in n])

    def change(other: Policy) -> None:
        weight = other.trainable[chosen]
        weight[on.rng.randrange(len(weight))] = 0

    publish_merged(on, change)


# No tensor differs in what follows.


def layer_left_out(on: Publication) -> None:
    on.sampling.lm.config.get_text_config().num_hidden_layers -= 1


def other_activation(on: Publication) -> None:
    layers = [m for m in on.lm.modules() if isinstance(getattr(m, "act_fn", None), nn.Module)]
    module: Any = on.rng.choice(layers)
    module.act_fn = nn.GELU()


def other_logit_scale(on: Publication) -> None:
    on.sampling.logit_scale = 1.001


def other_cap(on: Publication) -> None:
    on.sampling.softcap = 200.0


def token_left_out(on: Publication) -> None:
    """The last entry of the vocabulary is none any more."""
    on.sampling.entries = on.sampling.head.size - 1


def fewer_experts(on: Publication) -> None:
    a_layer(on, ".mlp.gate").top_k -= 1


def other_epsilon_of_one_norm(on: Publication) -> None:
    norm = a_layer(on, ".input_layernorm")
    norm.variance_epsilon = norm.gspo_epsilon = 1e-5


def other_share_of_heads(on: Publication) -> None:
    """Keys are repeated in another order."""
    attention = a_layer(on, ".self_attn")
    forward = attention.k_proj.forward
    attention.k_proj.forward = lambda x: forward(x).roll(attention.head_dim, -1)


COMPUTED = {
    "a layer left out": layer_left_out,
    "another activation": other_activation,
    "another scale of the logits": other_logit_scale,
    "a cap of the logits": other_cap,
    "a token left out": token_left_out,
    "another epsilon of one norm": other_epsilon_of_one_norm,
    "key heads in another order, computed": other_share_of_heads,
}
EVERYWHERE = COMPUTED | {
    "a head's queries of another layer": head_of_another_layer,
    "key heads in another order": permuted_keys,
    "value heads in another order": permuted_values,
    "rows for another rotation": interleaved_rotations,
    "shards in another order": shards_in_another_order,
    "two columns exchanged": exchanged_columns,
    "a matrix read column by column": columns_first,
    "another theta of the rotations": other_theta,
    "rounded frequencies": rounded_frequencies,
    "frequencies of another type": frequencies_of_another_type,
    "inf in a matrix": infinite_number,
    "NaN in a matrix": not_a_number,
    "the sign of one number": sign_of_one_number,
    "half precision and back": half_and_back,
    "the last row not copied": last_row_left,
    "the last 8 numbers not copied": last_numbers_left,
    "half of a mapped file": half_of_a_file,
    "a tensor cut short": cut_tensor,
    "no tensor": no_tensor,
    "one row for all": one_row_for_all,
    "the mean of two steps": mean_of_steps,
    "an update taken twice": update_taken_twice,
    "digits cut, not rounded": cut_digits,
    "another grid": other_grid,
    "a further tensor": further_tensor,
    "an old layer": old_layer,
}
OF_TRAINED_NORMS = {
    "a layer's norms exchanged": exchanged_norms,
    "a row of the head": old_head_row,
    "1 added to a norm": norm_plus_one,
}
OF_EXPERTS = {
    "two router rows exchanged": exchanged_router_rows,
    "an expert of another layer": expert_of_another_layer,
    "an expert's down of another expert": down_of_another_expert,
    "gate and up interleaved": interleaved_gate_and_up,
    "one expert fewer for a token": fewer_experts,
}
OF_QUERY_NORMS = {"queries' and keys' norms exchanged": query_as_key_norm}
OF_ADAPTERS = {
    "adapters of the last step": adapters_of_the_last_step,
    "the A of another layer": a_of_another_layer,
    "adapters merged twice": merged_twice,
    "adapters merged in half precision": merged_in_half_precision,
    "a row of an adapter": another_row_of_an_adapter,
}
OF_SHARED_EXPERTS = {
    "an old shared expert": old_shared_expert,
    "an old gate of a shared expert": old_shared_gate,
    "an old bias": old_bias,
    "no bias": no_bias,
}
OF_CORRECTIONS = {"another correction of the choice of experts": other_correction}
DENSE = EVERYWHERE | OF_TRAINED_NORMS
FAULTS: dict[str, dict[str, Fault]] = {
    "dense": DENSE,
    "moe": DENSE | OF_EXPERTS | OF_QUERY_NORMS,
    "lora": EVERYWHERE | OF_ADAPTERS,
    "embedded": DENSE | OF_EXPERTS | OF_QUERY_NORMS,
    "shared expert": DENSE | OF_EXPERTS | OF_SHARED_EXPERTS,
    "deepseek": OF_CORRECTIONS,
}
OF_NO_TENSOR = faults.OF_NO_TENSOR | COMPUTED.keys() | {"one expert fewer for a token"}
