"""epsilon="auto" finds the range, sqrt_length fits it to every length; contradictions end here."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo import TrainConfig, dev
from gspo.core.errors import ConfigError
from gspo.objective import PRESETS, Objective, policy_loss
from gspo.train.epsilon import (
    HIGHEST,
    LOWEST,
    EpsilonController,
    needed_epsilon,
)
from gspo.train.observe import Trace
from gspo.train.settings import resolve

GSPO = PRESETS["gspo"].objective
SQRT = replace(GSPO, epsilon_scale="sqrt_length")
TARGET = 0.15


def seen_at(log_ratio: float, advantage: float, length: float) -> Trace:
    """A sequence; the rest of its trace steers nothing."""
    return Trace(log_ratio, advantage, length, 0, 0, 0, np.zeros(0, np.float32), 0)


def noise(
    rng: np.random.Generator, count: int, sigma: float, lengths: Sequence[int], bias: float = 0.0
) -> list[Trace]:
    """Sequences of l_i ~ N(bias, sigma^2 / L_i), with advantages of both signs and 0."""
    size = rng.choice(lengths, count)
    advantages = rng.choice([-1.5, -1.0, 0.5, 2.0, 0.0], count)
    values = bias + sigma / np.sqrt(size) * rng.normal(size=count)
    return [seen_at(*map(float, v)) for v in zip(values, advantages, size, strict=True)]


@pytest.mark.parametrize("objective", [GSPO, SQRT])
@pytest.mark.parametrize("unseen", [-0.5, 0.5, math.nan])
def test_only_sequences_that_can_be_clipped_steer(objective: Objective, unseen: float) -> None:
    seen = [seen_at(0.001 * k, (-1.0) ** k, 9) for k in range(-9, 10)]
    flat = [seen_at(unseen, 0.0, 9)] * 19 + [seen_at(math.nan, 1.0, 9)]
    one, other = EpsilonController(), EpsilonController()
    one.observe(objective, seen, TARGET)
    other.observe(objective, [*flat, *seen], TARGET)
    assert one.epsilon_low == other.epsilon_low is not None


def clip_share(objective: Objective, seen: Sequence[Trace]) -> float:
    """Of the sequences with an advantage, those that `policy_loss` itself clips."""
    seen = [one for one in seen if one.advantage != 0]
    lengths = torch.tensor([int(one.length) for one in seen])
    d = torch.tensor([one.log_ratio for one in seen]).double().repeat_interleave(lengths)
    out = policy_loss(
        d,
        torch.zeros_like(d),
        torch.arange(len(seen)).repeat_interleave(lengths),
        torch.tensor([one.advantage for one in seen]).double(),
        objective,
    )
    return float((out.clipped_tokens > 0).double().mean())


def steer(
    controller: EpsilonController, objective: Objective, batches: Sequence[Sequence[Trace]]
) -> list[float]:
    """epsilon_low after each call of `train`."""
    path = []
    for seen in batches:
        controller.observe(controller.apply(objective), seen, TARGET)
        assert controller.epsilon_low is not None
        path.append(controller.epsilon_low)
    return path


@pytest.mark.parametrize("start", [1e-6, 1.0, None])
@pytest.mark.parametrize("objective", [GSPO, SQRT], ids=["constant", "sqrt_length"])
@pytest.mark.parametrize(
    ("sigma", "lengths", "bias"),
    [(0.3, [16], 0.0), (0.05, [1000, 4000], 0.0), (0.5, [8, 64, 256], 0.0), (0.3, [16], -0.02)],
)
def test_converges_to_the_target_share_from_anywhere(
    start: float | None, objective: Objective, sigma: float, lengths: list[int], bias: float
) -> None:
    rng = np.random.default_rng(7)
    controller = EpsilonController(start)
    steer(controller, objective, [noise(rng, 160, sigma, lengths, bias) for _ in range(40)])

    fresh = noise(rng, 20_000, sigma, lengths, bias)
    low, high = 1e-7, 10.0  # bisection on the share itself: no formula of the controller's
    few = [one for one in fresh[:4000] if one.advantage != 0]
    for _ in range(30):
        middle = math.sqrt(low * high)
        share = np.mean([is_clipped(one, middle, objective) for one in few])
        low, high = (middle, high) if share > TARGET else (low, middle)
    found = controller.epsilon_low
    assert found is not None
    assert low / 1.5 < found < low * 1.5
    short = [one for one in fresh if one.length <= 256][:2000] or fresh[:60]
    if len(short) > 60:
        assert abs(clip_share(controller.apply(objective), short) - TARGET) < 0.05
    share = np.mean([is_clipped(one, found, objective) for one in fresh if one.advantage != 0])
    assert abs(share - TARGET) < 0.05


def is_clipped(one: Trace, low: float, objective: Objective) -> bool:
    """By the paper: s outside [1 - low, 1 + high] on the side that A pushes to, high = 4/3 low."""
    scale = math.sqrt(one.length) if objective.epsilon_scale == "sqrt_length" else 1.0
    if one.advantage > 0:
        return math.exp(one.log_ratio) > 1 + low * (4 / 3) / scale
    return one.advantage < 0 and math.exp(one.log_ratio) < 1 - low / scale


@pytest.mark.parametrize("start", [1e-6, 1.0])
def test_approaches_without_overshooting(start: float) -> None:
    """Every step goes a part of the way: the distance to the end never grows."""
    seen = noise(np.random.default_rng(1), 400, 0.3, [16])
    path = [start, *steer(EpsilonController(start), GSPO, [seen] * 60)]
    left = [abs(math.log(epsilon / path[-1])) for epsilon in path]
    assert all(after < before for before, after in pairwise(left[:30]))
    assert left[1] > 0.5 * left[0]


def test_needed_epsilon_by_hand() -> None:
    """s = 1.3: at A > 0 beyond a range of 0.15 / 0.3; at A < 0 the clip never acts there."""
    wide = Objective("sequence", 0.1, 0.2)
    assert needed_epsilon(wide, seen_at(math.log(1.3), 1.0, 9)) == pytest.approx(0.15)
    assert needed_epsilon(wide, seen_at(math.log(1.3), -1.0, 9)) == 0.0


def test_the_smallest_range_that_does_not_clip() -> None:
    """Just above it `policy_loss` doesn't clip, just below it does; 0 where nothing could clip."""
    for objective in (GSPO, SQRT):
        for one in noise(np.random.default_rng(3), 60, 0.4, [1, 7, 40]):
            needed = needed_epsilon(objective, one)
            if one.advantage == 0 or one.log_ratio * one.advantage < 0 < needed:
                assert one.advantage == 0
            elif one.log_ratio * one.advantage < 0:
                assert needed == 0.0
            elif needed < 0.99:
                high = objective.epsilon_high / objective.epsilon_low
                for factor, clipped in ((1.001, 0.0), (0.999, 1.0)):
                    low = needed * factor
                    assert clip_share(objective.with_epsilon(low, low * high), [one]) == clipped


SEEN = st.lists(
    st.builds(
        seen_at,
        st.floats(allow_nan=False),
        st.sampled_from([-1.0, 0.0, 2.0]),
        st.integers(1, 10**5).map(float),
    ),
    max_size=20,
)


@given(
    batches=st.lists(SEEN, max_size=10),
    start=st.floats(LOWEST, HIGHEST),
    target=st.floats(1e-3, 0.999),
)
def test_stays_in_bounds_and_keeps_the_proportion(
    batches: list[list[Trace]], start: float, target: float
) -> None:
    controller = EpsilonController(start)
    for seen in batches:
        objective = controller.apply(GSPO)
        assert objective.epsilon_high / objective.epsilon_low == pytest.approx(4 / 3)
        assert replace(objective, epsilon_low=3e-4, epsilon_high=4e-4) == GSPO
        controller.observe(objective, seen, target)
        assert controller.epsilon_low is not None
        assert LOWEST <= controller.epsilon_low <= HIGHEST


@pytest.mark.parametrize("seen", [[], [seen_at(0.3, 0.0, 9.0)]])
def test_nothing_observed_changes_nothing(seen: list[Trace]) -> None:
    for start in (None, 0.01):
        controller = EpsilonController(start)
        controller.observe(controller.apply(GSPO), seen, TARGET)
        assert controller.epsilon_low == start
    assert EpsilonController().apply(GSPO) is GSPO


def test_a_copy_goes_on_where_the_original_was() -> None:
    rng = np.random.default_rng(5)
    batches = [noise(rng, 50, 0.3, [16]) for _ in range(12)]
    whole = steer(EpsilonController(), GSPO, batches)
    first = EpsilonController()
    steer(first, GSPO, batches[:5])
    for second in (copy.deepcopy(first), EpsilonController(first.epsilon_low)):
        assert steer(second, GSPO, batches[5:]) == whole[5:]
    assert first.epsilon_low == whole[4]


def test_clip_rates_do_not_depend_on_length_with_sqrt_length() -> None:
    rng = np.random.default_rng(11)
    shares: dict[str, list[float]] = {"constant": [], "sqrt_length": []}
    for length in (4, 16, 64, 256):
        seen = noise(rng, 1500, 0.1, [length])
        fixed = GSPO.with_epsilon(0.1, 0.1)
        shares["sqrt_length"].append(clip_share(replace(fixed, epsilon_scale="sqrt_length"), seen))
        fixed = GSPO.with_epsilon(0.0125, 0.0125)
        shares["constant"].append(clip_share(fixed, seen))
    # one sigma on one side: 16%
    assert shares["sqrt_length"] == pytest.approx([0.16] * 4, abs=0.04)
    assert shares["constant"][0] > 0.35
    assert shares["constant"][-1] < 0.05


# Settings: presets combined with options that contradict them

RATIOLESS = [name for name, p in PRESETS.items() if not p.objective.has_range]
SEQUENCE = [name for name, p in PRESETS.items() if p.objective.level.startswith("sequence")]
OTHERS = [name for name in PRESETS if name not in SEQUENCE]
CORRECTED: dict[str, Any] = {"algorithm": "gspo", "correction": "sequence_geometric_mask"}


def test_the_lists_are_the_papers() -> None:
    assert sorted(RATIOLESS) == ["reinforce", "rloo", "sapo", "vespo"]
    assert sorted(SEQUENCE) == ["gspo", "gspo_token", "luspo", "sampo"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"algorithm": name, **given}, f"'{name}' has no clip range: leave {next(iter(given))}")
            for name in RATIOLESS
            for given in ({"epsilon": 0.1}, {"epsilon_high": 0.1}, {"epsilon": "auto"})
        ),
        *(
            ({"algorithm": name, "epsilon": "auto"}, f"'{name}'.*(use algorithm='gspo'|no clip)")
            for name in OTHERS
        ),
        *(
            (
                {"algorithm": name, "epsilon_scale": "sqrt_length"},
                f"'{name}': epsilon_scale.*needs a sequence",
            )
            for name in OTHERS
        ),
        *(
            ({"algorithm": name, "epsilon_high": 1.5}, "epsilon_high = 1.5.*at most 1")
            for name in SEQUENCE
        ),
        ({"epsilon": "auto", "epsilon_high": 0.1}, "leave epsilon_high out"),
        (CORRECTED, "set old_logprobs='trainer'"),
        ({"correction_high": 2.0}, "need a correction"),
        (
            {"algorithm": "gspo", "correction": "token_mask", "old_logprobs": "trainer"},
            "use a sequence_... correction",
        ),
        ({"algorithm": "rloo", "scale_rewards": True}, "leave scale_rewards out"),
        ({"algorithm": "reinforce", "scale_rewards": True}, "leave scale_rewards out"),
        (
            {"algorithm": "gspo", "importance_sampling_level": "token"},
            "use algorithm='grpo', or drop one",
        ),
    ],
)
def test_contradictions_are_refused_with_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig(), dev.TrainConfig(**options))


def test_what_is_allowed() -> None:
    for name in PRESETS:
        alone: dict[str, Any] = {"algorithm": name}
        assert resolve(options=dev.TrainConfig(**alone)).objective == PRESETS[name].objective
    for name in SEQUENCE:
        options: dict[str, Any] = {"algorithm": name, "epsilon": "auto"}
        options["epsilon_scale"] = "sqrt_length"
        assert resolve(options=dev.TrainConfig(**options)).epsilon == "auto"
    trainers: list[dict[str, Any]] = [{"old_logprobs": "trainer"}, {"precalculate_logprobs": True}]
    for how in trainers:
        settings = resolve(options=dev.TrainConfig(**CORRECTED, **how))
        assert settings.old_logprobs == "trainer"
        assert settings.objective.correction is not None
    assert resolve().old_logprobs == "rollout"
    masked = dev.TrainConfig(correction="off_policy_sequence_mask")
    assert resolve(options=masked).old_logprobs == "rollout"
    assert resolve(options=dev.TrainConfig(algorithm="dapo", epsilon_high=1.5)).algorithm == "dapo"
    unscaled = dev.TrainConfig(algorithm="gspo", scale_rewards=False)
    assert resolve(options=unscaled).preset.advantage == "group_mean"
