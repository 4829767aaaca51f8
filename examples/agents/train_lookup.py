"""Train an agent that knows nothing of gspo, by the base URL of its episode.

    python examples/agents/train_lookup.py --agent langgraph

The task `lookup`: call a tool with the largest of four digits, and say the letter that it returns.
A warm start by SFT teaches how a call is written, and that the answer is what the tool returns;
its keys are any of the four digits. Which one is right, GSPO finds out from the reward alone.
docs/agents.md has what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

from openai import AsyncOpenAI

import gspo as art
from gspo.experiment.heldout import Estimate, estimate_reward
from gspo.lab.statistics import paired_difference
from gspo.tasks import load_task
from gspo.tasks.task import Problem, Split

Agent: TypeAlias = Callable[[AsyncOpenAI, str, str, str], Awaitable[str]]
TASK: Any = load_task("lookup")
FILES = {
    "plain": "plain_openai:agent",
    "langgraph": "langgraph_react:agent",
    "agents-sdk": "openai_agents:agent",
    "agents-sdk-chats": "openai_agents:agent_of_chats",
    "pydantic-ai": "pydantic_ai_agent:agent",
}


SFT = art.TrainSFTConfig(learning_rate=4e-3, lr_schedule="linear", batch_size=16)
CLIP = art.dev.TrainConfig(epsilon=3e-3, epsilon_high=4e-3)
"""Ten times the paper's: of 70 tokens of a call few are a choice, and the mean is over all."""
_PROGRAMS = asyncio.Semaphore(8)
"""That run at once."""


async def node(client: AsyncOpenAI, model: str, question: str, letters: str) -> str:
    """Run the agent that is a program of its own, in JavaScript; what it prints is its answer."""
    program = Path(__file__).parent / "node" / "agent.mjs"
    where = {"OPENAI_BASE_URL": str(client.base_url), "OPENAI_API_KEY": client.api_key}
    async with _PROGRAMS:
        process = await asyncio.create_subprocess_exec(
            *("node", str(program), model, question, letters),
            env=os.environ | where,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            printed, _ = await process.communicate()
        finally:
            if process.returncode is None:  # the rollout ran out of time
                process.kill()
                await process.wait()
    if process.returncode:
        raise RuntimeError(f"{program} ended with exit code {process.returncode}")
    return printed.decode().removesuffix("\n")


def agent_named(name: str) -> Agent:
    """The agent of an option `--agent`."""
    if name == "node":
        return node
    file, function = FILES[name].split(":")
    return getattr(importlib.import_module(file), function)


async def rollout(
    model: art.TrainableModel, client: AsyncOpenAI, agent: Agent, problem: Problem
) -> art.Trajectory:
    """One run of an agent, and its reward. All runs share the connections of `client`."""
    letters = "".join(TASK.look_up(problem, digit) for digit in range(10))
    async with art.trajectory(model) as t:
        here = client.copy(base_url=t.base_url, api_key=t.api_key)
        answer = await agent(here, model.inference_name, problem.prompt, letters)
        t.reward = TASK.score(problem, answer)
    return t


async def groups(
    model: art.TrainableModel, agent: Agent, split: Split, indices: range, size: int
) -> list[art.TrajectoryGroup]:
    """`size` rollouts of each of these problems."""
    problems = [TASK.problem(split, index) for index in indices]
    # Openai's own limit, 5 s for a connection, is too short for hundreds at once on a busy machine.
    async with AsyncOpenAI(api_key="each run has its own", timeout=300) as client:
        return await art.gather_trajectory_groups(
            (
                art.TrajectoryGroup(rollout(model, client, agent, p) for _ in range(size))
                for p in problems
            ),
            pbar_desc=None,
            rollout_timeout=300,
        )


def lesson(index: int) -> art.Trajectory:
    """A conversation of the right form, whose call has any of the question's digits for its key."""
    problem = TASK.problem("train", index, 1)  # the agents are asked those of seed 0
    key = int(random.Random(index).choice(problem.prompt))
    function = {"name": "look_up", "arguments": json.dumps({"key": key})}
    call = {"id": "call", "type": "function", "function": function}
    letter = TASK.look_up(problem, key)
    return art.Trajectory(
        messages_and_choices=[
            {"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call", "content": letter},
            {"role": "assistant", "content": letter},
        ],
        tools=TASK.tools,
    )


async def train(
    path: str,
    agent: Agent,
    *,
    lessons: int = 8000,
    steps: int = 24,
    prompts: int = 16,
    completions: int = 8,
    heldout: int = 400,
    every: int = 24,
    learning_rate: float = 2e-4,
    seed: int = 0,
) -> list[Estimate]:
    """Train, and print the held-out reward after the warm start, every `every` steps, and after."""
    estimates: list[Estimate] = []
    first: dict[str, float] = {}  # reward of each question, before
    began = time.process_time()
    async with art.LocalBackend(path=path, port=0, seed=seed) as backend:
        model = art.TrainableModel(name="agent", project="lookup", base_model="embedded:lookup")
        await model.register(backend)
        await model.train_sft(map(lesson, range(lessons)), SFT)
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                tried = await groups(model, agent, "heldout", range(heldout), 1)
                estimates.append(estimate_reward(tried))
                used = time.process_time() - began
                print(f"step {step}: held out {estimates[-1]}, {used:.0f} CPU seconds", flush=True)
                now = {str(t.messages()[0]): t.reward for group in tried for t in group}
                if first:  # the same questions
                    change = paired_difference([now[q] for q in first], [*first.values()])
                    print(f"change of {len(first)} questions: {change}", flush=True)
                first = first or now
            if step < steps:
                drawn = range(step * prompts, (step + 1) * prompts)
                batch = await groups(model, agent, "train", drawn, completions)
                await model.train(batch, art.TrainConfig(learning_rate=learning_rate), CLIP)
    return estimates


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an agent on lookup.")
    parser.add_argument("--agent", choices=[*FILES, "node"], default="plain")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled")
    parser.add_argument("--path", help="the run's folder; by default a new one in /tmp")
    options = parser.parse_args()
    path = options.path or tempfile.mkdtemp(prefix="lookup-")
    given = {name: getattr(options, name) for name in ("steps", "learning_rate", "seed")}
    asyncio.run(train(path, agent_named(options.agent), **given))


if __name__ == "__main__":
    main()
