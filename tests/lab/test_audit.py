"""`gspo audit`: the trainer's own log-ratios, and the embedded model in every precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo import dev
from gspo.core.errors import ConfigError, ModelError
from gspo.lab.audit import audit_exact, measure, render_exact, run_audit
from gspo.lab.audit_report import render
from gspo.lab.pictures import draw_audit
from gspo.train.minibatches import prepare
from lab.written import as_object
from models import folder
from support import embedded, random_groups


def test_measure_is_the_trainers_path():
    policy = embedded()
    batch = prepare(random_groups(policy, groups=2), context=policy.context)
    samples = [own[0] for own in batch.samples]
    tokens, log_ratios, _ = measure(policy, samples)
    assert [len(d) for d in tokens] == [sample.sampled for sample in samples]
    for number in (0, 5):
        sample = samples[number]
        with torch.no_grad():
            logits = policy.lm(torch.from_numpy(sample.tokens)[None]).logits[0].double()
        at = np.flatnonzero(sample.ratio_mask)
        scored = logits.log_softmax(-1)[at - 1, sample.tokens[at]].numpy()
        d = scored - sample.old_logprobs[at]
        np.testing.assert_allclose(tokens[number], d, atol=2e-5)
        assert log_ratios[number] == pytest.approx(d.mean(), abs=1e-5)


def audit(dtype: dev.RolloutDtype, **options: Any) -> Any:
    report, _ = run_audit("embedded:sort", rollout_dtype=dtype, prompts=8, **options)
    return as_object(report)


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
    report, log_ratios = run_audit("embedded:sort", rollout_dtype="int4", prompts=8)
    text = render(report)
    for wanted in (
        "9..16",
        "kl k3",
        "clipped negative",
        "[1 - 0.0003, 1 + 0.0004]",
        report["advice"],
    ):
        assert wanted in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("verdict"))
    fields = as_object(report)
    assert fields.total.sequences == 64
    assert "routing agreement" in text and 0.9 < fields.routing_agreement < 1.0
    path = draw_audit(report, log_ratios, tmp_path / "deep" / "a.html")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon_low": 0}, ConfigError, "epsilon = 0"),
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
        run_audit(**{"model": "embedded:sort", "prompts": 1} | options)


def test_the_prompts_of_a_runs_file(tmp_path: Path):
    (tmp_path / "data.csv").write_text("prompt\n" + "".join(f"{n:012d}\n" for n in range(20)))
    (tmp_path / "scores.py").write_text("def same(completion, row):\n    return 0\n")
    path = tmp_path / "run.toml"
    head = 'model = "embedded:sort"\nmax_tokens = 3\n'
    path.write_text(f'{head}dataset = "data.csv"\nreward = "scores:same"\n')
    report, _ = run_audit("embedded:sort", task=str(path), prompts=8, completions=2)
    assert as_object(report).total.sequences == 2 * 2  # each held-out row once
    assert as_object(report).total.tokens <= 3 * 4
    path.write_text('model = "embedded:sort"\nrollout = "scores:same"\n')
    with pytest.raises(ConfigError, match="it has no prompts beside its rollout"):
        run_audit("embedded:sort", task=str(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_is_exact(dtype: str):
    report = audit_exact("embedded:sort", dtype)
    assert (report["exact"], report["reason"]) == (True, None)
    kinds = {part["kind"] for part in report["parts"]}
    assert {"Embedding", "Qwen3MoeRMSNorm", "Linear", "Qwen3MoeExperts", "head"} <= kinds
    assert all(report["multiple"] % part["multiple"] == 0 for part in report["parts"])
    assert "at least" in render_exact(report)
    assert f"exact: engine and trainer have the same bits in {dtype}" in render_exact(report)
    json.dumps(report)


def test_a_model_that_cannot_be_exact_says_why(tmp_path: Path):
    report = audit_exact(folder(tmp_path, "qwen3_next"))
    assert not report["exact"]
    assert render_exact(report).startswith(
        "not exact: Qwen3NextForCausalLM is not computed by gspo's attention"
    )


def test_another_precision_is_refused():
    with pytest.raises(ConfigError, match=r"--rollout-dtype int4: .* float32 or bfloat16"):
        audit_exact("embedded:sort", "int4")
