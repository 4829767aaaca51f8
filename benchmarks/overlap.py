"""Rollouts beside training against one after the other: steps per hour, and what is trained on.

    python benchmarks/overlap.py

The loop is that of a user: `trajectory_group_batches` and `train`, serially
(`max_concurrent_batches=1`) and with later batches running ahead. In a batch the longest episode is
30 times the shortest; both sides sample the same lengths.

On the simulated engine a decode step takes a time of its own, however many completions are in it,
up to the engine's slots; `train` takes another. Everything else is real, but the seconds are those
of a clock that jumps (virtual_time.py), so these rows are the same on any machine. The embedded
rows train a model, in real seconds: there engine and trainer share one thread, and what overlaps is
what waits for something else, such as a tool. In the vLLM rows a server of one thread samples
beside the trainer's thread; they need GSPO_VLLM_PYTHON, or an environment of 3.5 GB is made:

    GSPO_VLLM_PYTHON=venv/bin/python python benchmarks/run.py overlap:vllm overlap:vllm_tool
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import run
import venvs
from harness import WORK, Pairs, stamp
from virtual_time import in_virtual_time

import gspo as art
from gspo.serve.engine import Completion, Request
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.server import Serving

SPREAD = 30
GOAL = 1.6


@dataclass(frozen=True)
class Sizes:
    """A run on the simulated engine. Seconds are those of the event loop's clock.

    Attributes:
        steps: calls of `train`.
        groups, completions: of a step.
        slots: completions that are decoded at once.
        tick: seconds of a decode step.
        train: seconds of a call of `train`.
        ahead: steps for which rollouts run ahead.
    """

    steps: int = 12
    groups: int = 24
    completions: int = 4
    slots: int = 128
    tick: float = 0.03
    train: float = 0.45
    ahead: int = 1


def length(prompt: object, number: int) -> int:
    """Length of an episode, 1 to `SPREAD`: log-uniform over prompts, which are harder or easier,
    and by a fifth of the logarithm its own.

    >>> sorted({length(prompt, 0) for prompt in range(3000)}) == list(range(1, 31))
    True
    """
    hard, own = random.Random(f"{prompt}").random(), random.Random(f"{prompt}/{number}").random()
    return int((SPREAD + 1) ** (0.8 * hard + 0.2 * own))


class SimulatedEngine(FakeEngine):
    """Decodes a token of each completion that has a slot in each tick.

    Attributes:
        sampled: the lengths of what was begun, in this order.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        self._tick, self._slots = sizes.tick, asyncio.Semaphore(sizes.slots)
        self.sampled: list[int] = []

    async def complete(self, request: Request) -> list[Completion]:
        self.requests.append(request)
        decoding = (self._decoded(request, index) for index in range(request.params.n))
        return await asyncio.gather(*decoding)

    async def _decoded(self, request: Request, index: int) -> Completion:
        tokens = length(self.tokenizer.decode(request.prompt), index)
        self.sampled.append(tokens)
        versions = []
        async with self._slots:
            for _ in range(tokens):
                await asyncio.sleep(self._tick)
                versions.append(self.policy_version)
        whole = self._completion(request, "a" * (tokens - 1))
        return replace(whole, policy_versions=tuple(versions))


class SimulatedBackend(art.FakeBackend):
    """A `FakeBackend` whose engine and whose `train` take their time."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.engine = SimulatedEngine(sizes)
        self._serving = Serving(self.engine, lambda: self._names, None)
        self._seconds = sizes.train

    async def train(self, *arguments: Any, **options: Any) -> art.TrainResult:
        await asyncio.sleep(self._seconds)
        return await super().train(*arguments, **options)


@dataclass(frozen=True)
class Trained:
    """What a run of the loop did.

    Attributes:
        seconds: of all its steps.
        sampled, trained: lengths of the completions that were begun, and of those trained on.
        ages: for each step, the age of its oldest token, in versions, when it was trained on.
    """

    seconds: float
    sampled: list[int]
    trained: list[int]
    ages: list[int]


async def answers(model: art.TrainableModel, prompt: int, count: int) -> art.TrajectoryGroup:
    """A rollout of one turn, `count` times."""
    asked: Any = [{"role": "user", "content": f"prompt {prompt}"}]
    answer = await model.openai_client().chat.completions.create(
        model=model.inference_name, messages=asked, n=count
    )
    return art.TrajectoryGroup(
        art.Trajectory(messages_and_choices=[*asked, choice], reward=choice.index % 2)
        for choice in answer.choices
    )


def versions(trajectory: art.Trajectory) -> list[int]:
    """The version of each of its tokens."""
    (choice,) = trajectory.choices()
    several = getattr(choice, "policy_versions", None)
    return several or [choice.policy_version] * len(choice.token_ids)  # type: ignore[attr-defined]


async def simulate(sizes: Sizes, batches: Any = None) -> Trained:
    """Run the loop.

    Args:
        sizes: of the run.
        batches: another way to make the batches of a model than `admitted`.
    """
    trained: list[int] = []
    ages: list[int] = []
    async with SimulatedBackend(sizes) as backend:
        model = art.TrainableModel(name="simulated", project="overlap", base_model="none")
        await model.register(backend)
        loop = asyncio.get_running_loop()
        began = loop.time()
        async for batch in (batches or admitted)(model, sizes):
            tokens = [versions(trajectory) for group in batch for trajectory in group]
            trained += map(len, tokens)
            ages.append(backend.engine.policy_version - min(map(min, tokens)))
            await model.train(batch)
        return Trained(loop.time() - began, backend.engine.sampled, trained, ages)


def admitted(model: art.TrainableModel, sizes: Sizes) -> AsyncIterator[list[art.TrajectoryGroup]]:
    """gspo's way: nothing begins that would be too old, and all that begins is trained on."""
    return art.trajectory_group_batches(
        (answers(model, g, sizes.completions) for g in range(sizes.steps * sizes.groups)),
        batch_size=sizes.groups,
        max_concurrent_batches=1 + sizes.ahead,
        pbar_desc=None,
    )


async def discarding(
    model: art.TrainableModel, sizes: Sizes
) -> AsyncIterator[list[art.TrajectoryGroup]]:
    """What gspo does not do: a new group begins whenever one ends, a batch is what ended first,
    and what is older than `ahead` versions by then is thrown away."""
    fresh: list[art.TrajectoryGroup] = []
    prompts = itertools.count()

    def begun(count: int) -> set[asyncio.Task[art.TrajectoryGroup]]:
        begin = asyncio.get_running_loop().create_task
        return {begin(answers(model, next(prompts), sizes.completions)) for _ in range(count)}

    running, yielded = begun(2 * sizes.groups), 0
    while yielded < sizes.steps:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        running |= begun(len(done))
        fresh += [task.result() for task in done]
        fresh = [g for g in fresh if yielded - min(min(versions(t)) for t in g) <= sizes.ahead]
        if len(fresh) >= sizes.groups:
            batch, fresh = fresh[: sizes.groups], fresh[sizes.groups :]
            yield batch
            yielded += 1
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def same_distribution(found: Trained) -> float:
    """p of Kolmogorov and Smirnov's two-sample test: lengths trained on against lengths begun."""
    from scipy.stats import ks_2samp

    result: Any = ks_2samp(found.trained, found.sampled)
    return float(result.pvalue)


@dataclass(frozen=True)
class Episodes:
    """A run of the embedded model: two turns with a tool between them, which takes its time.

    Attributes:
        tool: seconds of the slowest call of the tool; the fastest takes a `SPREAD`th. 0: no tool.
        tokens: of the longest answer; the shortest has a `SPREAD`th. 0: up to 12.
        vllm: whether a vLLM server samples, from a dense model of random weights.
    """

    steps: int = 6
    groups: int = 16
    completions: int = 8
    tool: float = 1.0
    ahead: int = 1
    tokens: int = 0
    vllm: bool = False


async def episode(
    model: art.TrainableModel, sizes: Episodes, group: int, number: int
) -> art.Trajectory:
    """Ask, use the tool, and ask again."""
    items: list[Any] = []
    for turn in range(2):
        items.append({"role": "user", "content": str(random.Random(group + turn).randrange(10**6))})
        answer = await model.openai_client().chat.completions.create(
            model=model.inference_name,
            messages=art.Trajectory(messages_and_choices=items).messages(),
            max_tokens=sizes.tokens * length(group, number) // SPREAD or 12,
            seed=number,
            extra_body={"ignore_eos": bool(sizes.tokens)},
        )
        items.append(answer.choices[0])
        if turn == 0:
            await asyncio.sleep(sizes.tool * length(group, number) / SPREAD)
    return art.Trajectory(messages_and_choices=items, reward=number % 2)


def server() -> list[str]:
    """What starts a vLLM server of one thread."""
    python = os.environ.get("GSPO_VLLM_PYTHON") or venvs.python_of("vllm")
    return [f"env VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 {python} --enforce-eager"]


@cache
def dense() -> str:
    """A model of random weights that vLLM takes on a CPU: heads of 32, untied."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from gspo.policy.embedded import SPECIAL, build_tokenizer

    folder, tokenizer = WORK / "overlap-dense", build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=1024,
        eos_token_id=SPECIAL.index("<|end|>"),
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


async def train_model(sizes: Episodes) -> float:
    """Seconds of the loop's steps; loading is left out."""
    numbers = range(sizes.completions)
    with tempfile.TemporaryDirectory() as folder:
        engines, base = (server(), dense()) if sizes.vllm else ((), "embedded:sort")
        async with art.LocalBackend(folder, keep_checkpoints=1, engines=engines) as backend:
            model = art.TrainableModel(name="m", project="overlap", base_model=base)
            await model.register(backend)
            groups = [
                art.TrajectoryGroup(episode(model, sizes, g, n) for n in numbers)
                for g in range(sizes.steps * sizes.groups)
            ]
            began = time.perf_counter()
            async for batch in art.trajectory_group_batches(
                groups,
                batch_size=sizes.groups,
                max_concurrent_batches=1 + sizes.ahead,
                pbar_desc=None,
            ):
                result = await model.train(batch)
                assert result.metrics["staleness/max"] <= sizes.ahead
            return time.perf_counter() - began


def seconds_of(sizes: Sizes | Episodes) -> float:
    """Seconds of a run: of the jumping clock, or real ones."""
    if isinstance(sizes, Episodes):
        return asyncio.run(train_model(sizes))
    return in_virtual_time(simulate(sizes)).seconds


def compared(sizes: Sizes | Episodes, repeats: int) -> Pairs:
    """Both sides in turns; the one that goes first changes."""
    sides = (sizes, replace(sizes, ahead=0))
    times: tuple[list[float], list[float]] = ([], [])
    for at in range(repeats):
        for side in (0, 1) if at % 2 == 0 else (1, 0):
            times[side].append(seconds_of(sides[side]))
    return Pairs(tuple(times[0]), tuple(times[1]))


LONGEST = SPREAD * Sizes.tick
"""Seconds of the longest rollout."""
PARTS = ("half", "equal", "two_ahead", "three", "tool", "no_tool", "vllm", "vllm_tool")
CASES: dict[str, tuple[str, Sizes | Episodes, float | None]] = {
    "half": ("train takes half of the longest rollout", Sizes(train=LONGEST / 2), GOAL),
    "equal": ("train takes as long as the longest rollout", Sizes(train=LONGEST), GOAL),
    "two_ahead": ("half, 2 steps ahead", Sizes(train=LONGEST / 2, ahead=2), GOAL),
    "three": ("train takes 3 times the longest rollout", Sizes(train=3 * LONGEST), None),
    "tool": (
        "embedded model, a tool of up to 10 s",
        Episodes(groups=8, completions=4, tool=10.0),
        GOAL,
    ),
    "no_tool": ("embedded model, no tool", Episodes(tool=0.0), None),
    "vllm": (
        "vLLM server, answers of 12 to 360 tokens",
        Episodes(groups=8, completions=8, tool=0.0, tokens=360, vllm=True),
        GOAL,
    ),
    "vllm_tool": (
        "vLLM server, a tool of up to 10 s",
        Episodes(groups=8, completions=4, tool=10.0, vllm=True),
        GOAL,
    ),
}
"""What is measured, its sizes, its goal."""


def shape(sizes: Sizes | Episodes) -> str:
    """For the table."""
    told = f"{sizes.steps} steps of {sizes.groups} x {sizes.completions}, {sizes.ahead} ahead"
    if isinstance(sizes, Episodes):
        return f"{told}, 2 turns, {'a thread each' if sizes.vllm else '1 thread'}"
    return f"{told}, lengths 1..{SPREAD}, {sizes.slots} slots"


def measure_part(part: str, repeats: int = 3, *, tiny: bool = False) -> dict[str, Any]:
    """One row of the table."""
    what, sizes, goal = CASES[part]
    simulated = isinstance(sizes, Sizes)
    if tiny:
        fields = {} if simulated else {"tool": 0.02, "tokens": sizes.tokens and SPREAD}
        sizes = replace(sizes, steps=3, groups=2, **fields)
    pairs = compared(sizes, 1 if simulated else repeats)
    detail: dict[str, Any] = {}
    for side, seconds in (("ours", pairs.ours), ("other", pairs.other)):
        detail[f"steps_per_hour_{side}"] = [round(3600 * sizes.steps / s) for s in seconds]
    row = stamp(
        name="overlap",
        what=what,
        shape=shape(sizes),
        other="one after the other",
        goal=goal,
        unit="simulated s" if simulated else "s",
        detail=detail | (lengths(sizes) if isinstance(sizes, Sizes) else {}),
        command=f"python benchmarks/run.py overlap:{part}",
        **pairs.fields(),
    )
    return row.as_dict()


def lengths(sizes: Sizes) -> dict[str, Any]:
    """Whether what is trained on has the lengths of what was begun, with and without discarding."""
    told = {}
    for name, batches in (("admitted", None), ("discarding", discarding)):
        found = in_virtual_time(simulate(sizes, batches))
        told[name] = {
            "p": same_distribution(found),
            "mean_begun": round(sum(found.sampled) / len(found.sampled), 2),
            "mean_trained": round(sum(found.trained) / len(found.trained), 2),
            "oldest": max(found.ages),
        }
    return told


if __name__ == "__main__":
    sys.exit(run.main(["overlap", *sys.argv[1:]]))
