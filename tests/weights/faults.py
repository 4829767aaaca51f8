"""Ways in which a publication goes wrong, each of which leaves the engine with other weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gspo import dev
from gspo.policy.lora import add_lora
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.torch_engine import TorchEngine
from gspo.weights.receipt import Receipts
from gspo.weights.rollout_copy import RoundedCopy
from policy.routers import moe
from policy.test_policy import tiny

State = Mapping[str, Tensor]


def dense() -> Policy:
    """A dense model with a tied head; one tensor of attention is square."""
    policy = tiny(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)
    choose_packing(policy)
    return policy


def experts() -> Policy:
    """A Mixture of Experts with a head of its own."""
    return moe("qwen3_moe", tie_word_embeddings=False)


def adapted() -> Policy:
    """A dense model with LoRA adapters, which have been trained."""
    policy = dense()
    policy.peft = add_lora(policy.lm, dev.LoraConfig(r=2), None)
    update(policy, random.Random(0))
    return policy


MODELS: dict[str, Callable[[], Policy]] = {"dense": dense, "moe": experts, "lora": adapted}


def update(policy: Policy, rng: random.Random, size: float = 0.01) -> None:
    """A step of the trainer: every trained weight moves."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    policy.version += 1


def state(lm: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(lm.named_parameters()), **dict(lm.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@dataclass
class Publication:
    """What a fault may use.

    Attributes:
        sampling: the engine's, after the publication.
        policy: the trainer's.
        older: the engine's tensors before each publication, the latest last.
        dtype: of the engine.
        unused: token ids that the probe doesn't have.
        rng: chooses which tensor.
    """

    sampling: Policy
    policy: Policy
    older: list[State]
    dtype: dev.RolloutDtype
    unused: list[int]
    rng: random.Random

    @property
    def lm(self) -> nn.Module:
        return self.sampling.lm

    def matrices(self, name: str = "") -> list[nn.Parameter]:
        """Weights whose name has this in it, in the order of their layers."""
        named = [(n, p) for n, p in self.lm.named_parameters() if p.dim() > 1 and name in n]
        return [parameter for _, parameter in sorted(named)]

    def pick(self, name: str = "", old: int = -1) -> tuple[nn.Parameter, Tensor]:
        """A weight whose name has this in it, and an older value of it."""
        names = [n for n, _ in self.lm.named_parameters() if name in n]
        if self.policy.peft is not None:  # the others never change
            names = [n for n in names if "_proj" in n] or names
        chosen = self.rng.choice(names)
        return self.lm.get_parameter(chosen), self.older[old][chosen]


def dropped(on: Publication) -> None:
    weight, loaded = on.pick(old=0)
    weight.copy_(loaded)


def stale(on: Publication) -> None:
    weight, old = on.pick()
    weight.copy_(old)


def step_before_last(on: Publication) -> None:
    weight, old = on.pick(old=-2)
    weight.copy_(old)


def half_written(on: Publication) -> None:
    weight, old = on.pick("_proj")
    half = weight.numel() // 2
    weight.view(-1)[half:] = old.view(-1)[half:]


def swapped(on: Publication) -> None:
    first, second = on.rng.sample(on.matrices("q_proj"), 2)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def wrong_dtype(on: Publication) -> None:
    weight, _ = on.pick("_proj")
    fewer = torch.float8_e4m3fn if on.dtype == "bfloat16" else torch.bfloat16
    weight.copy_(weight.to(fewer).to(weight.dtype))


def transposed(on: Publication) -> None:
    square = [w for w in on.matrices() if w.dim() == 2 and w.shape[0] == w.shape[1]]
    weight = on.rng.choice(square)
    weight.copy_(weight.T.clone())


def permuted_experts(on: Publication) -> None:
    weight, _ = on.pick("mlp.experts")
    weight.copy_(weight.roll(1, dims=0))


def one_old_expert(on: Publication) -> None:
    weight, old = on.pick("mlp.experts")
    expert = on.rng.randrange(len(weight))
    weight[expert] = old[expert]


def old_router_row(on: Publication) -> None:
    weight, old = on.pick("mlp.gate.weight")
    expert = on.rng.randrange(len(weight))
    weight[expert] = old[expert]


def old_head(on: Publication) -> None:
    head = on.lm.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    old = on.older[-1]
    name = "lm_head.weight" if "lm_head.weight" in old else "model.embed_tokens.weight"
    head.weight = nn.Parameter(old[name].clone(), requires_grad=False)


def scaled_layer(on: Publication) -> None:
    layer = on.rng.randrange(3)
    for name, parameter in on.lm.named_parameters():
        if f"layers.{layer}." in name:
            parameter.mul_(1.01)


def renamed_layers(on: Publication) -> None:
    new = state(on.lm)
    for name, parameter in on.lm.named_parameters():
        for layer in range(3):
            if f"layers.{layer}." in name:
                source = name.replace(f"layers.{layer}.", f"layers.{(layer + 1) % 3}.")
                parameter.copy_(new[source])


def zeroed_norm(on: Publication) -> None:
    on.pick("norm")[0].zero_()


def unused_row(on: Publication) -> None:
    weight, old = on.pick("embed_tokens")
    row = on.rng.choice(on.unused)
    weight[row] = old[row]


def other_frequencies(on: Publication) -> None:
    buffer = on.rng.choice([b for n, b in on.lm.named_buffers() if n.endswith(".inv_freq")])
    buffer[on.rng.randrange(len(buffer))] *= 1.01


def flipped_sign(on: Publication) -> None:
    on.rng.choice(on.matrices("_proj")).neg_()


def flipped_bit(on: Publication) -> None:
    numbers = on.pick()[0].view(-1)
    bits = numbers.view({2: torch.int16, 4: torch.int32}[numbers.element_size()])
    bits[on.rng.randrange(len(bits))] ^= 1 << on.rng.randrange(8 * bits.element_size() - 1)


def swapped_bytes(on: Publication) -> None:
    """As a reader of the other byte order would have it."""
    weight = on.pick("_proj")[0].view(-1)
    size = weight.element_size()
    weight.copy_(weight.view(torch.uint8).view(-1, size).flip(1).flatten().view(weight.dtype))


def keys_as_values(on: Publication) -> None:
    """Of one head of one layer."""
    layer: Any = on.lm.get_submodule(f"model.layers.{on.rng.randrange(3)}.self_attn")
    first = layer.head_dim * on.rng.randrange(len(layer.k_proj.weight) // layer.head_dim)
    keys, values = (p.weight[first : first + layer.head_dim] for p in (layer.k_proj, layer.v_proj))
    kept = keys.clone()
    keys.copy_(values)
    values.copy_(kept)


def added_bias(on: Publication) -> None:
    layer = on.rng.choice([m for n, m in on.lm.named_modules() if n.endswith("_proj")])
    assert isinstance(layer, nn.Linear)
    layer.bias = nn.Parameter(torch.full_like(layer.weight[:, 0], 0.01), requires_grad=False)


def rounded(on: Publication) -> None:
    """One tensor, to half of the digits that it has."""
    weight, _ = on.pick()
    fewer = torch.float8_e4m3fn if weight.dtype == torch.bfloat16 else torch.bfloat16
    weight.copy_(weight.to(fewer).to(weight.dtype))


def other_type(on: Publication) -> None:
    """The same numbers, as far as the type holds them."""
    name = on.rng.choice([n for n, _ in on.lm.named_parameters() if "layers." in n])
    module = on.lm.get_submodule(name.rpartition(".")[0])
    weight = on.lm.get_parameter(name)
    kind = torch.float64 if weight.dtype == torch.float32 else torch.float32
    setattr(module, name.rpartition(".")[2], nn.Parameter(weight.to(kind), requires_grad=False))


def shared_tensor(on: Publication) -> None:
    """Two layers have the same one, which is the first one's."""
    first, second = (
        on.lm.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
        for layer in on.rng.sample(range(3), 2)
    )
    second.weight = first.weight


def other_epsilon(on: Publication) -> None:
    """No tensor differs."""
    norms: list[Any] = [m for n, m in on.lm.named_modules() if n.endswith("layernorm")]
    norm = on.rng.choice(norms)
    norm.variance_epsilon = norm.gspo_epsilon = 1e-3


def other_scale(on: Publication) -> None:
    """No tensor differs: scores of attention are multiplied by another number."""
    layer: Any = on.lm.get_submodule(f"model.layers.{on.rng.randrange(3)}.self_attn")
    layer.scaling *= 1.01


def other_rotation(on: Publication) -> None:
    """No tensor differs: longrope's and yarn's factor of the rotations is another one."""
    rotary: Any = on.lm.get_submodule("model.rotary_emb")
    rotary.attention_scaling = 1.01


def swapped_rows(on: Publication) -> None:
    weight, _ = on.pick("embed_tokens")
    rows = on.rng.sample(on.unused, 2)
    weight[rows] = weight[rows[::-1]]


def nan_in_a_row(on: Publication) -> None:
    weight, _ = on.pick("embed_tokens")
    weight[on.rng.choice(on.unused), on.rng.randrange(weight.shape[1])] = torch.nan


def denormal_in_a_row(on: Publication) -> None:
    weight, _ = on.pick("embed_tokens")
    small = torch.finfo(weight.dtype).smallest_normal / 2
    weight[on.rng.choice(on.unused), on.rng.randrange(weight.shape[1])] = small


def shifted_head(on: Publication) -> None:
    """Each row of the head is that of the token before."""
    head: Any = on.lm.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    head.weight = nn.Parameter(head.weight.roll(1, 0), requires_grad=False)


def other_tie(on: Publication) -> None:
    """A tied head gets a tensor of its own, with the same numbers; another one is tied."""
    head: Any = on.lm.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    rows: Any = on.lm.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    tied = head.weight is rows.weight
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False) if tied else rows.weight


def norm_of_another_layer(on: Publication) -> None:
    first, second = (
        on.lm.get_parameter(f"model.layers.{layer}.input_layernorm.weight")
        for layer in on.rng.sample(range(3), 2)
    )
    first.copy_(second)


def gate_as_up(on: Publication) -> None:
    """Of one expert."""
    weight, _ = on.pick("mlp.experts.gate_up_proj")
    expert = weight[on.rng.randrange(len(weight))]
    expert.copy_(expert.roll(len(expert) // 2, 0))


def shares_not_normalised(on: Publication) -> None:
    """No tensor differs: the weights of a token's experts don't add up to 1."""
    router: Any = on.lm.get_submodule(f"model.layers.{on.rng.randrange(3)}.mlp.gate")
    router.norm_topk_prob = not router.norm_topk_prob


def frozen_base(on: Publication) -> None:
    def change(other: Policy) -> None:
        for weight in other.trainable.values():
            weight.zero_()

    publish_merged(on, change)


def empty_adapter(on: Publication) -> None:
    chosen = on.rng.choice([n for n, _ in on.policy.lm.named_parameters() if "lora_B" in n])
    publish_merged(on, lambda other: other.trainable[chosen].zero_())


def other_adapter(on: Publication) -> None:
    generator = torch.Generator().manual_seed(on.rng.getrandbits(32))

    def change(other: Policy) -> None:
        for weight in other.trainable.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 50)

    publish_merged(on, change)


def exchanged_adapters(on: Publication) -> None:
    """Those of two layers, A and B."""
    layers = on.rng.sample(range(3), 2)

    def exchange(other: Policy) -> None:
        named = other.trainable
        for name, first in named.items():
            if f"layers.{layers[0]}." in name:
                second = named[name.replace(f"layers.{layers[0]}.", f"layers.{layers[1]}.")]
                kept = first.detach().clone()
                first.copy_(second)
                second.copy_(kept)

    publish_merged(on, exchange)


def other_alpha(on: Publication) -> None:
    """Of the adapters of one weight."""

    def scale(other: Policy) -> None:
        adapted: list[Any] = [m for m in other.lm.modules() if hasattr(m, "get_delta_weight")]
        adapter = on.rng.choice(adapted)
        adapter.scaling["default"] *= 2

    publish_merged(on, scale)


def publish_merged(on: Publication, change: Callable[[Policy], object]) -> None:
    """Publish what a copy of the trainer has after its adapters were changed."""
    other = copy.copy(on.policy)
    other.peft = copy.deepcopy(on.policy.peft)
    other.lm = other.peft.get_base_model()
    change(other)
    wrong = RoundedCopy(other, on.dtype).policy.lm
    for name, parameter in on.lm.named_parameters():
        parameter.copy_(wrong.get_parameter(name))


def left_hook(on: Publication) -> None:
    """No tensor differs: only what is computed with them does."""
    layers = on.lm.get_submodule("model.layers")
    layer = layers.get_submodule(str(on.rng.randrange(3)))
    layer.get_submodule("self_attn.o_proj").register_forward_hook(lambda *call: call[-1] * 1.01)


EVERYWHERE = {
    "dropped tensor": dropped,
    "stale tensor": stale,
    "tensor of the step before last": step_before_last,
    "half-written tensor": half_written,
    "two tensors swapped": swapped,
    "wrong dtype": wrong_dtype,
    "transposed matrix": transposed,
    "layer scaled by 1.01": scaled_layer,
    "layers renamed by one": renamed_layers,
    "zeroed norm": zeroed_norm,
    "one rotary frequency": other_frequencies,
    "sign flip": flipped_sign,
    "a hook left on a module": left_hook,
    "one bit of one number": flipped_bit,
    "bytes in the other order": swapped_bytes,
    "a head's keys and values exchanged": keys_as_values,
    "a bias where none is": added_bias,
    "two layers with one tensor": shared_tensor,
    "a tensor of another type": other_type,
    "another epsilon of a norm": other_epsilon,
    "another scale of the scores": other_scale,
    "another scale of the rotations": other_rotation,
}
OF_TRAINED_EMBEDDINGS = {
    "old head": old_head,
    "one row of the embedding": unused_row,
    "two unused rows exchanged": swapped_rows,
    "NaN in an unused row": nan_in_a_row,
    "a denormal number in an unused row": denormal_in_a_row,
    "rows of the head shifted by one": shifted_head,
    "a head tied or untied": other_tie,
    "the norm of another layer": norm_of_another_layer,
    "one tensor rounded": rounded,
}
OF_EXPERTS = {
    "experts permuted": permuted_experts,
    "one expert of one layer old": one_old_expert,
    "one router row old": old_router_row,
    "an expert's gate and up exchanged": gate_as_up,
    "shares of experts not normalised": shares_not_normalised,
}
OF_ADAPTERS = {
    "frozen base under LoRA": frozen_base,
    "empty adapter of one weight": empty_adapter,
    "adapter of another seed": other_adapter,
    "adapters of two layers exchanged": exchanged_adapters,
    "another alpha of an adapter": other_alpha,
}
Fault = Callable[[Publication], None]
FAULTS: dict[str, dict[str, Fault]] = {
    "dense": EVERYWHERE | OF_TRAINED_EMBEDDINGS,
    "moe": EVERYWHERE | OF_TRAINED_EMBEDDINGS | OF_EXPERTS,
    "lora": EVERYWHERE | OF_ADAPTERS,
}


class Street:
    """A trainer, an engine with a copy of its own, and the receipts between them."""

    def __init__(self, policy: Policy, dtype: dev.RolloutDtype, seed: int = 0):
        self.policy, self.rng = policy, random.Random(seed)
        self.dtype: dev.RolloutDtype = dtype
        self.publisher = RoundedCopy(policy, dtype)
        self.engine = TorchEngine(self.publisher.policy)
        self.receipts = Receipts(policy, self.publisher.policy, self.publisher)
        self.engine.receipts = self.receipts
        self.receipts.prove(self.engine, policy.version)
        self.older: list[State] = []

    def publish(self, fault: Fault | None = None) -> dict[str, float]:
        """Train a step and publish it, with a fault."""
        update(self.policy, self.rng)
        sampling, honest = self.publisher.policy, type(self.publisher).publish
        self.older.append(state(sampling.lm))
        used = self.receipts._probe.tokens.tolist()
        unused = [token for token in range(100) if token not in used]

        def publish(policy: Policy) -> int:
            version = honest(self.publisher, policy)
            if fault is not None:
                on = Publication(sampling, self.policy, self.older, self.dtype, unused, self.rng)
                with torch.no_grad():
                    fault(on)
            return version

        self.publisher.publish = publish
        return self.receipts.publish(self.engine)


OF_NO_TENSOR = {
    "another epsilon of a norm",
    "another scale of the scores",
    "another scale of the rotations",
}
