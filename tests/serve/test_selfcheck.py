"""Which way of decoding each kind of layer gets, and that it is exact."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from gspo.core.errors import ModelError
from gspo.data.packing import pack
from gspo.data.sample import sample_of
from gspo.data.turn import Turn
from gspo.dev import InternalModelConfig, LoraConfig
from gspo.policy.load import load_policy
from gspo.policy.lora import add_lora
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve import selfcheck
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.selfcheck import check_engine, make_exact
from gspo.serve.torch_engine import TorchEngine
from models import folder, plain, text
from policy.routers import MOE
from policy.test_policy import tiny
from support import embedded

LAYOUTS = {
    "llama": "shared",
    "granite": "shared",
    "windows": "shared",
    "gemma2": "shared",
    "gemma4": "shared",
    "llama4": "model_cache",
    "qwen3_next": "model_cache",
    "qwen3_5": "model_cache",
    "lfm2": "model_cache",
    "jamba": "model_cache",
    "bamba": "model_cache",
    "falcon_h1": "model_cache",
    "mamba2": "model_cache",
    "minimax": "model_cache",
    "mamba": "equal_lengths",
}


def kinds() -> list[Any]:
    """Those that transformers' release can decode by a cache at all."""
    new = pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.24"),
        reason="transformers before 5.24: Mamba's cache is refused, and there is no Gemma 4",
    )
    newer = ("mamba", "gemma4")
    return [pytest.param(kind, marks=[new] * kind.startswith(newer)) for kind in LAYOUTS]


@pytest.mark.parametrize("kind", kinds())
def test_every_token_is_the_plain_forward_pass(kind: str, tmp_path: Path):
    """Prompts of three lengths, rows that end at different times, one prompt past the windows."""
    policy = load_policy(folder(tmp_path, kind))
    choose_packing(policy)
    engine = TorchEngine(policy)
    check_engine(engine)
    assert engine.layout == LAYOUTS[kind]
    asked = [
        Request(
            tuple(text(width, width).tolist()),
            SamplingParams(n=2, max_tokens=length, seed=width, ignore_eos=True),
        )
        for width, length in ((5, 12), (45, 6), (9, 20), (5, 3))
    ]
    for request, done in zip(asked, engine.generate(asked), strict=True):
        for completion in done:
            tokens = torch.tensor([*request.prompt, *completion.token_ids]).numpy()
            expected = plain(policy, tokens, len(request.prompt))
            got = torch.tensor(completion.logprobs)
            torch.testing.assert_close(got, expected, atol=5e-4, rtol=0)


def test_a_fault_does_not_hide_behind_the_rounding_of_bfloat16(monkeypatch: pytest.MonkeyPatch):
    """What is compared is computed in float32; that the model computes in its own type too."""
    policy = embedded(dtype="bfloat16")
    choose_packing(policy)
    policy.round_weights()
    before = {name: tensor.clone() for name, tensor in policy.tensors.items()}
    seen = list[torch.dtype]()

    def off_by(gap: float):
        def measured(engine: TorchEngine) -> float:
            seen.append(engine.policy.lm.dtype)
            return gap if seen[-1] == torch.float32 else 0.5

        return measured

    monkeypatch.setattr(selfcheck, "_gap", off_by(0.005))
    check_engine(TorchEngine(policy))
    assert seen == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(selfcheck, "_gap", off_by(0.02))
    with pytest.raises(ModelError, match=r"shared: off by 0\.02 nats"):
        check_engine(TorchEngine(policy))
    for name, tensor in policy.tensors.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_an_error_in_the_models_own_type_is_found_at_load(monkeypatch: pytest.MonkeyPatch):
    policy = embedded(dtype="bfloat16")
    policy.round_weights()

    def measured(engine: TorchEngine) -> float:
        if engine.policy.lm.dtype == torch.float32:
            return 0.0
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(selfcheck, "_gap", measured)
    with pytest.raises(ModelError, match=r"cannot sample from .*no such kernel"):
        check_engine(TorchEngine(policy))


def test_llama4_computes_in_bfloat16(tmp_path: Path):
    """Its scores multiply what the experts are given, and nothing casts them back."""
    policy = load_policy(folder(tmp_path, "llama4"), InternalModelConfig(dtype="bfloat16"))
    choose_packing(policy)
    policy.round_weights()
    engine = TorchEngine(policy)
    check_engine(engine)
    params = SamplingParams(n=2, max_tokens=4, seed=0, ignore_eos=True, expert_choices=True)
    for completion in engine.generate([Request((5, 6, 7), params)])[0]:
        tokens = torch.tensor([5, 6, 7, *completion.token_ids]).numpy()
        got = torch.tensor(completion.logprobs)
        torch.testing.assert_close(got, plain(policy, tokens, 3), atol=0.5, rtol=0)
        assert completion.expert_choices is not None


def test_a_state_inside_the_modules_is_refused_in_words(tmp_path: Path):
    policy = load_policy(folder(tmp_path, "recurrent_gemma"))
    choose_packing(policy)
    with pytest.raises(
        ModelError, match=r"cannot sample from RecurrentGemma.*another server works"
    ):
        check_engine(TorchEngine(policy))


def test_routes_of_a_model_with_its_own_cache(tmp_path: Path):
    policy = load_policy(folder(tmp_path, "qwen3_next"))
    choose_packing(policy)
    engine = TorchEngine(policy)
    check_engine(engine)
    params = SamplingParams(n=2, max_tokens=4, seed=0, expert_choices=True, ignore_eos=True)
    for completion in engine.generate([Request((5, 6, 7), params)])[0]:
        assert completion.expert_choices is not None
        assert completion.expert_choices.shape == (6, 4, 2)


EXACT: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"intermediate_size": 333}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {}),
    "qwen2_moe": (  # its shared expert has a gate with one output
        transformers.Qwen2MoeForCausalLM,
        transformers.Qwen2MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {"sliding_window": 16},
    ),
    "gemma2": (  # soft caps, of scores and of logits
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {"sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    **{
        f"heads of {width}": (
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig,
            {"num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": width},
        )
        for width, heads in ((2, 2), (6, 2), (66, 4))
    },
    "narrow_gpt_oss": (*MOE["gpt_oss"][:2], MOE["gpt_oss"][2] | {"intermediate_size": 36}),
    **{name: MOE[name] for name in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")},  # the last: sinks
}


def engine_of(policy: Policy) -> TorchEngine:
    choose_packing(policy)
    policy.round_weights()
    return TorchEngine(policy)


def scored(policy: Policy, requests: list[Request], answers: list[list[Completion]]) -> list[bool]:
    """Whether each completion's log-probs are those of training, however it is packed."""
    samples = [
        sample_of(
            [Turn([*request.prompt], [*c.token_ids], [*c.logprobs], c.temperature)],
            trajectory_id=number,
        )
        for number, (request, c) in enumerate(
            (request, c) for request, answer in zip(requests, answers, strict=True) for c in answer
        )
    ]
    equal = [True] * len(samples)
    for budget, share in ((10_000, True), (90, True), (10_000, False), (1, False)):
        for microbatch in pack(samples, budget, share=share):
            different = (
                policy.logprobs(microbatch).logprobs.detach() != microbatch.sampling_logprobs
            )
            for sequence in microbatch.sequence_ids[different].tolist():
                equal[microbatch.trajectory_ids[sequence]] = False
    return equal


def asked(policy: Policy, count: int = 2, tokens: int = 12) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(policy.head.size, (200,), generator=generator).tolist()
    return [
        Request(
            (*text[: length // 2], *text[-(length - length // 2) :]),
            SamplingParams(
                n=count, max_tokens=tokens, temperature=0.8, seed=length, ignore_eos=True
            ),
        )
        for length in (1, 7, 31, 32, 40)
    ]


FEW = {
    ("llama", torch.float32),
    ("heads of 2", torch.float32),
    ("qwen3_moe", torch.float32),
    ("gemma3", torch.bfloat16),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(*pair, marks=() if pair in FEW else pytest.mark.slow)
        for pair in itertools.product(EXACT, (torch.float32, torch.bfloat16))
    ],
)
def test_engine_and_trainer_are_equal_to_the_bit(kind: str, dtype: torch.dtype):
    model_class, config_class, sizes = EXACT[kind]
    policy = tiny(model_class, config_class, **sizes)
    policy.dtype = dtype
    engine = engine_of(policy)
    make_exact(engine, required=True)
    assert policy.exact
    requests = asked(policy)
    answers = []
    for engine.max_running in (512, 3):
        answers.append(engine.generate(requests))
        assert all(scored(policy, requests, answers[-1]))
    alone = [engine.generate([request])[0] for request in requests]
    assert answers[0] == answers[1] == alone


QWEN3 = (transformers.Qwen3ForCausalLM, transformers.Qwen3Config)
WIDE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "smollm2": (  # its shape, but for the number of layers
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_05b": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
    "gqa_4_x_64": (
        *QWEN3,
        {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "gqa_8_x_128": (
        *QWEN3,
        {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128},
    ),
    "gemma3_270m": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 5_000,
        },
    ),
    "gqa_2_x_128": (  # the heads of Qwen3-0.6B
        *QWEN3,
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    ),
    "experts_64": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 5_000,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 64,
        },
    ),
}


def wide(kind: str) -> Policy:
    """Two layers, with weights of a usual size."""
    model_class, config_class, sizes = WIDE[kind]
    more = {"num_hidden_layers": 2, "max_position_embeddings": 2048, "initializer_range": 0.05}
    policy = tiny(model_class, config_class, **sizes, **more)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    policy.context = 2048
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("kind", WIDE)
def test_wide_models_are_exact_too(kind: str):
    """The shapes of models that people train."""
    policy = wide(kind)
    engine = engine_of(policy)
    make_exact(engine, required=True)
    requests = asked(policy)
    answers = []
    for engine.max_running in (512, 3):
        answers.append(engine.generate(requests))
        assert all(scored(policy, requests, answers[-1]))
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("gqa_4_x_64", torch.float32),
        ("experts_64", torch.float32),
        ("smollm2", torch.bfloat16),
    ],
)
def test_long_prompts_at_a_high_temperature_are_exact_too(kind: str, dtype: torch.dtype):
    policy = wide(kind)
    policy.dtype = dtype
    engine = engine_of(policy)
    make_exact(engine, required=True)
    generator = torch.Generator().manual_seed(2)
    prompt = tuple(torch.randint(policy.head.size, (600,), generator=generator).tolist())
    params = SamplingParams(n=4, max_tokens=100, temperature=2.0, seed=5, ignore_eos=True)
    requests = [Request(prompt, params), Request(prompt[:590] + prompt[:7], params)]
    answers = engine.generate(requests)
    assert all(scored(policy, requests, answers))
    assert answers == [engine.generate([request])[0] for request in requests]


@pytest.mark.slow
def test_adapters_of_a_wide_model_are_exact_too():
    policy = wide("smollm2")
    policy.peft = add_lora(policy.lm, LoraConfig(r=8), None)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    engine = engine_of(policy)
    make_exact(engine, required=True)
    requests = asked(policy)
    assert all(scored(policy, requests, engine.generate(requests)))


def test_without_it_they_are_not():
    """The test above can fail."""
    policy = embedded()
    engine = engine_of(policy)
    requests = asked(policy)
    assert not all(scored(policy, requests, engine.generate(requests)))
    assert not policy.exact


def test_lora_and_recomputed_layers_are_exact_too():
    policy = embedded(lora=LoraConfig(r=4), activation_checkpointing=True)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    engine = engine_of(policy)
    make_exact(engine, required=True)
    requests = asked(policy)
    assert all(scored(policy, requests, engine.generate(requests)))


def test_what_cannot_be_exact_says_why(caplog: pytest.LogCaptureFixture):
    policy = tiny(*EXACT["llama"][:2])
    policy.lm.set_attn_implementation("eager")
    engine = engine_of(policy)
    check_engine(engine)
    with pytest.raises(ModelError, match=r"exact=True, but \w+ is not computed by gspo's"):
        make_exact(engine, required=True)
    assert f"decoded by {engine.layout!r}" in policy.not_exact
    caplog.set_level("INFO", logger="gspo")
    make_exact(engine, required=False)
    assert "is not computed by gspo's attention" in caplog.text
    assert not policy.exact
    assert policy.multiple == 1


def test_a_part_that_depends_on_its_call_is_named(monkeypatch: pytest.MonkeyPatch):
    policy = embedded()
    engine = engine_of(policy)
    layer: Any = policy.lm.model.layers[1]
    original = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda x: original(x) * (1 + 1e-6 * x.shape[1]))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\b|still differ by"):
        make_exact(engine, required=True)
    assert policy.multiple == 1
