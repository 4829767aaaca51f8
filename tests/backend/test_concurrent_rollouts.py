"""Exact mode: rollouts of several turns that run at once, in whatever order their tools answer, end
in the same weights; a run that is killed in the midst of them does too."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gspo as art

STEPS, ASKED = 3, ("312", "8790", "11", "54321")
KILLED = 9
noise = random.SystemRandom()


async def tool(text: str, slowest: float) -> str:
    """Answers when it likes: now, a little later in the same turn of the loop, or in a while."""
    await asyncio.sleep(noise.choice((0, 0, noise.uniform(0, slowest))))
    return str(len(text))


async def rollout(model: art.TrainableModel, digits: str, slowest: float) -> art.Trajectory:
    client = model.openai_client().chat.completions
    own = art.Trajectory(messages_and_choices=[{"role": "user", "content": digits}])
    for _ in range(2):
        await tool(digits, slowest)
        answer = await client.create(
            model=model.inference_name, messages=own.messages(), max_tokens=6
        )
        own.messages_and_choices.append(answer.choices[0])
        said = answer.choices[0].message.content or ""
        content = await tool(said, slowest)
        own.messages_and_choices.append({"role": "user", "content": content})
        own.reward += sum(said.count(digit) for digit in digits[:2])
    return own


async def run(path: Path, slowest: float, killed_at: int | None = None) -> str:
    """Train for `STEPS` calls, or go on with that; the hash of the weights, and of all rewards.

    At the step `killed_at` the process ends after some of the rollouts' turns.
    """
    model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
    async with art.LocalBackend(path) as backend:
        await model.register(backend)
        assert backend.policy(model).exact
        for step in range(await model.get_step(), STEPS):
            if step == killed_at:
                asyncio.get_running_loop().call_later(0.05, os._exit, KILLED)
            groups = await art.gather_trajectory_groups(
                art.TrajectoryGroup(rollout(model, digits, slowest) for _ in range(3))
                for digits in ASKED
            )
            await model.train(groups, art.TrainConfig(learning_rate=1e-3))
        digest = hashlib.sha256()
        for parameter in backend.policy(model).lm.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        rewards = [line["train/reward"] for line in backend.run(model).metrics()]
    return f"{digest.hexdigest()} {rewards}"


async def test_the_order_in_which_tools_answer_changes_nothing(tmp_path: Path):
    quiet = await run(tmp_path / "quiet", 0.0)
    assert quiet == await run(tmp_path / "noisy", 0.02)


@pytest.mark.slow
async def test_a_run_that_is_killed_among_its_rollouts_ends_in_the_same_weights(tmp_path: Path):
    whole = await run(tmp_path / "whole", 0.02)
    for attempt in range(3):
        path = tmp_path / f"killed-{attempt}"
        program = (
            "import asyncio, pathlib, sys; from test_concurrent_rollouts import run; "
            "asyncio.run(run(pathlib.Path(sys.argv[1]), 0.2, killed_at=1))"
        )
        environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        killed = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            cwd=Path(__file__).parent,
            env=environment,
            timeout=120,
            check=False,
        )
        assert killed.returncode == KILLED
        assert len(list((path / "p" / "m" / "checkpoints").iterdir())) == 1
        assert await run(path, 0.02) == whole
