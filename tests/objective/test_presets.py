"""Every preset against its loop over Python floats, and the identities between presets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample, trajectory_samples, unit_count
from gspo.objective import PRESETS, LossOutput, Objective, policy_loss
from objective.cases import GARBAGE, cases, in_order, near, only, padded, shuffled
from objective.naive import Case
from objective.naive_presets import LOOPS, gspo, gspo_token, loop, luspo
from support import choice, trajectory

NAMES = sorted(PRESETS)
SEEDS = st.integers(0, 2**16)


def test_every_preset_has_a_loop() -> None:
    assert set(LOOPS) == set(PRESETS)


def likely(case: Case) -> Case:
    """The case with the same log-ratios, and log-probs that are: none above 0."""
    shift = np.maximum(case.new, 0)
    return replace(case, new=case.new - shift, old=case.old - shift)


def evaluate(
    case: Case,
    objective: Objective,
    layout: np.ndarray,
    *,
    sequences: int | None = None,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[LossOutput, np.ndarray]:
    """The library's output and gradient, by token of the case; garbage where none was sampled."""
    rng = np.random.default_rng(layout.size)
    sampled = (layout >= 0) & case.sampled[layout]

    def tensor(values: np.ndarray) -> Tensor:
        junk = rng.choice(GARBAGE, layout.shape)
        return torch.tensor(np.where(sampled, values[layout], junk), dtype=dtype)

    new = tensor(case.new).requires_grad_()
    out = policy_loss(
        new,
        tensor(case.old),
        torch.tensor(np.where(sampled, case.ids[layout], -7)),
        torch.tensor(case.advantages, dtype=dtype),
        objective,
        ratio_mask=torch.tensor(sampled),
        loss_mask=torch.tensor(case.trained[layout]),
        total_sequences=sequences,
        total_tokens=tokens,
        reference_logprobs=tensor(case.reference) if objective.kl_coef else None,
    )
    out.loss.backward()
    assert new.grad is not None
    gradient = np.zeros(len(case.ids))
    gradient[layout[sampled]] = new.grad.double().numpy()[sampled]
    assert not new.grad.numpy()[~sampled].any()
    return out, gradient


def trained_tokens(case: Case) -> int:
    return int((case.sampled & case.trained).sum())


@pytest.mark.parametrize("name", NAMES)
@given(case=cases(max_length=60).map(likely), seed=SEEDS)
def test_loss_and_gradient_equal_the_loop(name: str, case: Case, seed: int) -> None:
    value, divisor = LOOPS[name]
    extra = seed % 3  # sequences and tokens of the step that lie in other microbatches
    sequences, tokens = case.count + extra, trained_tokens(case) + extra
    expected = loop(case, value, sequences if divisor == "N" else max(tokens, 1))
    assume(expected.margin > 1e-12)
    rng = np.random.default_rng(seed)
    layout = (in_order(case), shuffled(case, rng), padded(case, rng))[seed % 3]
    objective = PRESETS[name].objective
    out, gradient = evaluate(case, objective, layout, sequences=sequences, tokens=tokens)
    least = 1e-25 * (name == "vespo")  # its log-weight is bounded below at -80
    near(out.loss.item(), expected.loss, 1e-10 * expected.loss_scale + least)
    near(gradient, expected.gradient, 1e-10 * expected.gradient_scale + least)
    assert out.clipped_tokens.tolist() == expected.clipped


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(case=cases(max_length=30).map(likely))
def test_float32_is_finite_and_near_the_loop(name: str, case: Case) -> None:
    value, divisor = LOOPS[name]
    total = case.count if divisor == "N" else max(trained_tokens(case), 1)
    expected = loop(case, value, total)
    out, gradient = evaluate(case, PRESETS[name].objective, in_order(case), dtype=torch.float32)
    assert torch.isfinite(out.loss)
    assert np.isfinite(gradient).all()
    assume(expected.margin > 5e-6)
    near(out.loss.item(), expected.loss, 1e-4 * expected.loss_scale + 1e-25)
    near(gradient, expected.gradient, 1e-4 * expected.gradient_scale + 1e-25)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(case=cases(max_length=30, max_sequences=8).map(likely), seed=SEEDS)
def test_microbatches_add_up_to_the_whole(name: str, case: Case, seed: int) -> None:
    value, divisor = LOOPS[name]
    tokens = max(trained_tokens(case), 1)
    expected = loop(case, value, case.count if divisor == "N" else tokens)
    assume(expected.margin > 1e-12)
    rng = np.random.default_rng(seed)
    loss, gradient = 0.0, np.zeros(len(case.ids))
    for part in np.array_split(rng.permutation(case.count), rng.integers(1, case.count + 1)):
        some, where = only(case, part.tolist())
        order, objective = shuffled(some, rng), PRESETS[name].objective
        out, own = evaluate(some, objective, order, sequences=case.count, tokens=tokens)
        loss += out.loss.item()
        gradient[where] += own
    near(loss, expected.loss, 1e-10 * expected.loss_scale + 1e-25)
    near(gradient, expected.gradient, 1e-10 * expected.gradient_scale + 1e-25)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "luspo"])
@given(case=cases(max_length=60), scale=st.sampled_from([3e-4, 0.2, 1.0]))
def test_sqrt_length_divides_the_range_by_the_root_of_the_length(
    name: str, case: Case, scale: float
) -> None:
    low, high = scale, 1.25 * scale
    values = {"gspo": gspo, "gspo_token": gspo_token, "luspo": luspo}
    expected = loop(
        case,
        lambda one: values[name](one, low / one.length**0.5, high / one.length**0.5),
        case.count,
    )
    assume(expected.margin > 1e-12)
    objective = replace(
        PRESETS[name].objective, epsilon_low=low, epsilon_high=high, epsilon_scale="sqrt_length"
    )
    out, gradient = evaluate(case, objective, padded(case, np.random.default_rng(3)))
    near(out.loss.item(), expected.loss, 1e-10 * expected.loss_scale)
    near(gradient, expected.gradient, 1e-10 * expected.gradient_scale)
    assert out.clipped_tokens.tolist() == expected.clipped


# Identities


@given(case=cases(max_length=60))
def test_the_gate_of_sapo_is_1_at_ratio_1(case: Case) -> None:
    on_policy = replace(case, old=case.new)
    _, sapo = evaluate(on_policy, PRESETS["sapo"].objective, in_order(case))
    _, grpo = evaluate(on_policy, PRESETS["grpo"].objective, in_order(case))
    near(sapo, grpo, 1e-12 * np.abs(grpo))


@given(case=cases(max_length=60, max_sequences=1))
def test_luspo_is_gspo_times_the_length(case: Case) -> None:
    like_luspo = PRESETS["gspo"].objective.with_epsilon(2e-3, 2.5e-3)
    out, gradient = evaluate(case, like_luspo, in_order(case))
    times, times_gradient = evaluate(case, PRESETS["luspo"].objective, in_order(case))
    length = int(case.sampled.sum())
    near(times.loss.item(), length * out.loss.item(), 1e-12 * abs(times.loss.item()))
    near(times_gradient, length * gradient, 1e-12 * np.abs(times_gradient))
    assert times.clipped_tokens.tolist() == out.clipped_tokens.tolist()


@given(d=st.lists(st.floats(-80, 1e4), min_size=1, max_size=30), seed=SEEDS)
def test_cispo_drops_no_token(d: list[float], seed: int) -> None:
    """Whatever the ratio (below e^-80 it may round to 0), every trained token has a gradient."""
    rng = np.random.default_rng(seed)
    old, new = torch.tensor(d, dtype=torch.float32).neg(), torch.zeros(len(d), requires_grad=True)
    trained = torch.tensor(rng.random(len(d)) < 0.8)
    out = policy_loss(
        new,
        old,
        torch.zeros(len(d), dtype=torch.long),
        torch.tensor([float(rng.choice([-2.0, 0.5]))]),
        PRESETS["cispo"].objective,
        loss_mask=trained,
    )
    out.loss.backward()
    assert new.grad is not None
    assert ((new.grad != 0) == trained).all()
    assert torch.isfinite(new.grad).all()
    truncated = trained & (-old.double() > math.log(5))
    assert out.clipped_tokens.item() == truncated.sum()


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
@given(case=cases(max_length=30).map(likely), seed=SEEDS)
def test_likelihood_presets_have_no_ratio(name: str, case: Case, seed: int) -> None:
    other = -np.random.default_rng(seed).uniform(0, 50, len(case.old))
    out, gradient = evaluate(case, PRESETS[name].objective, in_order(case))
    same, same_gradient = evaluate(
        replace(case, old=other), PRESETS[name].objective, in_order(case)
    )
    assert same.loss.item() == out.loss.item()
    assert (same_gradient == gradient).all()


# Units: turns and trajectories. A log-prob of its own tells each sampled token apart.


def rollout(seed: int, turns: int = 4) -> tuple[list[Sample], list[Sample], int]:
    """Samples of trajectories of some turns, and of each turn as a trajectory; and the tokens.

    A turn's prompt extends what came before, or breaks with it and starts another sample.
    """
    rng = np.random.default_rng(seed)
    joint: list[Sample] = []
    apart: list[Sample] = []
    tokens = 0
    for i in range(rng.integers(1, 5)):
        advantage = float(rng.choice([-1.0, 0.5, 2.0]))
        seen: list[int] = []
        choices = []
        for _ in range(rng.integers(1, turns + 1)):
            seen = seen if rng.random() < 0.7 else []
            prompt = [*seen, *rng.integers(6, 99, rng.integers(1, 5)).tolist()]
            sampled = rng.integers(6, 99, rng.integers(1, 7)).tolist()
            logprobs = [-(tokens + k + 1) / 64 for k in range(len(sampled))]
            choices.append(choice(sampled, prompt, logprobs))
            tokens += len(sampled)
            seen = prompt + sampled
        joint += trajectory_samples(trajectory(0.0, *choices), trajectory_id=i, advantage=advantage)
        for one in choices:
            apart += trajectory_samples(
                trajectory(0.0, one), trajectory_id=len(apart), advantage=advantage
            )
    return joint, apart, tokens


def keys(microbatch: Microbatch) -> np.ndarray:
    """Which of the rollout's tokens each sampled token is."""
    return np.rint(-64 * microbatch.old_logprobs.numpy()).astype(int) - 1


def of_units(
    microbatches: Sequence[Microbatch], name: str, noise: np.ndarray, kl_coef: float = 0.0
) -> tuple[float, np.ndarray, set[tuple[int, ...]]]:
    """Loss, gradient by token, and the partition of the tokens into sequences."""
    loss, gradient = 0.0, np.zeros(len(noise))
    partition: set[tuple[int, ...]] = set()
    for microbatch in microbatches:
        key = keys(microbatch)
        new = (microbatch.old_logprobs.double() + torch.tensor(noise[key])).requires_grad_()
        out = policy_loss(
            new,
            microbatch.old_logprobs.double(),
            microbatch.sequence_ids,
            microbatch.advantages.double(),
            replace(PRESETS[name].objective, kl_coef=kl_coef),
            total_sequences=sum(len(r.advantages) for r in microbatches),
            total_tokens=len(noise),
            reference_logprobs=microbatch.old_logprobs - torch.tensor(noise[key])
            if kl_coef
            else None,
        )
        out.loss.backward()
        assert new.grad is not None
        loss += out.loss.item()
        gradient[key] = new.grad.numpy()
        ids = microbatch.sequence_ids.numpy()
        partition |= {
            tuple(sorted(key[ids == i].tolist())) for i in range(len(microbatch.advantages))
        }
    return loss, gradient, partition


@pytest.mark.parametrize("name", ["gspo", "grpo", "luspo", "gmpo", "vespo"])
@settings(max_examples=20)
@given(budget=st.integers(1, 200), kl_coef=st.sampled_from([0.0, 0.3]), seed=SEEDS)
def test_turns_are_trajectories_of_their_own(
    name: str, budget: int, kl_coef: float, seed: int
) -> None:
    joint, apart, tokens = rollout(seed)
    noise = np.random.default_rng(seed).normal(scale=0.2, size=tokens)
    loss, gradient, partition = of_units(pack(joint, budget, "turn"), name, noise, kl_coef)
    expected = of_units(pack(apart, 10**6), name, noise, kl_coef)
    assert partition == expected[2]
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert gradient == pytest.approx(expected[1], rel=1e-12)
    by_owner = [[s for s in joint if s.trajectory_id == i] for i in range(4)]
    assert sum(unit_count(samples, "turn") for samples in by_owner) == len(partition)


@given(budget=st.integers(1, 200), seed=SEEDS)
def test_one_turn_trajectories_are_the_same_in_both_units(budget: int, seed: int) -> None:
    samples, _, tokens = rollout(seed, turns=1)
    noise = np.random.default_rng(seed).normal(scale=0.2, size=tokens)
    rows = pack(samples, budget, "turn"), pack(samples, budget, "trajectory")
    for turn, whole in zip(*rows, strict=True):
        assert turn.sequence_ids.tolist() == whole.sequence_ids.tolist()
        assert turn.trajectory_ids == whole.trajectory_ids
    (loss, gradient, partition), expected = (of_units(r, "gspo", noise) for r in rows)
    assert (loss, partition) == (expected[0], expected[2])
    assert (gradient == expected[1]).all()
