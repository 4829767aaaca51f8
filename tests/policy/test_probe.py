"""The probe at load: packings that leak are seen, and so is the pass that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import checkpoint

from gspo import dev
from gspo.core.errors import ModelError
from gspo.data.packing import pack
from gspo.policy import probe
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from models import folder, sample, text

RANDOM_IN_TRAIN_MODE = ("opt", "bloom", "jitter", "xglm")


def test_a_convolution_over_the_microbatch_is_a_leak(tmp_path: Path):
    """Its weights are so small at first that log-probs hardly show it."""
    policy = load_policy(folder(tmp_path, "lfm2"))
    choose_packing(policy)
    assert policy.packing == "single"
    policy.packing = "tiles"
    (microbatch,) = pack(probe._random_samples(policy), budget=10_000)
    assert probe._trained(policy, microbatch)[1]


@pytest.mark.parametrize("kind", RANDOM_IN_TRAIN_MODE)
def test_recomputed_layers_compute_the_same(kind: str, tmp_path: Path):
    """Two passes agree with each other and with a pass without checkpointing; so do gradients."""
    items = [sample(text(n, n), 2, n) for n in (30, 20, 10)]
    results = []
    for recompute in (False, True):
        config = dev.InternalModelConfig(activation_checkpointing=recompute)
        policy = load_policy(folder(tmp_path, kind), config)
        choose_packing(policy)
        (microbatch,) = pack(items, budget=1000)
        for _ in range(2):
            logprobs = policy.logprobs(microbatch).logprobs
            grads = torch.autograd.grad(
                logprobs.sum(), [*policy.trainable.values()], allow_unused=True
            )
            results.append((logprobs.detach(), *(g for g in grads if g is not None)))
        assert not policy.lm.training
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


def test_layers_are_really_computed_again(tmp_path: Path):
    config = dev.InternalModelConfig(activation_checkpointing=True)
    policy = load_policy(folder(tmp_path, "llama"), config)
    choose_packing(policy)
    (microbatch,) = pack([sample(text(9), 2)], budget=100)
    calls = []
    backbone: Any = policy.backbone
    backbone.layers[1].mlp.register_forward_pre_hook(lambda *call: calls.append(1))
    logprobs = policy.logprobs(microbatch).logprobs
    assert len(calls) == 1
    logprobs.sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        policy.logprobs(microbatch)
    assert len(calls) == 3


def test_training_that_differs_from_evaluation_is_refused(tmp_path: Path):
    config = dev.InternalModelConfig(activation_checkpointing=True)
    policy = load_policy(folder(tmp_path, "llama"), config)

    def noise(module, args, output):
        return output * 1.3 if torch.is_grad_enabled() else output

    backbone: Any = policy.backbone
    backbone.layers[1].mlp.register_forward_hook(noise)
    with pytest.raises(ModelError, match=r"off by .* leave activation_checkpointing out"):
        choose_packing(policy)


def test_a_backward_pass_that_fails_is_a_model_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = dev.InternalModelConfig(activation_checkpointing=True)
    policy = load_policy(folder(tmp_path, "llama"), config)

    def failing(*args, **kwargs):
        raise checkpoint.CheckpointError("other tensors")

    monkeypatch.setattr("gspo.kernels.hf.checkpoint", failing)
    with pytest.raises(ModelError, match=r"other tensors\): leave activation_checkpointing out"):
        choose_packing(policy)
