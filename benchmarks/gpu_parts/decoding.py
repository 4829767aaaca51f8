"""Decoding: tokens/s of the engine, and where the time of one decoded token goes.

Each run decodes 128 tokens (no end token ends one) behind prompts of 128, in groups of 8
completions to a prompt. `seconds` and `tokens_per_s` are of the whole call of `generate`.
`step_s` is the time of one decoded position, from the middle of the run. `floor_s` is what the
memory of the data sheet needs for what the running completions have to read: the weights at each
decoded position, each running prompt's keys and values once, and those of the decoded tokens;
`of_floor` is the share that this is of `seconds`.

`profile` counts a few positions of a short run of the same completions; `host_share` is the part of
`step_s` in which no kernel runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from gpu_parts import models
from gpu_parts.bench import Bench, free
from gpu_parts.profiling import Profiled, host_share
from gspo.kernels.kv_cache import kv_bytes
from gspo.policy.policy import Policy
from gspo.serve import admission
from gspo.serve.batch import Batch
from gspo.serve.decoding import Running
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine
from gspo.serve.torch_engine import TorchEngine
from gspo.weights.rollout_copy import RoundedCopy

GROUP = 8
FIRST, LAST = 4, 8
"""Decoded positions between which the profiler looks."""
RAISED = 32 * 2**30


def measure(bench: Bench) -> None:
    """Three numbers of completions on a bfloat16 copy; the trainer's rounded weights, which engines
    without `rollout_dtype` use; less memory for keys and values; an MoE."""
    _dense(bench)
    free()
    middle = bench.size(64, 16)
    sparse = models.policy_of(models.moe(tiny=bench.tiny), bench.card)
    copy = RoundedCopy(sparse, "bfloat16").policy
    _run(bench, copy, middle, RAISED, f"MoE copy, {middle} completions")


def _dense(bench: Bench) -> None:
    policy = models.policy_of(models.dense(tiny=bench.tiny), bench.card)
    policy.round_weights()
    copy = RoundedCopy(policy, "bfloat16").policy
    small, middle, large = bench.size((8, 64, 512), (8, 16, 24))
    for count in (large, middle, small):
        _run(bench, copy, count, RAISED, f"bfloat16 copy, {count} completions")
    for count in (large, middle):
        _run(bench, policy, count, RAISED, f"the trainer's weights, {count} completions")
    # Half of the completions find room at a time; the copy's keys have half of float32's bytes.
    tight = kv_bytes(large // 2, bench.size(256, 24), copy.lm.config) // 2
    _run(bench, copy, large, tight, f"bfloat16 copy, {large} completions, less KV_BYTES")


def _run(bench: Bench, policy: Policy, count: int, kv_bytes: int, what: str) -> None:
    budget = mock.patch.object(admission, "kv_budget", lambda device: kv_bytes)
    with bench.row(what) as row, budget:
        engine = TorchEngine(policy)
        check_engine(engine)
        prompt, length = bench.size((128, 128), (8, 16))
        requests = _requests(policy, count, prompt, length)
        _decode(engine, _requests(policy, count, prompt, LAST + 2), LAST + 2)  # warm-up
        with watched() as steps:
            marks = _marks(bench, steps, length // 4, length // 2)
            times = bench.time(lambda: _decode(engine, requests, length), repeats=1, warmup=0)
        first, second = marks
        step_s = (second - first) / (length // 2 - length // 4)
        floor = _floor_bytes(policy, steps.running, count, prompt, length)
        limit = bench.card.bytes_per_s
        row |= {
            "seconds": times["median_s"],
            "tokens_per_s": count * length / times["median_s"],
            "step_s": step_s,
            "kv_bytes": kv_bytes,
            "decoded_positions": len(steps.running),
            "completions_at_once": max(steps.running),
            "floor_s": None if limit is None else floor / limit,
            "of_floor": None if limit is None else floor / limit / times["median_s"],
        }
        with watched() as steps:
            profiler = Profiled(bench.card)
            steps.calls = {FIRST: profiler.start, LAST: profiler.stop}
            _decode(engine, _requests(policy, count, prompt, LAST + 2), LAST + 2)
        row["profile"] = profiler.counts(per=LAST - FIRST)
        row["host_share"] = host_share(row["profile"], step_s)


class Steps:
    """Decoded positions of the engine while it is watched.

    Attributes:
        running: how many completions ran at each.
        calls: what is called before the decoding of a position, by its number.
    """

    def __init__(self) -> None:
        self.running: list[int] = []
        self.calls: dict[int, Callable[[], object]] = {}

    def begins(self, completions: int) -> None:
        """A position begins."""
        self.calls.get(len(self.running), lambda: None)()
        self.running.append(completions)


@contextmanager
def watched() -> Iterator[Steps]:
    """Count the decoded positions inside; costs no wait for the device."""
    steps, step = Steps(), Batch._go_on

    def counting(batch: Batch, running: Running, *, joined: bool) -> Any:
        steps.begins(len(running.completions))
        return step(batch, running, joined=joined)

    with mock.patch.object(Batch, "_go_on", counting):
        yield steps


def _marks(bench: Bench, steps: Steps, *positions: int) -> list[float]:
    """The times at which these positions begin, once they have."""
    marks: list[float] = []

    def mark() -> None:
        bench.card.synchronize()
        marks.append(time.perf_counter())

    steps.calls = dict.fromkeys(positions, mark)
    return marks


def _requests(policy: Policy, count: int, prompt: int, length: int) -> list[Request]:
    rng = np.random.default_rng(0)
    vocabulary = policy.head.weight.shape[0]
    params = SamplingParams(n=GROUP, max_tokens=length, seed=0, ignore_eos=True)
    return [
        Request(tuple(rng.integers(vocabulary, size=prompt).tolist()), params)
        for _ in range(count // GROUP)
    ]


def _decode(engine: TorchEngine, requests: list[Request], length: int) -> None:
    done = engine.generate(requests)
    assert all(len(one.token_ids) == length for group in done for one in group)


def _floor_bytes(
    policy: Policy, running: list[int], completions: int, prompt: int, length: int
) -> float:
    """Count the bytes that must be read, given how many completions ran at each position."""
    kind = next(policy.lm.parameters()).dtype
    config = policy.lm.config.get_text_config()
    token = kv_bytes(1, 1, config) / torch.float32.itemsize * kind.itemsize
    weights = sum(p.numel() for p in policy.lm.parameters()) * kind.itemsize
    prompts = sum(-(-count // GROUP) for count in running) * prompt
    decoded = completions * sum(range(1, length))
    return weights * len(running) + token * (prompts + decoded)
