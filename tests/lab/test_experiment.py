"""Whole experiments: they learn, repeat exactly, and survive being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gspo as art
from gspo.lab.demo import demo_spec
from gspo.lab.experiment import Estimate, as_json, estimate_reward, run_experiment
from gspo.lab.picture import draw_run
from gspo.lab.spec import Spec


class Silent:
    """A watch that keeps what it saw."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.first = -1
        self.changed: list[str] = []
        self.estimates: list[Estimate] = []

    def started(self, spec: Spec, step: int, changed: list[str]) -> None:
        self.first, self.changed = step, changed

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self.estimates.append(estimate)


def small(path: Path, **fields) -> Spec:
    sizes = {"steps": 3, "prompts": 4, "completions": 4, "eval_prompts": 8, "task": "sort"}
    return Spec(path=str(path), learning_rate=1e-3, **(sizes | fields))


def records(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"{step:04d}" / "model.safetensors").read_bytes()


@pytest.mark.timeout(1200)  # a minute on an idle core, more beside other work
async def test_the_demo_learns(tmp_path: Path):
    outcome = await run_experiment(demo_spec(str(tmp_path)), Silent())
    assert outcome.before is not None and outcome.after is not None
    assert outcome.after.mean >= outcome.before.mean + 0.3
    assert outcome.after.low is not None and outcome.before.high is not None
    assert outcome.after.low > outcome.before.high
    picture = draw_run(outcome.run)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {"reward_before", "reward_after", "prompts", "steps", "seconds", "run"} <= set(
        as_json(outcome)
    )


async def test_two_runs_with_one_seed_are_identical(tmp_path: Path):
    runs = []
    for name in ("a", "b"):
        runs.append((await run_experiment(small(tmp_path / name), Silent())).run)
    assert records(runs[0]) == records(runs[1])
    assert len(records(runs[0])) == 4
    assert weights(runs[0], 3) == weights(runs[1], 3)
    other = (await run_experiment(small(tmp_path / "c", seed=1), Silent())).run
    assert weights(other, 3) != weights(runs[0], 3)


async def test_a_finished_run_is_not_trained_again_and_a_longer_one_goes_on(tmp_path: Path):
    whole = (await run_experiment(small(tmp_path / "whole", steps=4), Silent())).run
    await run_experiment(small(tmp_path / "parts", steps=2), Silent())
    watch = Silent()
    await run_experiment(small(tmp_path / "parts", steps=2), watch)
    assert (watch.first, watch.steps) == (2, [])
    outcome = await run_experiment(small(tmp_path / "parts", steps=4), watch)
    assert watch.steps == [3, 4]
    assert watch.changed == ["steps: 2 -> 4"]
    assert weights(outcome.run, 4) == weights(whole, 4)


def test_a_killed_run_ends_as_an_unbroken_one(tmp_path: Path):
    spec = tmp_path / "run.toml"
    spec.write_text(
        'task = "sort"\nsteps = 6\nprompts = 8\ncompletions = 4\neval_prompts = 8\n'
        "learning_rate = 1e-3\n"
    )

    def command(path: Path) -> list[str]:
        return [sys.executable, "-m", "gspo.cli", "train", str(spec), "--set", f"path={path}"]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    whole, broken = (tmp_path / name / "gspo" / "run" for name in ("whole", "broken"))
    for target in (2, 4):
        process = subprocess.Popen(command(tmp_path / "broken"), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (broken / "checkpoints" / f"{target:04d}").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "broken"), check=True, capture_output=True)
    assert weights(broken, 6) == weights(whole, 6)
    assert records(broken) == records(whole)


async def test_rollouts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(
        "import gspo as art\n"
        "async def rollout(model, scenario):\n"
        "    messages = [{'role': 'user', 'content': str(scenario.index)}]\n"
        "    response = await model.openai_client().chat.completions.create(\n"
        "        model=model.inference_name, messages=messages, max_tokens=4)\n"
        "    choice = response.choices[0]\n"
        "    reward = float(len(choice.message.content))\n"
        "    return art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = small(tmp_path, task=None, rollout="mine:rollout", model="embedded:sort", steps=1)
    outcome = await run_experiment(spec, Silent())
    assert records(outcome.run)[1]["train/reward"] > 0


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
    assert as_json(outcome)["prompts"] == 3
    # Rewards 0, 1 and 2 of three prompts: Student's t of 2 degrees of freedom.
    assert outcome.after.high == pytest.approx(1 + 4.302652729749462 / 3**0.5)
    resumed = await run_experiment(spec, Silent())
    assert (resumed.prompts, resumed.after) == (3, outcome.after)


async def test_the_demo_goes_on_where_it_stopped_and_else_starts_anew(tmp_path: Path):
    path = str(tmp_path)
    first = demo_spec(path, steps=2)
    assert first.name == "sort-1"
    small_first = first.model_copy(update={"prompts": 2, "completions": 4, "eval_prompts": 4})
    await run_experiment(small_first, Silent())
    assert demo_spec(path, steps=2).name == "sort-2"
    assert demo_spec(path, steps=1).name == "sort-2"
    half = tmp_path / "demo" / "sort-2"
    (half / "checkpoints" / "0001").mkdir(parents=True)
    (half / "spec.json").write_text(
        json.dumps(demo_spec(path, 2).model_dump(mode="json") | {"name": "sort-2"})
    )
    assert demo_spec(path, steps=2).name == "sort-2"
    assert demo_spec(path, steps=2, seed=1).name == "sort-3"


async def test_dynamic_sampling_replaces_flat_groups(tmp_path: Path):
    plain = await run_experiment(small(tmp_path / "a", steps=1, prompts=8), Silent())
    spec = small(tmp_path / "b", steps=1, prompts=8, dynamic_sampling=True)
    dynamic = await run_experiment(spec, Silent())
    flat = [records(run)[1]["train/groups_zero_advantage"] for run in (plain.run, dynamic.run)]
    assert flat[0] > 0
    assert flat[1] < flat[0]
    assert records(dynamic.run)[1]["train/trajectories"] == 32
