"""Our side of the comparisons with peers, as the scripts run it; the peers have their own venvs."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl_jobs
import vs_trl
import vs_vllm
from harness import HERE
from trl_jobs import SHAPES, make_job


@pytest.fixture
def run_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a script of sides/ on a job; in this process, which has torch loaded."""
    monkeypatch.syspath_prepend(HERE / "sides")

    def run(script: str, job: dict[str, Any]) -> dict[str, Any]:
        job_path, out = tmp_path / "job.json", tmp_path / "out.json"
        job_path.write_text(json.dumps(job))
        importlib.import_module(script).main(str(job_path), str(out))
        return json.loads(out.read_text())

    return run


@pytest.mark.parametrize("length", [5, (2, 9)], ids=["forced", "ragged"])
def test_our_loop_does_the_planned_work(
    tmp_path: Path, run_side: Callable[..., dict[str, Any]], length: int | tuple[int, int]
) -> None:
    shape = dataclasses.replace(
        SHAPES["a"], prompts=4, completions=4, length=length, batches=1, warmup=1, threads=1
    )
    job = make_job(shape, tmp_path)
    ours = run_side("gspo_loop", job)
    # As a stand-in for TRL's answer our own: here it is our side that is verified.
    vs_trl.verify(shape, job, ours, ours)
    assert len(ours["batches"]) == 2
    for batch in ours["batches"]:
        assert batch["total_s"] == pytest.approx(batch["rollout_s"] + batch["train_s"])
    detail = vs_trl.details(job, [(ours, ours)])
    assert detail["tokens_per_batch"] == ours["batches"][0]["trained_tokens"]
    assert ours["peak_rss_mb"] > 0


def test_unequal_work_is_noticed(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPES["a"], prompts=4, completions=4, batches=1)
    job = make_job(shape, tmp_path)
    tokens = 4 * 4 * 13
    batch = {
        "completion_tokens": tokens,
        "prompt_tokens": 4 * 4 * 14,
        "trained_tokens": tokens,
        "updates": 4,
        "cpu_s": 1.0,
        "total_s": 1.0,
    }
    check = {"logprobs": job["check"]["logprobs"], "loss": job["check"]["loss"], "grad_norm": 1.0}
    good = {"experts": "grouped_mm", "batches": [batch] * 2, "check": check}

    def changed(**values: Any) -> dict[str, Any]:
        return good | {"batches": [batch | values] * 2}

    vs_trl.verify(shape, job, good, good)
    off = [[value + 1e-3 for value in row] for row in check["logprobs"]]
    for ours, theirs, message in (
        (changed(completion_tokens=tokens - 1), good, "ours: "),
        (good, changed(prompt_tokens=1), "TRL: "),
        (changed(trained_tokens=tokens - 13), good, "equal rewards"),
        (good, changed(cpu_s=3.0), "TRL: 3.0 cores, not 2"),
        (good | {"experts": "eager"}, good, "ours: eager"),
        (good, good | {"check": check | {"logprobs": off}}, "TRL: log-probs are off by 0.001"),
        (good, good | {"check": check | {"loss": 9.0}}, "TRL: loss 9.0"),
        (good, good | {"check": check | {"grad_norm": 1.01}}, "gradient norms"),
    ):
        with pytest.raises(AssertionError, match=message):
            vs_trl.verify(shape, job, ours, theirs)


def test_the_fixed_batch_has_sequences_on_both_sides_of_the_clip(tmp_path: Path) -> None:
    batch = trl_jobs.fixed_batch(trl_jobs.long_embedded(tmp_path), seed=3)
    pairs = zip(batch["logprobs"], batch["old_logprobs"], strict=True)
    ratios = [sum(a - b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in pairs]
    clipped = [
        (a > 0 and ratio > trl_jobs.EPSILON_HIGH) or (a < 0 and ratio < -trl_jobs.EPSILON)
        for ratio, a in zip(ratios, batch["advantages"], strict=True)
    ]
    assert 0 < sum(clipped) < len(clipped)


def test_planned_lengths_are_within_the_context(tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        if shape.model == "embedded":
            longest = shape.length if isinstance(shape.length, int) else shape.length[1]
            assert shape.prompt_tokens + longest <= trl_jobs.CONTEXT, name
    job = make_job(SHAPES["d"], tmp_path)
    assert len(job["lengths"]) == 8 * 16
    assert (min(job["lengths"]) >= 10, max(job["lengths"]) <= 400) == (True, True)


def test_both_sides_learn_the_same_problems(tmp_path: Path) -> None:
    job = trl_jobs.learning_job(tmp_path, steps=2, seed=0)
    assert len(job["prompts"]) == len(job["answers"]) == 64
    assert all("".join(sorted(p)) == a for p, a in zip(job["prompts"], job["answers"], strict=True))
    assert not job["forced"]


@pytest.mark.parametrize("part", vs_vllm.PARTS)
def test_our_rollouts_are_the_models(
    tmp_path: Path,
    run_side: Callable[..., dict[str, Any]],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"PROMPTS": 4, "COMPLETIONS": 2, "LENGTH": 5, "ROUNDS": 1}.items():
        monkeypatch.setattr(vs_vllm, name, value)
    vs_vllm.build(part, tmp_path / "model")
    job = vs_vllm.make_job(tmp_path / "model", part)
    ours = run_side("gspo_generate", job)
    vs_vllm.verify("ours", job, ours)
    ours["first"][1]["logprobs"][0] += 0.01
    with pytest.raises(AssertionError, match=r"ours: log-probs are off by 0\.01"):
        vs_vllm.verify("ours", job, ours)


def test_rounds_have_prompts_of_their_own(tmp_path: Path) -> None:
    job = vs_vllm.make_job(tmp_path, "moe")
    seen = {tuple(prompt) for prompts in job["rounds"] for prompt in prompts}
    assert len(seen) == len(job["rounds"]) * vs_vllm.PROMPTS
