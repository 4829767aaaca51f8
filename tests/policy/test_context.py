"""Nothing may depend on the length of the call: longrope, windows, chunks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from gspo import dev
from gspo.core.errors import ModelError
from gspo.data.packing import pack
from gspo.policy.context import chunk_in, probe_length, settle_context
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine
from gspo.serve.torch_engine import TorchEngine
from models import folder, model, sample, text


def loaded(path: Path, kind: str, **config) -> Policy:
    policy = load_policy(folder(path, kind), dev.InternalModelConfig(**config))
    choose_packing(policy)
    return policy


def scored(policy: Policy, samples) -> dict[int, torch.Tensor]:
    out = {}
    with torch.no_grad():
        for microbatch in pack(samples, budget=10_000):
            logprobs = policy.logprobs(microbatch).logprobs
            for s, trajectory in enumerate(microbatch.trajectory_ids):
                out[trajectory] = logprobs[microbatch.sequence_ids == s]
    return out


def test_longrope_stops_where_its_frequencies_change(tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, "gspo"):
        policy = loaded(tmp_path, "longrope")
    assert policy.context == 32
    assert "context limited to 32 tokens" in caplog.text


@pytest.mark.parametrize(("asked", "longest"), [(None, 32), (200, 200)])
def test_a_sample_is_the_same_beside_a_longer_one(tmp_path: Path, asked, longest: int):
    policy = loaded(tmp_path, "longrope", max_context=asked)
    assert policy.context == longest
    short, long = sample(text(12), 2, 0), sample(text(longest, 1), 2, 1)
    together = scored(policy, [short, long])
    torch.testing.assert_close(together[0], scored(policy, [short])[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(together[1], scored(policy, [long])[1], atol=2e-5, rtol=0)


def test_a_completion_that_crosses_the_threshold_is_the_trainers(tmp_path: Path):
    policy = loaded(tmp_path, "longrope", max_context=200)
    engine = TorchEngine(policy)
    check_engine(engine)
    params = SamplingParams(max_tokens=60, seed=2, ignore_eos=True)
    short, long = Request((5, 6, 7), params), Request(tuple(text(100).tolist()), params)
    alone, beside = engine.generate([short])[0][0], engine.generate([short, long])[0][0]
    assert alone.token_ids == beside.token_ids
    tokens = torch.tensor([5, 6, 7, *alone.token_ids]).numpy()
    items = sample(tokens, 3)
    items.temperatures[:] = 1.0
    got = scored(policy, [items])[0]
    torch.testing.assert_close(got, torch.tensor(alone.logprobs), atol=1e-4, rtol=0)


def test_long_frequencies_are_those_of_transformers_for_long_texts():
    kept, plain = model("longrope"), model("longrope")
    assert settle_context(kept, "x", 200) == 200
    tokens = torch.from_numpy(text(100))[None]
    with torch.no_grad():
        torch.testing.assert_close(kept(tokens).logits, plain(tokens).logits)
        assert (kept(tokens[:, :9]).logits - plain(tokens[:, :9]).logits).abs().max() > 0.1


def test_a_scale_that_cannot_be_fixed_is_refused():
    assert settle_context(model("phimoe"), "x", None) == 32
    with pytest.raises(ModelError, match="max_context=32 or less"):
        settle_context(model("phimoe"), "x", 200)


def test_a_context_that_the_checks_do_not_fit_into_is_refused():
    with pytest.raises(ModelError, match=r"'m' with a context of 8 tokens: give max_context=9"):
        settle_context(model("llama"), "m", 8)


def test_models_without_a_threshold_keep_their_context():
    for kind in ("llama", "windows", "bloom", "mamba"):
        lm = model(kind)
        named = getattr(lm.config, "max_position_embeddings", None) or 2**31
        assert settle_context(lm, "x", None) == named
        assert settle_context(lm, "x", 64) == 64


def test_the_probe_reaches_past_a_window_where_that_is_cheap(monkeypatch: pytest.MonkeyPatch):
    assert probe_length(model("windows"), 256) == 44
    assert probe_length(model("gemma2"), 256) == 44
    assert probe_length(model("windows"), 42) == 0  # no sample is that long
    assert probe_length(model("llama"), 256) == 0
    monkeypatch.setattr("gspo.policy.context.PROBE_WORK", 1e5)
    assert probe_length(model("windows"), 256) == 0


def test_a_window_that_is_not_heeded_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gspo.kernels import attention

    kind = attention.SharedPromptAttention
    plain = kind.within
    monkeypatch.setattr(kind, "within", lambda self, window: plain(self, None))
    assert loaded(tmp_path, "windows").packing == "mask"


def test_samples_longer_than_a_chunk_are_not_packed(tmp_path: Path):
    assert chunk_in(model("llama4"), 256) == 32
    assert loaded(tmp_path, "llama4").packing == "single"
    assert loaded(tmp_path, "llama4", max_context=32).packing == "tiles"
