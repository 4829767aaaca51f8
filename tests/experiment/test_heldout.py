"""Held-out reward: what is counted, and how it is logged."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest
from intervals import MEANS, coverage

import gspo as art
from experiment.small_runs import Silent, records, small
from gspo.experiment.heldout import (
    Estimate,
    Interval,
    estimate_reward,
    reward_interval,
    share_interval,
)
from gspo.experiment.loop import run_experiment
from gspo.lab.statistics import t_interval


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None and interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize(("count", "trials"), [(0, 5), (4, 5), (5, 5), (30, 100)])
def test_share_intervals_are_clopper_and_pearsons(count: int, trials: int):
    def at_least(least: int, p: float) -> float:
        terms = (math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1))
        return math.fsum(list(terms)[least:])

    low, high = ends(share_interval(count, trials))
    # As many or more come of the lower end in 2.5 % of the cases, as few or fewer of the upper one.
    assert low == 0 if count == 0 else at_least(count, low) == pytest.approx(0.025)
    assert high == 1 if count == trials else 1 - at_least(count + 1, high) == pytest.approx(0.025)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("prompts", [4, 16, 64, 256])
def test_held_out_intervals_hold_the_mean(mean: float, prompts: int):
    for alike in (0.05, 0.5):
        share, width = coverage(mean, prompts, alike, times=60)
        # 95 %, less 3 standard errors of 60 draws. The percentile bootstrap of before: from 21 %.
        assert share > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 60)
        if (mean, prompts) == (0.3, 256):  # and not by being wide: 4 standard errors
            error = math.sqrt(0.3 * 0.7 / 256 * (alike + (1 - alike) / 4))
            assert 3.8 < width / error < 4.2


def test_rewards_without_variety_leave_room_on_their_other_side():
    assert ends(reward_interval([[0.0] * 4] * 64)) == pytest.approx((0, 1 - 0.025 ** (1 / 64)))
    assert ends(reward_interval([[1.0] * 4] * 64)) == pytest.approx((0.025 ** (1 / 64), 1))
    low, high = ends(reward_interval([[0.5] * 4] * 64))
    assert low < 0.4 and high > 0.6
    low, high = ends(reward_interval([[1.0, 0.0]]))  # one prompt says next to nothing
    assert low < 0.02 and high > 0.98


def test_rewards_outside_of_shares_get_students_interval():
    expected = t_interval([-1.0, 0.5, 2.0])
    assert ends(reward_interval([[-1.0], [0.5], [2.0]])) == pytest.approx(ends(expected))
    for alone in ([[-1.0] * 4] * 64, [[-1.0, 2.0]]):
        found = reward_interval(alone)
        assert (found.low, found.high, str(found)) == (None, None, f"{found.mean:.3f}")


def test_a_prompt_that_is_drawn_more_often_weighs_more_and_counts_once():
    rewards = [[0.0] * 4, [1.0] * 12, [1.0, 0.0] * 2]
    assert reward_interval(rewards).mean == pytest.approx(14 / 20)
    often = [of_prompt * 50 for of_prompt in rewards]
    # More rollouts of 3 prompts are no more prompts: at most the rollouts' own noise goes.
    assert ends(reward_interval(often)) == pytest.approx(ends(reward_interval(rewards)), abs=1e-9)


def test_narrow_rewards_have_a_narrow_interval():
    rng = random.Random(0)
    rewards = [[0.5 + 1e-5 * rng.random()] for _ in range(64)]
    expected = t_interval([reward for (reward,) in rewards])
    assert ends(reward_interval(rewards)) == pytest.approx(ends(expected), abs=1e-9)


def test_rewards_that_round_to_a_bound_have_an_interval():
    almost = reward_interval([[0.9999999999999998], *[[1.0]] * 7])
    exactly = reward_interval([[1.0]] * 8)
    assert (almost.low, almost.high) == pytest.approx((exactly.low, exactly.high))
    tiny = reward_interval([[5e-324], *[[0.0]] * 7])
    assert tiny.low == 0.0 and tiny.high is not None and tiny.high > 0.3


def asked(prompt: str, rewards: list[float]) -> art.TrajectoryGroup:
    messages = [{"role": "user", "content": prompt}]
    return art.TrajectoryGroup(
        art.Trajectory(messages_and_choices=[*messages], reward=reward) for reward in rewards
    )


def test_the_interval_counts_distinct_prompts():
    rewards = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    once = [asked(str(index), of_prompt) for index, of_prompt in enumerate(rewards)]
    estimate = estimate_reward(once)
    assert (estimate.mean, estimate.prompts) == (0.4, 5)
    often = estimate_reward([*once] * 10)
    assert (often.mean, often.prompts) == (pytest.approx(0.4), 5)
    assert often.low == pytest.approx(estimate.low) and often.high == pytest.approx(estimate.high)
    # A prompt of which no rollout ended in time counts nothing.
    assert estimate_reward([*once, art.TrajectoryGroup()]) == estimate
    as_if_fifty = estimate_reward(
        [asked(f"{i} {g}", rewards[i]) for i in range(5) for g in range(10)]
    )
    assert as_if_fifty.low is not None and estimate.low is not None
    assert as_if_fifty.prompts == 50 and as_if_fifty.low > estimate.low + 0.1


def test_one_prompt_alone_is_measured_over_its_groups():
    rewards = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]] * 16
    estimate = estimate_reward([asked("play", of_group) for of_group in rewards])
    assert (estimate.mean, estimate.prompts) == (0.5, 1)
    assert estimate.low is not None and estimate.low > 0.35


def test_estimates_are_read_as_they_were_logged():
    for estimate in (Estimate(0.5, 0.25, 0.75, 8), Estimate(-1.0, None, None, 8)):
        assert Estimate.logged(estimate.metrics()) == estimate
    older = Estimate.logged({"val/reward": 0.5, "val/reward_low": 0.25, "val/reward_high": 0.75})
    assert older == Estimate(0.5, 0.25, 0.75, None)


def test_without_scipy_there_is_a_mean_and_no_interval(monkeypatch: pytest.MonkeyPatch):
    groups = [asked(str(i), rewards) for i, rewards in enumerate([[1.0, 0.0], [0.0, 0.1]])]
    mean = estimate_reward(groups).mean
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    estimate = estimate_reward(groups)
    assert estimate == Estimate(mean, None, None, 2)
    assert str(estimate) == f"{mean:.3f}"
    assert Estimate.logged(estimate.metrics()) == estimate


ROWS = """
import gspo as art

async def rollout(model, scenario):
    row = scenario.index % 3
    messages = [{"role": "user", "content": f"row {row}"}]
    response = await model.openai_client().chat.completions.create(
        model=model.inference_name, messages=messages, max_tokens=4)
    return art.Trajectory(messages_and_choices=[*messages, response.choices[0]], reward=float(row))
"""


async def test_rows_of_ones_own_that_are_drawn_again_are_no_more_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "rows.py").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    fields = {"task": None, "rollout": "rows:rollout", "model": "embedded:sort", "steps": 1}
    spec = small(tmp_path, **fields, eval_prompts=12)
    outcome = await run_experiment(spec, Silent())
    assert outcome.prompts == 3 and outcome.after is not None
    assert (outcome.after.mean, outcome.after.prompts) == (1.0, 3)
    assert [record["val/prompts"] for record in records(outcome.run)] == [3, 3]
    assert outcome.as_json()["prompts"] == 3
    # Rewards 0, 1 and 2 of three prompts: Student's t of 2 degrees of freedom.
    assert outcome.after.high == pytest.approx(1 + 4.302652729749462 / 3**0.5)
    resumed = await run_experiment(spec, Silent())
    assert (resumed.prompts, resumed.after) == (3, outcome.after)
