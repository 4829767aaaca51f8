"""Training with an engine of its own precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gspo as art
from gspo.data.packing import pack
from gspo.policy.policy import Policy
from gspo.train.minibatches import prepare
from gspo.weights.rollout_copy import RolloutPolicy, rollout_copy


def make(dtype: art.dev.RolloutDtype | None) -> art.TrainableModel:
    return art.TrainableModel(
        name="m",
        project="p",
        base_model="embedded:sort",
        _internal_config=art.dev.InternalModelConfig(rollout_dtype=dtype),
    )


async def gather(model: art.TrainableModel) -> list[art.TrajectoryGroup]:
    async def rollout(text: str) -> art.Trajectory:
        messages = [{"role": "user", "content": text}]
        response = await model.openai_client().chat.completions.create(
            model=model.inference_name,
            messages=messages,  # pyright: ignore[reportArgumentType]
            max_tokens=16,
        )
        answer = response.choices[0]
        right = sum(
            a == b for a, b in zip(answer.message.content or "", sorted(text), strict=False)
        )
        return art.Trajectory(messages_and_choices=[*messages, answer], reward=right / 12)

    return await art.gather_trajectory_groups(
        art.TrajectoryGroup(rollout(text) for _ in range(4))
        for text in ("918273645546", "302010405060")
    )


def gap(policy: Policy, groups: list[art.TrajectoryGroup]) -> float:
    """How far the choices' log-probs are from a policy's, at most."""
    batch = prepare(groups, context=policy.context)
    (packed,) = pack([s for own in batch.samples for s in own], budget=10_000)
    with torch.no_grad():
        return (policy.logprobs(packed).logprobs - packed.old_logprobs).abs().max().item()


async def test_choices_come_from_a_copy_that_follows(tmp_path: Path):
    backend = art.LocalBackend(tmp_path)
    model = make("int4")
    await model.register(backend)
    trainer = backend.policy(model)
    for step in range(3):
        groups = await gather(model)
        versions = {c.policy_version for g in groups for t in g for c in t.choices()}  # pyright: ignore[reportAttributeAccessIssue]
        assert versions == {step}
        assert gap(rollout_copy(trainer, "int4"), groups) < 1e-4
        assert gap(trainer, groups) > 1e-2
        if step == 2:
            break
        result = await backend.train(model, groups, learning_rate=1e-3)
        assert result.metrics["mismatch/log_ratio_abs_max"] > 1e-2
    await backend.close()


async def test_without_it_the_engine_shares_the_weights(tmp_path: Path):
    backend = art.LocalBackend(tmp_path)
    model = make(None)
    await model.register(backend)
    service = backend._service(model)
    assert service.engine.policy is service.trainer.policy
    assert not isinstance(service.engine.policy, RolloutPolicy)
    await backend.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
async def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path, dtype: art.dev.RolloutDtype):
    async def steps(folder: str, count: int) -> None:
        backend = art.LocalBackend(tmp_path / folder)
        model = make(dtype)
        await model.register(backend)
        for _ in range(count):
            await backend.train(model, await gather(model), learning_rate=1e-3)
        await backend.close()

    await steps("resumed", 1)
    await steps("resumed", 1)
    await steps("whole", 2)
    one, two = (
        tmp_path / name / "p" / "m" / "checkpoints" / "0002" / "model.safetensors"
        for name in ("resumed", "whole")
    )
    assert one.read_bytes() == two.read_bytes()


async def test_a_failed_update_leaves_engine_and_trainer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    backend = art.LocalBackend(tmp_path)
    model = make("float32")
    await model.register(backend)
    groups = await gather(model)
    trainer, real = backend._service(model).trainer, backend._service(model).trainer.optimizer.step
    calls = []

    def fails_later(*arguments: object) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise FloatingPointError("the gradient is not finite")
        return real(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(trainer.optimizer, "step", fails_later)
    with pytest.raises(art.errors.NumericsError):
        await backend.train(model, groups, learning_rate=1e-2, minibatches=1, epochs=2)
    assert gap(backend.policy(model), groups) > 1e-3  # the first epoch moved the weights
    assert gap(backend.policy(model), await gather(model)) < 1e-4
    await backend.close()
