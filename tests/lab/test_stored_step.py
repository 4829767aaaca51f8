"""A stored step: batch and weights, or why they cannot be had; a method's gradient there."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo import dev
from gspo.backend import loading
from gspo.core.errors import CheckpointError, DataError, ModelError, RunError
from gspo.data.packing import pack
from gspo.lab.stored_step import StoredStep, cosines, gram, method_gradient
from gspo.objective import PRESETS, policy_loss
from gspo.policy.policy import Policy
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import Settings, resolve
from gspo.train.trainer import Trainer
from lab.test_inspect_batch import a_run
from support import embedded, gradient_of, random_groups


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step; nothing of it may be changed."""
    return asyncio.run(a_run(tmp_path_factory.mktemp("run"), steps=1))


def test_the_last_step_is_taken_if_none_is_named(run: Path):
    step = StoredStep(run)
    assert (step.number, len(step.groups)) == (1, 3)
    assert step.weights_of("before") == "embedded:sort"
    assert step.weights_of("after") == "checkpoint 0001"
    with pytest.raises(RunError, match="has no batch of step 2: it has those of 1 to 1"):
        StoredStep(run, 2)


async def test_weights_of_another_version_are_refused(tmp_path: Path):
    """A call of train that failed half-way has moved the weights without a checkpoint."""
    run = await a_run(tmp_path)
    state = run / "checkpoints" / "0001" / "trainer.json"
    fields = json.loads(state.read_text()) | {"policy_version": 3}
    step = StoredStep(run, 2)
    record = step.record
    step.record = dataclasses.replace(record, policy_version=4)
    with pytest.raises(
        CheckpointError, match=r"policy version 4, but checkpoint 0001 is version 1"
    ):
        step.load("before")
    state.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"trainer\.json is damaged"):
        step.load("before")


def test_what_is_no_run_is_named(tmp_path: Path, run: Path):
    with pytest.raises(RunError, match=r"not the folder of a run.*<path>/<project>/<name>"):
        StoredStep(tmp_path)
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(RunError, match="has not trained a step yet"):
        StoredStep(tmp_path)


def test_a_model_without_a_longest_context_can_be_inspected(run: Path):
    step = StoredStep(run, 1)
    step.record = dataclasses.replace(step.record, context=2**31)
    trainer = step.load("before")
    assert trainer.policy.context > 0 and trainer.step == 0


def test_code_of_the_models_folder_runs_only_if_the_run_allowed_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(source: str, config: dev.InternalModelConfig, **options: Any):
        if not config.trust_remote_code:
            raise ModelError("say so: dev.InternalModelConfig(trust_remote_code=True)")
        raise ModelError("loaded with trust")

    monkeypatch.setattr(loading, "load_policy", load)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    with pytest.raises(ModelError, match="say so"):
        StoredStep(copy, 1).load("before")
    for stored in ('{"task": "sort", "load": {"trust_remote_code": false}}', "[", "[1]"):
        (copy / "spec.json").write_text(stored)
        with pytest.raises(ModelError, match="say so"):
            StoredStep(copy, 1).load("before")
    (copy / "spec.json").write_text('{"task": "sort", "load": {"trust_remote_code": true}}')
    with pytest.raises(ModelError, match="loaded with trust"):
        StoredStep(copy, 1).load("before")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


@pytest.fixture(scope="module")
def groups(policy: Policy):
    """Old log-probs near the policy's own, so that every method clips some and not all."""
    out = random_groups(policy, groups=4)
    for trajectory in out[3]:
        trajectory.reward = 0.5
    batch = prepare(out, context=policy.context)
    (microbatch,) = pack([s for samples in batch.samples for s in samples], 10_000)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        scored = policy.logprobs(microbatch).logprobs
    spread = 0.3 * torch.randn(len(scored), generator=noise)
    old = (scored - spread).clamp(max=0.0)
    start = 0
    for trajectory in (t for group in out for t in group):
        (choice,) = trajectory.choices()
        size = len(choice.token_ids)  # pyright: ignore[reportAttributeAccessIssue]
        choice.token_logprobs = old[start : start + size].tolist()  # pyright: ignore
        start += size
    return out


def settings_of(name: str, **options) -> Settings:
    return resolve(options=dev.TrainConfig(algorithm=name, **options))  # pyright: ignore


def batch_of(policy: Policy, groups, settings: Settings) -> RolloutBatch:
    return prepare(groups, settings, context=policy.context)


def naive(policy: Policy, groups, settings: Settings) -> tuple[float, list[torch.Tensor]]:
    """One forward pass of the whole model per sample, full logits, one loss, one backward."""
    batch = batch_of(policy, groups, settings)
    counted = batch if settings.preset.counts_flat else batch.with_signal()
    logprobs, old, ids, advantages = [], [], [], []
    for (sample,) in counted.samples:
        tokens = torch.from_numpy(sample.tokens)[None]
        scored = policy.lm(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        mask = torch.from_numpy(sample.ratio_mask)
        logprobs.append(scored.gather(-1, tokens[0, 1:, None]).squeeze(-1)[mask[1:]])
        old.append(torch.from_numpy(sample.old_logprobs)[mask])
        ids.append(torch.full((sample.sampled,), len(advantages)))
        advantages.append(sample.advantage)
    out = policy_loss(
        torch.cat(logprobs),
        torch.cat(old),
        torch.cat(ids),
        torch.tensor(advantages),
        settings.objective,
    )
    parameters = list(policy.trainable.values())
    gradients = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return out.loss.item(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]


def measured(policy: Policy, groups, settings: Settings) -> tuple[dict[str, float], list]:
    batch = batch_of(policy, groups, settings)
    batch = batch if settings.preset.counts_flat else batch.with_signal()
    watch, gradient = method_gradient(Trainer(policy), batch, settings)
    return watch.metrics.compute(), gradient


def test_each_method_equals_a_naive_loop(policy: Policy, groups):
    clipping, gradients = set(), {}
    for name in PRESETS:
        settings = settings_of(name)
        metrics, gradient = measured(policy, groups, settings)
        loss, expected = naive(policy, groups, settings)
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-4, abs=1e-6), name
        scale = max(part.abs().max().item() for part in expected)
        assert scale > 0
        for got, part in zip(gradient, expected, strict=True):
            torch.testing.assert_close(got, part, rtol=1e-4, atol=1e-5 * scale, msg=name)
        square = sum(part.double().square().sum().item() for part in expected)
        assert gram([gradient]).item() == pytest.approx(square, rel=1e-4)
        clipping |= {name} if metrics["ratio/clip_fraction_tokens"] else set()
        gradients[name] = gradient
    assert {"gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "luspo"} <= clipping
    (_, pair), _ = cosines(gram([gradients["gspo"], gradients["grpo"]]))
    assert pair is not None and pair < 0.99
    (_, pair), _ = cosines(products := gram([gradients["gspo"], gradients["gspo_token"]]))
    assert pair == pytest.approx(1.0, abs=1e-6)
    assert products[0, 0].item() == pytest.approx(products[1, 1].item(), rel=1e-5)


@pytest.mark.parametrize("name", ["gspo", "dapo", "reinforce"])
def test_gradient_and_metrics_are_those_of_a_training_step(policy: Policy, groups, name: str):
    settings = settings_of(name)
    metrics, gradient = measured(policy, groups, settings)
    expected, known = gradient_of(policy, batch_of(policy, groups, settings), settings)
    for got, part in zip(gradient, expected.values(), strict=True):
        torch.testing.assert_close(got, part, rtol=1e-4, atol=1e-7)
    for metric in ("loss/policy", "ratio/clip_fraction", "ratio/clip_fraction_tokens"):
        assert metrics[metric] == pytest.approx(known[metric], rel=1e-5, abs=1e-7), metric


def test_nothing_is_left_on_the_policy(policy: Policy, groups):
    weights = {name: p.detach().clone() for name, p in policy.trainable.items()}
    first = measured(policy, groups, settings_of("gspo"))
    assert all(p.grad is None for p in policy.trainable.values())
    assert all(torch.equal(p, weights[name]) for name, p in policy.trainable.items())
    again = measured(policy, groups, settings_of("gspo"))
    assert all(map(torch.equal, first[1], again[1]))


def test_the_load_balancing_loss_is_left_out(policy: Policy, groups):
    _, plain = measured(policy, groups, settings_of("gspo"))
    metrics, balanced = measured(policy, groups, settings_of("gspo", router_aux_loss_coef=1.0))
    assert all(map(torch.equal, plain, balanced)) and "loss/router_aux" not in metrics


def test_a_replay_without_expert_choices_is_refused(policy: Policy, groups):
    with pytest.raises(DataError, match="without expert choices"):
        measured(policy, groups, settings_of("gspo", routing_replay="rollout"))


def test_no_method_has_a_gradient_on_flat_groups(policy: Policy, groups):
    gradients = [measured(policy, groups[3:], settings_of(n))[1] for n in ("gspo", "dapo")]
    assert gram(gradients).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert cosines(gram(gradients)) == [[None, None], [None, None]]


def test_the_dot_products_are_exact_where_float32_is_not():
    big = torch.full((3_000_000,), 1.0)
    small = torch.full((3_000_000,), 1e-4)
    assert gram([[big, big], [small, small]])[0, 1].item() == pytest.approx(
        6e6 * float(small[0]), rel=1e-12
    )
