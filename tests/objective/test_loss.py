"""`policy_loss` against a loop over Python floats, at the edges, and what makes it GSPO."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gspo.core.metrics import Metrics
from gspo.objective import (
    MAX_LOG_RATIO,
    PRESETS,
    Level,
    LossOutput,
    Objective,
    Segments,
    policy_loss,
    sequence_log_ratio,
)
from objective.cases import (
    LEVELS,
    assert_matches,
    cases,
    in_order,
    near,
    only,
    padded,
    run,
    shuffled,
)
from objective.naive import BOUND, Case, naive

CLIPS = st.sampled_from([(3e-4, 4e-4), (0.2, 0.2), (0.1, 0.5), (1.0, 2.0)])
TOKEN_LEVELS = [level for level in LEVELS if level != "sequence"]
SEEDS = st.integers(0, 2**16)


def test_the_loop_uses_the_documented_bound() -> None:
    assert MAX_LOG_RATIO == BOUND


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(), clip=CLIPS, seed=SEEDS)
def test_any_layout_equals_the_loop(
    level: Level, case: Case, clip: tuple[float, float], seed: int
) -> None:
    total = case.count + seed % 3
    expected = naive(case, level, *clip, total)
    assume(expected.margin > 1e-12)
    rng = np.random.default_rng(seed)
    for layout in (in_order(case), shuffled(case, rng), padded(case, rng)):
        result = run(case, Objective(level, *clip), layout, total=total, seed=seed)
        assert_matches(*result, expected)


@pytest.mark.parametrize("level", TOKEN_LEVELS)
@given(case=cases(per_token=True, max_length=80), clip=CLIPS, seed=SEEDS)
def test_token_advantages_equal_the_loop(
    level: Level, case: Case, clip: tuple[float, float], seed: int
) -> None:
    expected = naive(case, level, *clip, case.count)
    assume(expected.margin > 1e-12)
    layout = shuffled(case, np.random.default_rng(seed))
    assert_matches(*run(case, Objective(level, *clip), layout, seed=seed), expected)


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_length=60), clip=CLIPS, seed=SEEDS)
def test_float32_equals_the_loop(
    level: Level, case: Case, clip: tuple[float, float], seed: int
) -> None:
    expected = naive(case, level, *clip, case.count)
    assume(expected.margin > 5e-7)
    layout = shuffled(case, np.random.default_rng(seed))
    result = run(case, Objective(level, *clip), layout, dtype=torch.float32, seed=seed)
    assert_matches(*result, expected, rtol=2e-5)


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_length=60), kl_coef=st.sampled_from([1e-3, 0.5]), seed=SEEDS)
def test_kl_term_equals_the_loop(level: Level, case: Case, kl_coef: float, seed: int) -> None:
    expected = naive(case, level, 0.2, 0.3, case.count, kl_coef)
    assume(expected.margin > 1e-12)
    layout = padded(case, np.random.default_rng(seed))
    result = run(case, Objective(level, 0.2, 0.3, kl_coef), layout, seed=seed)
    assert_matches(*result, expected)


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_sequences=8, max_length=60), seed=SEEDS)
def test_microbatches_add_up_to_the_whole(level: Level, case: Case, seed: int) -> None:
    """Loss, gradient, statistics per sequence and reduced metrics, whatever the split."""
    expected = naive(case, level, 0.2, 0.2, case.count)
    assume(expected.margin > 1e-12)
    rng = np.random.default_rng(seed)
    splits = np.array_split(rng.permutation(case.count), rng.integers(1, case.count + 1))

    loss, gradient, metrics = 0.0, np.zeros(len(case.ids)), Metrics()
    for sequences in splits:
        part, where = only(case, sequences.tolist())
        layout = shuffled(part, rng)
        out, part_gradient = run(part, Objective(level, 0.2, 0.2), layout, total=case.count)
        loss += out.loss.item()
        gradient[where] += part_gradient
        reduced(out, metrics)
        assert out.log_ratio.tolist() == pytest.approx([expected.log_ratio[i] for i in sequences])
        assert out.extreme.tolist() == [expected.extreme[i] for i in sequences]
        for name in ("lengths", "loss_tokens", "clipped_tokens"):
            values = getattr(expected, name)
            assert getattr(out, name).tolist() == [values[i] for i in sequences]

    near(loss, expected.loss, 1e-10 * expected.loss_scale)
    near(gradient, expected.gradient, 1e-10 * expected.gradient_scale)
    whole, _ = run(case, Objective(level, 0.2, 0.2), in_order(case))
    assert metrics.compute() == pytest.approx(
        reduced(whole, Metrics()).compute(), rel=1e-6, abs=1e-6
    )
    assert metrics.compute()["clipped"] == sum(expected.clipped_tokens)
    assert metrics.compute()["extreme"] == sum(expected.extreme)


def reduced(out: LossOutput, metrics: Metrics) -> Metrics:
    """Add a microbatch's statistics, as `gspo.core.metrics` reduces them."""
    share = out.clipped_tokens / out.loss_tokens.clamp(min=1)
    metrics.mean("clip_fraction", share.sum().item(), share.numel())
    metrics.add("clipped", out.clipped_tokens.sum().item())
    metrics.add("extreme", int(out.extreme.sum()))
    metrics.maximum("longest", out.lengths.max().item())
    metrics.distribution("log_ratio", out.log_ratio.tolist())
    return metrics


# Batches at the edge: nothing in them, nothing to train on, nothing but garbage around it.


@pytest.mark.parametrize("level", LEVELS)
def test_an_empty_microbatch_adds_nothing(level: Level) -> None:
    none = torch.zeros(0, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long)
    objective = Objective(level, 0.2, 0.2)
    out = policy_loss(none, none, ids, torch.zeros(0), objective, total_sequences=8)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert out.log_ratio.shape == out.extreme.shape == (0,)


@pytest.mark.parametrize("level", LEVELS)
def test_padding_alone_adds_nothing(level: Level) -> None:
    new = torch.tensor([math.nan, -math.inf], requires_grad=True)
    mask, ids = torch.tensor([False, False]), torch.tensor([5, -5])
    out = policy_loss(
        new, new.detach(), ids, torch.tensor([2.0]), Objective(level, 0.2, 0.2), ratio_mask=mask
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert new.grad is not None
    assert new.grad.tolist() == [0.0, 0.0]
    assert out.lengths.tolist() == out.log_ratio.tolist() == [0.0]


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "sequence"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_token_advantages_outside_the_loss_mask_never_leak(level: Level, junk: float) -> None:
    """A token that was sampled and is not trained on has no advantage to speak of."""
    new = torch.tensor([-1.0, -1.1, -0.9], requires_grad=True)
    out = policy_loss(
        new,
        torch.full((3,), -1.0),
        torch.zeros(3, dtype=torch.long),
        None,
        Objective(level, 0.2, 0.2),
        token_advantages=torch.tensor([1.0, junk, 2.0]),
        loss_mask=torch.tensor([True, False, True]),
    )
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()
    assert new.grad[1] == 0


def test_only_the_loss_carries_gradient() -> None:
    new = torch.tensor([-1.0, -1.1], requires_grad=True)
    old = torch.tensor([-1.0, -1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], requires_grad=True)
    objective = Objective("sequence", 0.2, 0.2, kl_coef=0.1)
    out = policy_loss(
        new, old.detach(), torch.tensor([0, 1]), advantages.detach(), objective,
        reference_logprobs=old.detach(),
    )  # fmt: skip
    others = {name: value for name, value in vars(out).items() if name != "loss"}
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in others.values())


def test_bounded_sequences_of_levels_that_look_at_tokens_are_counted() -> None:
    """log-ratios of 50 and -50: the mean is 0, so only levels with token ratios are extreme."""
    new, old = torch.tensor([49.0, -51.0]), torch.tensor([-1.0, -1.0])
    ids, advantages = torch.tensor([0, 0]), torch.tensor([1.0])
    counted = {
        level: policy_loss(new, old, ids, advantages, Objective(level, 0.2, 0.2)).extreme.item()
        for level in LEVELS
    }
    assert counted == {
        "token": True,
        "sequence": False,
        "sequence_token": False,
        "average": True,
        "geometric_average": False,
    }


# What makes it GSPO: the identities and values of the paper, whatever the implementation.


GSPO = PRESETS["gspo"].objective
SIGNS = [1.0, -1.0]


def test_presets_are_the_papers() -> None:
    assert Objective("sequence", 3e-4, 4e-4) == GSPO
    assert PRESETS["gspo_token"].objective == Objective("sequence_token", 3e-4, 4e-4)
    assert PRESETS["grpo"].objective == Objective("token", 0.2, 0.2)
    assert all(name == preset.name for name, preset in PRESETS.items())


def test_published_value() -> None:
    """NeMo-RL's example: three tokens, epsilon 0.2, an advantage per token."""
    new = torch.tensor([-1.69315, -1.0, -0.59453], requires_grad=True)
    out = policy_loss(
        new,
        torch.full((3,), -1.0),
        torch.zeros(3, dtype=torch.long),
        None,
        Objective("sequence_token", 0.2, 0.2),
        token_advantages=torch.tensor([1.0, -1.0, 2.0]),
    )
    out.loss.backward()
    assert out.log_ratio.exp().item() == pytest.approx(0.90856, abs=5e-6)
    assert out.loss.item() == pytest.approx(-0.6057, abs=5e-5)
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-0.90856 * a / 3 for a in (1, -1, 2)], abs=5e-6)


def test_sequence_by_hand() -> None:
    """Two sequences, three optimizer-step sequences: s = exp(0.1), exp(-0.5); N = 3."""
    new = torch.tensor([-1.0, -0.8, -2.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -1.5])
    advantages = torch.tensor([-1.0, 2.0])
    ids = torch.tensor([0, 0, 1])
    out = policy_loss(new, old, ids, advantages, Objective("sequence", 0.2, 0.2), total_sequences=3)
    out.loss.backward()
    first, second = np.exp(0.1), np.exp(-0.5)
    assert out.loss.item() == pytest.approx(-(-first + 2 * second) / 3)
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([first / 6, first / 6, -2 * second / 3])


@given(case=cases(), seed=st.integers(0, 2**16))
def test_sequence_and_sequence_token_have_equal_gradients(case: Case, seed: int) -> None:
    expected = naive(case, "sequence", 0.2, 0.3, case.count)
    assume(expected.margin > 1e-12)
    layout = shuffled(case, np.random.default_rng(seed))
    a, gradient_a = run(case, Objective("sequence", 0.2, 0.3), layout)
    b, gradient_b = run(case, Objective("sequence_token", 0.2, 0.3), layout)
    near(gradient_a, gradient_b, 1e-12 * expected.gradient_scale)
    assert a.clipped_tokens.tolist() == b.clipped_tokens.tolist()


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_scale=0.0), total=st.integers(1, 50))
def test_on_policy_is_length_normalised_reinforce(level: Level, case: Case, total: int) -> None:
    """Ratio 1, nothing clipped, and -A_i / (N L_i) at each token that is trained on."""
    if level in ("average", "geometric_average"):  # their gradient mixes in the mask of the others
        case.trained[:] = case.sampled
    objective = Objective(level, 3e-4, 4e-4)
    out, gradient = run(case, objective, in_order(case), total=total, dtype=torch.float32)
    assert not out.log_ratio.any()
    assert not out.clipped_tokens.any()
    lengths = np.maximum(out.lengths.numpy(), 1)
    reinforce = -(case.advantages / lengths)[case.ids] / total
    reinforce[~(case.sampled & case.trained)] = 0
    near(gradient, reinforce, 1e-5 * abs(reinforce))


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_length=40), drop=st.integers(0, 10**6))
def test_dropping_a_token_from_the_loss_never_changes_the_ratio(
    level: Level, case: Case, drop: int
) -> None:
    case.trained[:] = True
    objective = Objective(level, 0.2, 0.2)
    before, gradient = run(case, objective, in_order(case))
    dropped = np.arange(len(case.ids)) == drop % len(case.ids)
    case.trained[dropped] = False
    after, gradient_after = run(case, objective, in_order(case))
    assert after.log_ratio.tolist() == before.log_ratio.tolist()
    assert after.lengths.tolist() == before.lengths.tolist()
    assert not gradient_after[dropped].any()
    if level not in ("average", "geometric_average"):  # where each term moves the whole sequence
        assert gradient_after[~dropped].tolist() == gradient[~dropped].tolist()


@pytest.mark.parametrize("length", [64, 1024, 131072])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_sequence_log_ratio_is_precise(length: int, scale: float) -> None:
    """Far within the clip range of 3e-4, however long the sequence."""
    generator = torch.Generator().manual_seed(length)
    d = torch.randn(length, generator=generator) * scale + 0.5
    every = torch.ones(length, dtype=torch.bool)
    segments = Segments(torch.zeros(length, dtype=torch.long), 1, every, every)
    exact = d.double().mean().item()
    assert abs(sequence_log_ratio(d, segments).item() - exact) < 1e-7


def test_a_sequence_without_sampled_tokens_counts_in_n_only() -> None:
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    ids, mask = torch.tensor([0, 1]), torch.tensor([True, False])
    for level in LEVELS:
        new.grad = None
        out = policy_loss(
            new, new.detach(), ids, torch.tensor([1.0, torch.nan]), Objective(level, 0.2, 0.2),
            ratio_mask=mask,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.item() == -0.5
        assert new.grad is not None
        assert new.grad.tolist() == [-0.5, 0.0]


def extreme_batch(log_ratio: float, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences of 3 and 1 tokens around one log-ratio, and NaN padding."""
    d = torch.tensor([log_ratio - spread, log_ratio, log_ratio + spread, log_ratio, torch.nan])
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0, -torch.inf])
    return (old + d).requires_grad_(), old, torch.tensor([0, 0, 0, 1, 0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("advantage", SIGNS)
@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, -41.0, -39.0, 39.0, 41.0, 88.8, 100.0, 1e4])
@pytest.mark.parametrize("spread", [0.0, 9e3])
def test_extreme_ratios_stay_finite_in_float32(
    level: Level, advantage: float, log_ratio: float, spread: float
) -> None:
    new, old, ids = extreme_batch(log_ratio, spread)
    mask = ~new.detach().isnan()
    advantages = torch.tensor([advantage, advantage])
    out = policy_loss(new, old, ids, advantages, Objective(level, 0.2, 0.2), ratio_mask=mask)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()
    assert torch.isfinite(new.grad.square().sum())  # the norm that is clipped later
    assert torch.isfinite(out.log_ratio).all()
    # Clipped (A > 0 above, A < 0 below), beyond the bound, or underflown: exactly 0 but for
    # A < 0 inside the bound.
    last = new.grad[3].item()
    if advantage < 0 and log_ratio == 39.0:
        assert last == pytest.approx(np.exp(39.0) / 2, rel=1e-5)
    elif advantage > 0 and log_ratio == -39.0:
        assert last == pytest.approx(-np.exp(-39.0) / 2, rel=1e-5)
    else:
        assert abs(last) < 1e-17
        if advantage * log_ratio > 0 or log_ratio > 40:
            assert last == 0.0
    assert out.extreme[1].item() == (abs(log_ratio) > 40)
    assert out.clipped_tokens[1].item() == (advantage * log_ratio > 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [
        (np.log(1.4), 1.0, False),
        (np.log(1.6), 1.0, True),
        (np.log(1.6), -1.0, False),
        (np.log(0.95), -1.0, False),
        (np.log(0.85), -1.0, True),
        (np.log(0.85), 1.0, False),
        (np.log(1.6), 0.0, False),
        (np.log(0.85), 0.0, False),
    ],
)
def test_the_clip_acts_on_its_own_side_only(
    level: Level, log_ratio: float, advantage: float, clipped: bool
) -> None:
    """eps_low = 0.1 and eps_high = 0.5 differ, so that exchanging them shows."""
    new = torch.full((4,), log_ratio - 1.0, requires_grad=True)
    ids, advantages = torch.zeros(4, dtype=torch.long), torch.tensor([advantage])
    out = policy_loss(new, torch.full((4,), -1.0), ids, advantages, Objective(level, 0.1, 0.5))
    out.loss.backward()
    assert out.clipped_tokens.item() == (4 if clipped else 0)
    assert new.grad is not None
    slope = 0.0 if clipped else -advantage * np.exp(log_ratio) / 4
    assert new.grad.tolist() == pytest.approx([slope] * 4, rel=1e-6, abs=0)
    edge = 1.5 if advantage > 0 else 0.9
    ratio = edge if clipped else np.exp(log_ratio)
    assert out.loss.item() == pytest.approx(-advantage * ratio)
