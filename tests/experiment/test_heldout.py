"""Held-out reward: what is counted, and how it is logged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import gspo as art
from experiment.small_runs import Silent, records, small
from gspo.experiment.heldout import Estimate, estimate_reward
from gspo.experiment.loop import run_experiment


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
    monkeypatch.setitem(sys.modules, "scipy", None)
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
