"""`gspo audit`: the numbers against synthetic noise, and the embedded model in every precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo import dev
from gspo.core.errors import ConfigError, ModelError
from gspo.lab.audit import AuditSpec, measure, run_audit
from gspo.lab.audit_report import AuditReport, make_report
from gspo.lab.audit_text import render
from gspo.lab.pictures import draw_audit
from gspo.train.minibatches import prepare
from support import embedded, random_groups

SETTING: dict[str, Any] = {
    "model": "m",
    "rollout_dtype": "int4",
    "task": "t",
    "prompts": 1,
    "completions": 1,
    "temperature": 1.0,
}


def synthetic(lengths: list[int], spread: float, bias: float = 0.0) -> AuditReport:
    rng = np.random.default_rng(0)
    d = [bias + spread * rng.standard_normal(length) for length in lengths]
    return make_report(d, np.array([own.mean() for own in d]), (3e-4, 4e-4), **SETTING)


def test_buckets_are_powers_of_two():
    report = synthetic([1, 2, 3, 4, 5, 8, 9, 16, 16], 0.1)
    edges = [(b.longer_than, b.up_to, b.sequences, b.tokens) for b in report.buckets]
    assert edges == [(0, 1, 1, 1), (1, 2, 1, 2), (2, 4, 2, 7), (4, 8, 2, 13), (8, 16, 3, 41)]
    assert (report.total.sequences, report.total.tokens) == (9, 64)
    assert report.total.mean_length == 64 / 9


def test_spread_falls_with_length_and_bias_does_not():
    sigma, bias = 0.1, -0.005
    report = synthetic([16] * 2000 + [64] * 2000 + [256] * 2000, sigma, bias)
    for bucket in report.buckets:
        length = bucket.up_to
        own = bucket.sequence_log_ratio
        assert own.std == pytest.approx(sigma / length**0.5, rel=0.05)
        assert own.mean == pytest.approx(bias, abs=0.002)
        assert bucket.token_log_ratio.std == pytest.approx(sigma, rel=0.02)
        assert bucket.kl == pytest.approx(-bias, abs=0.002)
    short, _, long = report.buckets
    assert short.clipped_negative < 0.7 and long.clipped_negative > 0.7
    for block in report.blocks:
        assert block.std == pytest.approx(sigma / block.tokens**0.5, rel=0.1)
    assert report.verdict == "noisy"


def test_both_kl_estimates_agree_where_mu_sampled():
    """Tokens drawn from mu: mean of -d_t and k3 both are KL(mu || pi)."""
    rng = np.random.default_rng(0)
    mu, pi = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.3, 0.3])
    tokens = rng.choice(3, size=(4000, 50), p=mu)
    d = np.log(pi / mu)[tokens]
    report = make_report(list(d), d.mean(axis=1), (3e-4, 4e-4), **SETTING)
    exact = float((mu * np.log(mu / pi)).sum())
    assert report.total.kl == pytest.approx(exact, rel=0.05)
    assert report.total.kl_k3 == pytest.approx(exact, rel=0.02)


def test_measure_is_the_trainers_path():
    policy = embedded()
    batch = prepare(random_groups(policy, groups=2), context=policy.context)
    samples = [own[0] for own in batch.samples]
    noise = measure(policy, samples)
    assert noise.lengths.tolist() == [sample.sampled for sample in samples]
    for number in (0, 5):
        sample = samples[number]
        with torch.no_grad():
            logits = policy.lm(torch.from_numpy(sample.tokens)[None]).logits[0].double()
        at = np.flatnonzero(sample.ratio_mask)
        scored = logits.log_softmax(-1)[at - 1, sample.tokens[at]].numpy()
        d = scored - sample.old_logprobs[at]
        np.testing.assert_allclose(noise.d[number], d, atol=2e-5)
        assert noise.log_ratios[number] == pytest.approx(d.mean(), abs=1e-5)


def audit(dtype: dev.RolloutDtype, **options: Any) -> AuditReport:
    spec = AuditSpec(model="embedded:sort", rollout_dtype=dtype, prompts=8, **options)
    return run_audit(spec)[0]


def test_float32_is_fine_and_int4_is_not():
    exact, coarse = audit("float32"), audit("int4")
    assert exact.total.sequences == 64
    assert exact.total.token_log_ratio.std < 1e-5
    assert exact.total.epsilon_needed < 1e-5
    assert exact.verdict == "fine" and exact.advice.endswith("fine")
    assert exact.total.clipped_positive == exact.total.clipped_negative == 0
    assert coarse.total.token_log_ratio.std > 1e3 * exact.total.token_log_ratio.std
    assert coarse.verdict == "noisy" and "raise epsilon to at least" in coarse.advice
    assert exact.routing_agreement == 1.0
    assert coarse.routing_agreement is not None and 0.9 < coarse.routing_agreement < 1.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_the_precisions_between(dtype: dev.RolloutDtype):
    report = audit(dtype, temperature=0.8)
    assert 1e-4 < report.total.token_log_ratio.std < 0.5
    assert report.total.kl_k3 > 0


def test_a_wide_clip_range_is_fine_in_any_precision():
    report = audit("int8", epsilon_low=0.5, epsilon_high=0.9)
    assert (report.epsilon_low, report.epsilon_high) == (0.5, 0.9)
    assert report.verdict == "fine"


def test_the_same_spec_gives_the_same_report():
    assert audit("int8", completions=2) == audit("int8", completions=2)


def test_text_json_and_picture(tmp_path: Path):
    spec = AuditSpec(model="embedded:sort", rollout_dtype="int4", prompts=8)
    report, noise = run_audit(spec)
    text = render(report)
    for wanted in ("9..16", "KL (k3)", "clip A<0", "[1 - 0.0003, 1 + 0.0004]", report.advice):
        assert wanted in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("verdict"))
    fields = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert fields["total"]["sequences"] == 64
    assert "routing agreement" in text and 0.9 < fields["routing_agreement"] < 1.0
    path = draw_audit(report, noise.log_ratios, tmp_path / "deep" / "a.html")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(("lengths", "spread"), [([1], 0.0), ([1, 1], 0.0), ([7], 0.1)])
def test_degenerate_noise_is_drawn_too(tmp_path: Path, lengths: list[int], spread: float):
    report = synthetic(lengths, spread)
    assert render(report)
    json.dumps(report.as_json(), allow_nan=False)
    draw_audit(report, np.zeros(len(lengths)), tmp_path / "a.html")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon_low": 0}, ConfigError, "epsilon_low = 0"),
        ({"epsilon_high": 1.5}, ConfigError, "epsilon_high = 1.5"),
        ({"temperature": 0}, ConfigError, "temperature = 0"),
        ({"rollout_dtype": "bfloat"}, ConfigError, "Did you mean 'bfloat16'"),
        ({"task": "srot"}, ConfigError, "Did you mean 'sort'"),
        ({"model": "embedded:srot"}, ModelError, "Did you mean 'sort'"),
        ({"model": "./nowhere"}, ConfigError, "name one with --task"),
        ({"model": "./nowhere", "task": "sort"}, ModelError, "not a folder"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        run_audit(AuditSpec(**{"model": "embedded:sort", "prompts": 1} | options))
