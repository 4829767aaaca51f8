"""The packed forward pass against the model's own: packed, unpacked, any split, any neighbour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from gspo import dev
from gspo.core.errors import ModelError
from gspo.data.packing import pack
from gspo.kernels import attention
from gspo.policy.embedded import build_tokenizer
from gspo.policy.load import caps_or_sinks
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.minibatches import prepare
from support import embedded, random_groups


def samples(policy: Policy, temperature: float = 1.0):
    batch = prepare(random_groups(policy, temperature=temperature), context=policy.context)
    return [sample for group in batch.samples for sample in group]


def plain(policy: Policy, sample) -> torch.Tensor:
    """Log-probs of one sample by a forward pass of the model on it only, from full logits."""
    tokens = torch.from_numpy(sample.tokens)[None]
    with torch.no_grad():
        logits = policy.lm(input_ids=tokens).logits[0, :-1].float()
    temperature = torch.from_numpy(sample.temperatures)[1:, None]
    logp = (logits / temperature).log_softmax(-1).gather(-1, tokens[0, 1:, None]).squeeze(-1)
    return logp[torch.from_numpy(sample.ratio_mask)[1:]]


def scored(policy: Policy, items, budget: int) -> dict[int, torch.Tensor]:
    """Log-probs by trajectory."""
    out = {}
    with torch.no_grad():
        for microbatch in pack(items, budget):
            logprobs = policy.logprobs(microbatch).logprobs
            for s, trajectory in enumerate(microbatch.trajectory_ids):
                out[trajectory] = logprobs[microbatch.sequence_ids == s]
    return out


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("packing", ["tiles", "mask", "single"])
def test_packed_equals_the_models_own(policy: Policy, packing, temperature: float):
    policy.packing = packing
    items = samples(policy, temperature)
    for budget in (1, 64, 10_000):
        got = scored(policy, items, budget)
        for sample in items:
            expected = plain(policy, sample)
            torch.testing.assert_close(got[sample.trajectory_id], expected, atol=2e-5, rtol=0)
    policy.packing = "tiles"


def tiny(model_class, config_class, **extra) -> Policy:
    torch.manual_seed(0)
    usual: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = config_class(**(usual | extra))
    lm = model_class(config).eval()
    if lm.config._attn_implementation == "sdpa" or caps_or_sinks(lm):
        lm.set_attn_implementation(attention.PACKED)
    # Weights large enough that a leak between samples would show.
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return Policy(lm, None, build_tokenizer(), model_class.__name__, torch.float32, 128)


GPT_OSS = {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
# The config names a window, but no layer has it.
GEMMA2 = {
    "sliding_window": 5,
    "layer_types": ["full_attention"] * 3,
    "attn_logit_softcapping": 2.0,
}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, "tiles"),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}, "tiles"),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 5, "final_logit_softcapping": 4.0},
        "tiles",
    ),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, GPT_OSS, "tiles"),  # sinks
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA2, "tiles"),  # soft caps
    # With transformers' own attention: its masks take over.
    "gpt_oss_eager": (GptOssForCausalLM, GptOssConfig, GPT_OSS, "mask"),
    "gemma2_eager": (Gemma2ForCausalLM, Gemma2Config, GEMMA2, "mask"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_is_packed_exactly(name: str):
    model_class, config_class, extra, packing = ARCHITECTURES[name]
    policy = tiny(model_class, config_class, **extra)
    if packing == "mask":
        policy.lm.set_attn_implementation("eager")
    choose_packing(policy)
    assert policy.packing == packing
    items = samples(policy)
    got = scored(policy, items, 10_000)
    for sample in items:
        expected = plain(policy, sample)
        torch.testing.assert_close(got[sample.trajectory_id], expected, atol=5e-5, rtol=1e-5)


def test_probe_refuses_a_head_that_it_does_not_know(policy: Policy):
    broken = tiny(LlamaForCausalLM, LlamaConfig)
    own = broken.lm.forward

    def doubled(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    broken.lm.forward = doubled  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="not supported"):
        choose_packing(broken)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        policy = embedded(activation_checkpointing=checkpointing)
        policy.lm.train(checkpointing)
        for microbatch in pack(samples(policy), 10_000):
            policy.logprobs(microbatch).logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in policy.trainable.values() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plainly, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plainly, recomputed, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_near_and_its_logprobs_float32(policy: Policy):
    low = embedded(dtype="bfloat16")
    low.round_weights()
    items = samples(policy)
    exact, rough = scored(policy, items, 10_000), scored(low, items, 10_000)
    assert {value.dtype for value in rough.values()} == {torch.float32}
    # Over all tokens and generously: processors round bfloat16 products in different orders.
    gaps = torch.cat([(rough[key] - value).abs() for key, value in exact.items()])
    assert 0 < gaps.median() < 0.3


@pytest.mark.parametrize("lora", [None, dev.LoraConfig(r=2)])
def test_rounding_keeps_the_float32_weights_of_what_is_trained(lora):
    policy, exact = embedded(lora=lora, dtype="bfloat16"), embedded(lora=lora)
    masters = policy.round_weights()
    assert {p.dtype for p in policy.lm.parameters()} == {torch.bfloat16}  # experts, adapters, head
    before = dict(exact.lm.named_parameters())
    assert list(masters) == list(policy.trainable)
    for name, weight in policy.lm.named_parameters():
        assert torch.equal(weight, before[name].bfloat16())
        assert name not in masters or torch.equal(masters[name], before[name])
    assert all(b.dtype != torch.bfloat16 for b in policy.lm.buffers())  # rotary frequencies


def test_gradients_of_microbatches_add_up_in_float32():
    policy = embedded(dtype="bfloat16")
    policy.round_weights()
    batch = prepare(random_groups(policy), context=512)
    parts = pack([s for own in batch.samples for s in own], budget=60)
    assert len(parts) > 2
    expected: dict[str, torch.Tensor] = {}
    for part in parts:
        loss = policy.logprobs(part).logprobs.sum()
        found = torch.autograd.grad(loss, list(policy.trainable.values()), allow_unused=True)
        for name, gradient in zip(policy.trainable, found, strict=True):
            if gradient is not None:
                assert gradient.dtype == torch.float32
                expected[name] = expected.get(name, 0) + gradient
        policy.logprobs(part).logprobs.sum().backward()
    for name, gradient in expected.items():
        grad = policy.trainable[name].grad
        assert grad is not None and grad.dtype == torch.float32
        torch.testing.assert_close(grad, gradient, atol=1e-5, rtol=1e-5)
        # A sum in bfloat16 would hold fewer digits.
        assert (grad != grad.bfloat16().float()).any() or not grad.any(), name


@pytest.mark.parametrize("lora", [None, dev.LoraConfig(r=2)])
def test_no_weight_is_cast_in_a_step_but_routers_and_the_cpus_head(lora):
    """The head's blocks become float32 on a CPU; a GPU multiplies them as they are."""
    policy = embedded(lora=lora, dtype="bfloat16")
    policy.round_weights()
    weights = {p.data_ptr(): n for n, p in policy.lm.named_parameters()}
    cast: list[str] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                cast.append(weights[args[0].data_ptr()])
            return func(*args, **(kwargs or {}))

    (microbatch,) = pack(prepare(random_groups(policy), context=512).samples[0], budget=100)
    with Casts():
        policy.logprobs(microbatch).logprobs.sum().backward()
    assert all(".mlp.gate." in name or name == "model.embed_tokens.weight" for name in cast), cast
    assert len(cast) <= 2 * len(policy.routers.modules) + 2


def test_a_head_with_an_adapter_is_refused_by_its_class_and_with_the_remedy():
    with pytest.raises(ModelError, match=r"head is .*peft\..*Linear.*leave lm_head out"):
        embedded(lora=dev.LoraConfig(r=2, target_modules=["lm_head"]))
