"""The engine's copy: what it rounds, that it is its own, and that it follows the trainer."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from gspo import dev
from gspo.core.errors import ModelError
from gspo.policy.policy import Policy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.serve.verbatim import chat_tokens
from gspo.weights.rollout_copy import (
    GROUP,
    RoundedCopy,
    fake_quantized,
    quantized_weights,
)
from support import embedded

TOKENS = torch.arange(6, 30)[None]
DTYPES: tuple[dev.RolloutDtype, ...] = ("float32", "bfloat16", "float16", "int8", "int4")


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.lm(TOKENS).logits.float()


def nudge(policy: Policy, size: float = 0.02) -> None:
    """An update of the trainer's weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    policy.version += 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 100])
def test_rounding_is_within_half_a_step_of_its_group(bits: Literal[8, 4], width: int):
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(3, 5, width, generator=generator) * 10 ** torch.randn(
        3, 5, 1, generator=generator
    )
    rounded = fake_quantized(weight, bits)
    size = width if bits == 8 else GROUP
    for w, q in zip(weight.split(size, dim=-1), rounded.split(size, dim=-1), strict=True):
        scale = w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((w - q).abs() <= scale / 2 * (1 + 1e-5)).all()
        steps = q / scale
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert steps.abs().max().round() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_twice_is_rounding_once_and_zeros_stay(bits: Literal[8, 4]):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    once = fake_quantized(weight, bits)
    assert (once[1] == 0).all()
    torch.testing.assert_close(fake_quantized(once, bits), once)


def test_a_nan_weight_is_not_hidden():
    weight = torch.ones(2, 64)
    weight[0, 3] = float("nan")
    rounded = fake_quantized(weight, 4)
    assert rounded[0, :32].isnan().all()
    assert rounded[1].isfinite().all()


def test_what_is_rounded():
    names = {name for name, _ in quantized_weights(embedded().lm)}
    assert len(names) == 2 * (4 + 2)
    assert {n.rpartition("layers.0.")[2] for n in names if "layers.0" in n} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_integers_leave_the_rest_alone(bits: dev.RolloutDtype):
    policy = embedded()
    own = dict(RoundedCopy(policy, bits).policy.lm.named_parameters())
    rounded = {name for name, _ in quantized_weights(policy.lm)}
    for name, weight in policy.lm.named_parameters():
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], weight) == (name not in rounded)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_half_precision(dtype: dev.RolloutDtype):
    rollout = RoundedCopy(embedded(), dtype).policy
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in rollout.lm.parameters()} == {wanted}
    with torch.no_grad():
        assert rollout.backbone(TOKENS).last_hidden_state.dtype == wanted
    # The rotary frequencies: half of their precision would misplace far tokens.
    assert {b.dtype for b in rollout.lm.buffers()} == {torch.float32}


def test_a_float32_copy_is_exact():
    policy = embedded()
    assert torch.equal(logits(RoundedCopy(policy, "float32").policy), logits(policy))


def test_noise_grows_as_bits_are_lost():
    policy = embedded()
    expected = logits(policy).log_softmax(-1)
    gap = {
        dtype: (logits(RoundedCopy(policy, dtype).policy).log_softmax(-1) - expected)
        .abs()
        .mean()
        .item()
        for dtype in DTYPES
    }
    assert gap["float32"] == 0
    assert 0 < gap["float16"] < gap["bfloat16"] < gap["int4"]
    assert gap["int8"] < gap["int4"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copy_is_its_own(dtype: dev.RolloutDtype):
    policy = embedded()
    before = copy.deepcopy(policy.lm.state_dict())
    rollout = RoundedCopy(policy, dtype).policy
    held = {p.data_ptr() for p in (*policy.lm.parameters(), *policy.lm.buffers())}
    assert held.isdisjoint(p.data_ptr() for p in (*rollout.lm.parameters(), *rollout.lm.buffers()))
    assert rollout.trainable == {}
    with torch.no_grad():
        for parameter in rollout.lm.parameters():
            parameter.fill_(7)
    assert all(torch.equal(before[n], v) for n, v in policy.lm.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_publication_follows_the_trainer(dtype: dev.RolloutDtype):
    policy = embedded()
    copied = RoundedCopy(policy, dtype)
    rollout = copied.policy
    stale = logits(rollout)
    nudge(policy)
    assert torch.equal(logits(rollout), stale) and rollout.version == 0
    assert copied.publish(policy) == rollout.version == policy.version == 1
    assert not torch.equal(logits(rollout), stale)
    assert torch.equal(logits(rollout), logits(RoundedCopy(policy, dtype).policy))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("recompute", [False, True])
def test_lora_is_merged_before_it_is_rounded(dtype: dev.RolloutDtype, recompute: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = embedded(lora=dev.LoraConfig(r=2), activation_checkpointing=recompute)
        copied = RoundedCopy(policy, dtype)
        rollout = copied.policy
        nudge(policy)
        copied.publish(policy)
    assert rollout.peft is None
    assert not any("lora" in name for name, _ in rollout.lm.named_parameters())
    if dtype == "float32":
        torch.testing.assert_close(logits(rollout), logits(policy), atol=1e-4, rtol=1e-4)
    if dtype == "int4":  # the merged weights lie on the grid; base and adapter apart would not
        for name, _ in quantized_weights(rollout.lm):
            weight = rollout.lm.get_parameter(name)
            torch.testing.assert_close(fake_quantized(weight, 4), weight)
    assert any("lora" in name for name in policy.trainable)


def test_transposed_experts_are_rounded_along_their_inputs():
    sizes: dict[str, Any] = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "vocab_size": 50,
    }
    config = GptOssConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["full_attention"],
        **sizes,
    )
    policy = embedded()
    policy.lm = AutoModelForCausalLM.from_config(config).eval()
    down = policy.lm.get_parameter("model.layers.0.mlp.experts.down_proj")  # [E, inputs, outputs]
    assert down.shape == (2, 48, 32)
    own = RoundedCopy(policy, "int8").policy.lm.get_parameter(
        "model.layers.0.mlp.experts.down_proj"
    )
    assert torch.equal(own, fake_quantized(down.detach().mT, 8).mT)


def test_experts_of_unknown_layout_are_refused():
    policy = embedded()
    del policy.lm.model.layers[1].mlp.experts.is_transposed  # pyright: ignore
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts.*use bfloat16"):
        RoundedCopy(policy, "int4")
    RoundedCopy(policy, "bfloat16")


def test_dense_models_and_their_untied_head():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    policy = embedded()
    policy.lm = AutoModelForCausalLM.from_config(config).eval()
    names = {name for name, _ in quantized_weights(policy.lm)}
    assert len(names) == 7 and "lm_head.weight" not in names
    rollout = RoundedCopy(policy, "int8").policy
    assert torch.equal(rollout.head.weight, policy.head.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_samples_in_every_precision_and_says_float32(dtype: dev.RolloutDtype):
    rollout = RoundedCopy(embedded(), dtype).policy
    rollout.version = 5
    engine = TorchEngine(rollout)
    prompt = tuple(chat_tokens(engine, [{"role": "user", "content": "918273645546"}]))
    params = SamplingParams(n=8, max_tokens=16)
    completions = engine.generate([Request(prompt, params)])[0]
    assert {version for c in completions for version in c.policy_versions} == {5}
    values = [value for c in completions for value in c.logprobs]
    assert all(isinstance(value, float) for value in values)
    stored = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(stored.float().double(), stored)  # float32 values ...
    assert not torch.equal(stored.bfloat16().double(), stored)  # ... and not half ones in disguise


@pytest.mark.parametrize("lora", [None, dev.LoraConfig(r=2)])
def test_a_publication_copies_each_weight_once(lora, monkeypatch: pytest.MonkeyPatch):
    """Into the engine's own memory; no model is copied beside it."""
    policy = embedded(lora=lora)
    copied = RoundedCopy(policy, "bfloat16")
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a model is copied"))
    written: list[int] = []

    class Written(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
                written.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    tensors = [*copied.policy.lm.parameters(), *copied.policy.lm.buffers()]
    with Written():
        copied.publish(policy)
    assert sum(written) == sum(t.numel() for t in tensors)


def test_a_copy_in_the_type_of_the_trainer_is_expected_without_a_copy():
    policy = embedded(dtype="bfloat16")
    policy.round_weights()
    _, expected = RoundedCopy(policy, "bfloat16").expected(policy)
    for name, weight in policy.lm.named_parameters():
        assert expected[name].data_ptr() == weight.data_ptr()
