"""The GPU benchmarks at toy sizes on the CPU, and the FLOPs that they divide by."""

from __future__ import annotations

from typing import Any

import gpu
import gpu_decode
import gpu_logprob
import gpu_shared_prompt
import gpu_train
import pytest
import torch
from harness import Result, Unavailable
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from gspo.dev import TrainConfig


@pytest.mark.parametrize("config", [gpu.dense(tiny=True), gpu.moe(tiny=True)], ids=["dense", "moe"])
def test_flops_are_those_that_torch_counts(config: Any) -> None:
    length = 24
    lm = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = torch.arange(length)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm(tokens, use_cache=False)
    # Eager attention computes the masked half too.
    masked = length * length - length * (length + 1) // 2
    unneeded = 4 * config.num_attention_heads * config.head_dim * masked * config.num_hidden_layers
    expected = gpu.model_flops(config, [length], length) / 3 + unneeded
    assert counter.get_total_flops() == expected


def test_samples_do_not_look_at_each_other() -> None:
    config = gpu.dense(tiny=True)
    one = gpu.model_flops(config, [16], 8)
    assert gpu.model_flops(config, [16, 16], 16) == 2 * one < gpu.model_flops(config, [32], 16)


def test_full_sizes_are_those_that_the_page_names() -> None:
    with torch.device("meta"):
        for config, low, high in ((gpu.dense(), 0.5e9, 0.6e9), (gpu.moe(), 1.0e9, 1.2e9)):
            lm = AutoModelForCausalLM.from_config(config)
            assert low < sum(p.numel() for p in lm.parameters()) < high


def test_bytes_read_counts_weights_and_growing_caches() -> None:
    config = gpu.dense(tiny=True)
    weights = sum(
        p.numel() for p in AutoModelForCausalLM.from_config(config).parameters() if p.dim() == 2
    )
    assert gpu_decode.bytes_read(config, rows=0, prompt=5, length=4) == 2 * 3 * weights
    one_key = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cached = gpu_decode.bytes_read(config, 3, 5, 4) - gpu_decode.bytes_read(config, 0, 5, 4)
    assert cached == 2 * 3 * one_key * (6 + 7 + 8)


def test_training_runs() -> None:
    rows = [Result.of(row) for row in gpu_train.measure(1, tiny=True)]
    assert [row.goal for row in rows] == [0.45, None]
    for row in rows:
        assert row.ratio == pytest.approx(row.detail["flops"] / 1e12 / row.ours_s)
        assert row.machine["gpu"] == "CPU, tiny"


def test_decoding_runs() -> None:
    (row,) = gpu_decode.measure(1, tiny=True)
    assert row["detail"]["tokens_per_s"] > 0


def test_a_shared_prompt_runs_or_says_why_not() -> None:
    if "share_prefixes" in TrainConfig.model_fields:
        (row,) = gpu_shared_prompt.measure(1, tiny=True)
        assert row["detail"]["loss_gap"] < 1e-2
    else:
        with pytest.raises(Unavailable, match="share_prefixes"):
            gpu_shared_prompt.measure(1, tiny=True)


def test_logprobs_run_and_peers_are_left_out_with_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [Result.of(row) for row in gpu_logprob.measure(1, tiny=True)]
    assert [row.what for row in rows] == [
        "frozen head, full logits, autograd",
        "trained head, full logits, autograd",
    ]
    assert rows[0].ours_mb is None
    assert "d_weight" in rows[1].detail["gaps"]
    said = capsys.readouterr().err
    assert "frozen head, Liger: left out, its kernels need a CUDA device" in said
    assert "trained head, cut-cross-entropy: left out" in said


def test_a_peer_that_is_not_installed_is_named() -> None:
    card = gpu.Card("a card", "cuda", 1e12, 1e10)
    assert gpu_logprob._missing("no_such", card) == "not installed: pip install no-such"
    assert gpu_logprob._missing("torch", card) is None


def test_peers_whose_numbers_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(given: gpu_logprob.Inputs) -> gpu_logprob.Outcome:
        return gpu_logprob.logprob.ours(given._replace(coefficients=-given.coefficients))

    monkeypatch.setattr(gpu_logprob, "PEERS", {"wrong": (wrong, None)})
    with pytest.raises(AssertionError, match="d_hidden is off by 2"):
        gpu_logprob.measure(1, tiny=True)


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    benchmarks = (gpu_train, gpu_decode, gpu_shared_prompt, gpu_logprob)
    for measure in (module.measure for module in benchmarks):
        with pytest.raises(Unavailable, match="needs a CUDA device"):
            measure()


def test_an_unknown_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu.card().flops == 989e12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA X1")
    with pytest.raises(Unavailable, match="NVIDIA X1: its peak FLOP/s are unknown"):
        gpu.card()
