"""Constant factors and caps between output head and logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gspo import dev
from gspo.core.errors import ModelError
from gspo.data.packing import pack
from gspo.kernels.logprob import full_logits
from gspo.policy.load import load_policy
from gspo.policy.logits import logit_scale, soft_cap
from gspo.policy.probe import choose_packing
from gspo.weights.rollout_copy import RoundedCopy
from models import folder, model, plain, sample, text

SCALES = {"llama": 1.0, "granite": 1 / 6.0, "cohere": 0.0625, "falcon_h1": 0.3, "gemma2": 1.0}


@pytest.mark.parametrize("kind", SCALES)
def test_the_factor_is_a_number_of_the_config(kind: str):
    assert logit_scale(model(kind)) == SCALES[kind]


def test_caps_have_two_names():
    assert soft_cap(model("gemma2")) == 5.0
    assert soft_cap(model("recurrent_gemma")) == 30.0
    assert soft_cap(model("llama")) is None


@pytest.mark.parametrize("kind", SCALES)
def test_logprobs_and_gradients_are_the_models_own(kind: str, tmp_path: Path):
    policy = load_policy(folder(tmp_path, kind))
    choose_packing(policy)
    items = [sample(text(n, n), 3, n) for n in (9, 14)]
    names = ("head", "first")
    weights = [policy.head.weight, next(iter(policy.backbone.parameters()))]

    ids = [torch.from_numpy(item.tokens)[None] for item in items]
    expected = []
    for tokens in ids:
        logits = policy.lm(input_ids=tokens, use_cache=False).logits[0, :-1] / 0.7
        picked = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None]).squeeze(-1)
        expected.append(picked[2:])
    wanted = torch.autograd.grad(torch.cat(expected).sum(), weights)

    (microbatch,) = pack(items, budget=1000)
    got = policy.logprobs(microbatch).logprobs
    order = sorted(range(2), key=lambda s: microbatch.trajectory_ids[s])
    by_sample = torch.cat([got[microbatch.sequence_ids == s] for s in order])
    torch.testing.assert_close(by_sample, torch.cat(expected), atol=1e-5, rtol=0)
    for name, g, w in zip(names, torch.autograd.grad(got.sum(), weights), wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4, msg=name)


def test_a_rollout_copy_has_the_factor(tmp_path: Path):
    policy = load_policy(folder(tmp_path, "granite"))
    copy = RoundedCopy(policy, "bfloat16").policy
    assert copy.logit_scale == policy.logit_scale == 1 / 6.0
    hidden = torch.randn(3, 32)
    rough, exact = full_logits(hidden, copy.head), full_logits(hidden, policy.head)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_anything_else_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = load_policy(folder(tmp_path, "llama"))
    inner = policy.lm.forward

    def squared(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(policy.lm, "forward", squared)
    assert logit_scale(policy.lm) == 1.0
    with pytest.raises(ModelError, match="log-probs differ from those of LlamaForCausalLM itself"):
        choose_packing(policy)


def test_rows_behind_the_tokens_have_no_probability(tmp_path: Path):
    """The tokenizer has 103 entries, the head 128."""
    config = dev.InternalModelConfig()
    policy = load_policy(folder(tmp_path, "llama", vocab_size=128), config)
    choose_packing(policy)
    assert (policy.head.weight.shape[0], policy.head.size) == (128, 103)
    item = sample(text(12), 3)
    (microbatch,) = pack([item], budget=100)
    got = policy.logprobs(microbatch).logprobs
    torch.testing.assert_close(got, plain(policy, item.tokens, 3, 0.7), atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(got.sum(), [policy.head.weight])
    assert not grad[103:].any() and bool(grad[:103].any())
    assert full_logits(torch.randn(2, 32), policy.head).shape == (2, 103)
