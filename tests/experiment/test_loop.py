"""Whole experiments: they learn, repeat exactly, and survive being killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gspo as art
from experiment.small_runs import Silent, own_rollout, records, small
from gspo.backend.stored_batch import read_batch
from gspo.core.errors import ConfigError, RolloutError
from gspo.experiment import loop as experiment
from gspo.experiment.heldout import Estimate
from gspo.experiment.loop import Outcome, run_experiment
from gspo.experiment.spec import Spec
from gspo.experiment.whole_run import DEMO_STEPS, demo_spec


def weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"{step:04d}" / "model.safetensors").read_bytes()


async def demonstrate(path: Path, steps: int, eval_prompts: int) -> Outcome:
    """A run of the demo whose held-out reward rises by more than chance."""
    spec = demo_spec(str(path), steps).model_copy(update={"eval_prompts": eval_prompts})
    outcome = await run_experiment(spec, Silent())
    assert outcome.before is not None and outcome.after is not None
    assert outcome.after.low is not None and outcome.before.high is not None
    assert outcome.after.low > outcome.before.high
    return outcome


async def test_the_demo_learns(tmp_path: Path):
    outcome = await demonstrate(tmp_path, 30, 128)
    assert outcome.as_json()["reward_after"] > 0.35  # 0.40 to 0.48 on three seeds
    assert {"reward_before", "reward_after", "prompts", "steps", "seconds", "run"} <= set(
        outcome.as_json()
    )


async def test_ranks_get_the_whole_run_file_to_compare(monkeypatch: pytest.MonkeyPatch):
    """Each rank reads a file of its own, and only the first one's counts."""
    spec = Spec(task="sort", steps=7, train=art.dev.TrainConfig(epsilon=0.2), nproc=2)
    told: dict[str, object] = {}

    def made(path: str, **options: object) -> None:
        told.update(options)
        raise ConfigError("seen")

    monkeypatch.setattr(art, "ClusterBackend", made)
    with pytest.raises(ConfigError, match="seen"):
        await run_experiment(spec, Silent())
    given = {"task": "sort", "steps": 7, "train": {"epsilon": 0.2}, "nproc": 2}
    assert told["config"] == given | {"model": "embedded:sort"}  # which the task names


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute on an idle core, more beside other work
async def test_the_whole_demo_learns_what_the_readme_says(tmp_path: Path):
    outcome = await demonstrate(tmp_path, DEMO_STEPS, 256)
    assert outcome.before is not None and outcome.after is not None
    assert outcome.after.mean >= outcome.before.mean + 0.2  # 0.34 to 0.43 on three seeds


async def test_two_runs_with_one_seed_are_identical(tmp_path: Path):
    runs = []
    for name in ("a", "b"):
        runs.append((await run_experiment(small(tmp_path / name), Silent())).run)
    assert records(runs[0]) == records(runs[1])
    assert len(records(runs[0])) == 4
    assert weights(runs[0], 3) == weights(runs[1], 3)
    watch = Silent()
    load = art.dev.InternalModelConfig(exact=False)
    other = (await run_experiment(small(tmp_path / "c", seed=1, load=load), watch)).run
    assert watch.notes == [
        "engine and trainer are not equal to the bit: exact=False, or a rollout_dtype"
    ]
    assert weights(other, 3) != weights(runs[0], 3)


async def test_a_finished_run_is_not_trained_again_and_a_longer_one_goes_on(tmp_path: Path):
    whole = (await run_experiment(small(tmp_path / "whole", steps=4), Silent())).run
    await run_experiment(small(tmp_path / "parts", steps=2), Silent())
    watch = Silent()
    await run_experiment(small(tmp_path / "parts", steps=2), watch)
    assert (watch.first, watch.steps) == (2, [])
    outcome = await run_experiment(small(tmp_path / "parts", steps=4), watch)
    assert watch.steps == [3, 4]
    assert watch.notes[1:] == ["changed since the run began: steps: 2 -> 4"]
    assert watch.notes[0] == "engine and trainer are equal to the bit"
    assert weights(outcome.run, 4) == weights(whole, 4)


class Command:
    """`gspo train` as a process, in a folder of its own for each name."""

    def __init__(self, path: Path, code: str | None = None, **fields):
        sizes = {"steps": 4, "prompts": 4, "completions": 4, "eval_prompts": 8, "eval_every": 2}
        fields = {"learning_rate": 1e-3, **sizes, **fields}
        source = {"task": "sort"} if code is None else {"rollout": "turns:rollout"}
        source["model"] = "embedded:sort"
        self._spec = path / "run.toml"
        self._spec.write_text("".join(f"{k} = {v!r}\n" for k, v in {**source, **fields}.items()))
        if code is not None:
            (path / "turns.py").write_text(code)
        self._path = path

    def folder(self, name: str) -> Path:
        return self._path / name / "gspo" / "run"

    def start(self, name: str) -> subprocess.Popen[bytes]:
        log = (self._path / f"{name}.log").open("ab")
        place = f"path={self._path / name}"
        command = [sys.executable, "-m", "gspo.cli", "train", str(self._spec), "--set", place]
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def finish(self, name: str) -> Path:
        process = self.start(name)
        assert process.wait() == 0, (self._path / f"{name}.log").read_text()
        return self.folder(name)

    def kill_when(self, name: str, reached: Callable[[], bool]) -> None:
        process = self.start(name)
        deadline = time.monotonic() + 120
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()


def assert_same(broken: Path, whole: Path, step: int) -> None:
    """Weights, optimizer, and all that was measured, bit for bit; and nothing left behind."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = [load_file(run / "checkpoints" / f"{step:04d}" / name) for run in (broken, whole)]
        for found in tensors:  # torch starts each process at random, and nothing here draws from it
            found.pop("rng.torch", None)
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[0].items():
            assert torch.equal(tensor, tensors[1][key]), key
    assert records(broken) == records(whole)
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (broken, whole)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path: Path):
    command = Command(tmp_path)
    whole, broken = command.finish("whole"), command.folder("broken")
    metrics = broken / "metrics.jsonl"
    # Behind the first evaluation, whose draws must not move those of the first step.
    command.kill_when("broken", lambda: metrics.exists() and b"val/reward" in metrics.read_bytes())
    # Behind a checkpoint, before its evaluation.
    command.kill_when("broken", (broken / "checkpoints" / "0002").exists)
    assert_same(command.finish("broken"), whole, 4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["task", "rollout"])
def test_a_run_that_is_killed_at_random_ends_as_an_unbroken_one(tmp_path: Path, kind: str):
    command = Command(tmp_path, TURNS if kind == "rollout" else None)
    began = time.monotonic()
    whole = command.finish("whole")
    length = time.monotonic() - began
    rng = random.Random(int(os.environ.get("GSPO_KILL_SEED", "0")))
    for number in range(int(os.environ.get("GSPO_KILLS", "10"))):
        name = f"broken-{number}"
        process = command.start(name)
        # A third of a process is its start-up, in which nothing can be lost.
        moment = rng.uniform(0.3, 1.0) * length
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moment)
        process.kill()
        process.wait()
        print(f"{kind} {number}: killed {moment:.1f} s of {length:.1f} s after its start")
        assert_same(command.finish(name), whole, 4)


class Killed(BaseException):
    """Ends an experiment where a test wants it to end."""


class KilledAt(Silent):
    """A watch that ends the experiment at an event, such as ("evaluated", 0)."""

    def __init__(self, event: str, step: int):
        super().__init__()
        self._end = (event, step)

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        if self._end == ("stepped", step):
            raise Killed

    def evaluated(self, step: int, estimate: Estimate) -> None:
        if self._end == ("evaluated", step):
            raise Killed


TURNS = """
import asyncio
import gspo as art

async def rollout(model, scenario):
    messages = [{"role": "user", "content": f"{scenario.index % 10}1{scenario.index % 7}"}]
    client, items = model.openai_client(), []
    for turn in range(2):
        response = await client.chat.completions.create(
            model=model.inference_name, messages=messages, max_tokens=4)
        items = [*messages, response.choices[0]]
        await asyncio.sleep(0)
    text = response.choices[0].message.content
    return art.Trajectory(messages_and_choices=items, reward=float(len(set(text))))
"""


# A run of a task is killed in the fast tests below and above.
@pytest.mark.parametrize("kind", [pytest.param("task", marks=pytest.mark.slow), "rollout"])
async def test_wherever_a_run_is_killed_it_ends_in_the_same_weights(tmp_path: Path, kind: str):
    fields = {"eval_every": 1, "eval_prompts": 4}

    def spec(name: str) -> Spec:
        folder = tmp_path / name
        if kind == "task":
            return small(folder, **fields)
        return own_rollout(folder, TURNS, **fields)

    whole = (await run_experiment(spec("whole"), Silent())).run
    assert [line["step"] for line in records(whole) if "val/reward" in line] == [0, 1, 2, 3]
    assert len({line["val/reward"] for line in records(whole)}) > 1
    # Behind the first evaluation; between a checkpoint and its evaluation; behind that.
    for event in (("evaluated", 0), ("stepped", 1), ("evaluated", 1), ("stepped", 3)):
        with pytest.raises(Killed):
            await run_experiment(spec("broken"), KilledAt(*event))
    broken = (await run_experiment(spec("broken"), Silent())).run
    assert records(broken) == records(whole)
    assert weights(broken, 3) == weights(whole, 3)


async def test_a_run_that_is_killed_in_an_evaluation_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = (await run_experiment(small(tmp_path / "whole", eval_every=1), Silent())).run
    measured = experiment.estimate_reward

    def killed(groups: Sequence[art.TrajectoryGroup]) -> Estimate:
        if (tmp_path / "broken/gspo/run/checkpoints/0002").exists():
            raise Killed
        return measured(groups)

    monkeypatch.setattr(experiment, "estimate_reward", killed)
    with pytest.raises(Killed):
        await run_experiment(small(tmp_path / "broken", eval_every=1), Silent())
    monkeypatch.undo()
    broken = (await run_experiment(small(tmp_path / "broken", eval_every=1), Silent())).run
    assert records(broken) == records(whole)
    assert weights(broken, 3) == weights(whole, 3)


async def test_contradicting_options_are_refused_before_anything_is_written(tmp_path: Path):
    spec = small(
        tmp_path, train=art.dev.TrainConfig(algorithm="grpo", importance_sampling_level="sequence")
    )
    with pytest.raises(ConfigError, match="importance_sampling_level='token', not 'sequence'"):
        await run_experiment(spec, Silent())
    assert not spec.folder.exists()


def test_a_change_in_a_table_is_told_by_its_option(tmp_path: Path):
    spec = small(tmp_path)
    spec.folder.mkdir(parents=True)
    assert experiment._remember(spec) == []
    changed = small(tmp_path, train=art.dev.TrainConfig(algorithm="grpo"), prompts=5)
    assert experiment._remember(changed) == [
        "changed since the run began: prompts: 4 -> 5",
        "changed since the run began: train.algorithm: None -> grpo",
    ]


async def test_checkpoint_every_saves_less_and_resumes_from_what_is_saved(tmp_path: Path):
    sizes = {"prompts": 2, "completions": 2, "eval_prompts": 0, "keep_checkpoints": None}
    spec = small(tmp_path, steps=3, checkpoint_every=2, load={"exact": False}, **sizes)
    await run_experiment(spec, Silent())
    checkpoints = spec.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["0002", "0003"]
    whole = records(spec.folder)
    assert [record["step"] for record in whole] == [1, 2, 3]
    shutil.rmtree(checkpoints / "0003")  # as a kill before the last step was saved
    watch = Silent()
    await run_experiment(spec, watch)
    assert watch.first == 2 and records(spec.folder) == whole


SLOW_TOOL = """
import asyncio
import itertools
import gspo as art

rewards = itertools.cycle((0.0, 1.0, 3.0))

async def rollout(model, scenario):
    messages = [{"role": "user", "content": f"prompt {scenario.index}"}]
    for turn in range(2):
        response = await model.openai_client().chat.completions.create(
            model=model.inference_name, messages=messages, max_tokens=4)
        await asyncio.sleep(0.02 * (scenario.index % 5))
    if scenario.index == FAILS:
        raise OSError("the tool broke")
    items = [*messages, response.choices[0]]
    return art.Trajectory(messages_and_choices=items, reward=next(rewards))
"""


def prompts_of(run: Path, step: int) -> list[str]:
    """What was asked at a step, in order."""
    stored = read_batch(run / "trajectories" / "train" / f"{step:04d}.parquet")
    return [str(t.messages()[0].get("content")) for group in stored.groups for t in group]


async def test_with_pipeline_rollouts_run_ahead_and_a_killed_run_goes_on(tmp_path: Path):
    code, fields = SLOW_TOOL.replace("FAILS", "None"), {"prompts": 2, "completions": 3}
    spec = own_rollout(tmp_path, code, pipeline=True, eval_prompts=0, **fields)
    with pytest.raises(Killed):
        await run_experiment(spec, KilledAt("stepped", 2))
    watch = Silent()
    run = (await run_experiment(spec, watch)).run
    assert watch.first == 2 and watch.steps == [3]
    told = [note for note in watch.notes if note.startswith("pipeline: ")]
    assert "max_staleness is 1" in told[0] and "doesn't repeat exactly" in told[0]
    lines = records(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Nothing runs ahead of the first step of a process.
    assert [line["staleness/max"] for line in lines] == [0, 1, 0]
    assert {line["staleness/dropped"] for line in lines} == {0}
    for step in (1, 2, 3):  # the prompts are those of a serial run
        wanted = [f"prompt {2 * (step - 1) + prompt}" for prompt in range(2) for _ in range(3)]
        assert prompts_of(run, step) == wanted
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "throughput/tokens_per_second" in logged
    assert "throughput/sampled_tokens_per_second" not in logged


async def test_a_rollout_that_fails_ahead_does_not_cost_the_step_that_trains(tmp_path: Path):
    code = SLOW_TOOL.replace("FAILS", "4")  # of the second step
    spec = own_rollout(tmp_path, code, eval_prompts=0, completions=2, pipeline=True)
    with pytest.raises(RolloutError, match="the tool broke"):
        await run_experiment(spec, Silent())
    assert [line["step"] for line in records(spec.folder)] == [1]
    assert (spec.folder / "checkpoints" / "0001").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_the_demo_learns_with_pipeline(tmp_path: Path):
    spec = demo_spec(str(tmp_path), 30).model_copy(update={"eval_prompts": 128, "pipeline": True})
    outcome = await run_experiment(spec, Silent())
    assert outcome.before is not None and outcome.after is not None
    assert outcome.after.low is not None and outcome.before.high is not None
    assert outcome.after.low > outcome.before.high
