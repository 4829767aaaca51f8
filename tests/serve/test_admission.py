"""The line of those who wait: first come, first served, in turns, as places and memory allow."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from gspo.kernels.kv_cache import Layout, kv_bytes
from gspo.policy.policy import Policy
from gspo.serve import admission
from gspo.serve.admission import Group, Line, kv_budget
from gspo.serve.decoding import OpenCompletion
from gspo.serve.engine import Request, SamplingParams
from support import embedded

SHARED: Layout = "shared"


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


def group(n: int, prompt: int = 3, limit: int = 10, first: int = 1) -> Group:
    request = Request(tuple(range(first, first + prompt)), SamplingParams(n=n))
    return Group([OpenCompletion(request, limit, (0, i)) for i in range(n)])


def line(policy: Policy, *groups: Group, max_running: int = 512, layout: Layout = SHARED) -> Line:
    line = Line(policy, layout, max_running)
    for each in groups:
        line.add(each)
    return line


def owners(taken: list[OpenCompletion], *groups: Group) -> list[int]:
    return [i for c in taken for i, each in enumerate(groups) if c in each.completions]


def test_a_first_batch_takes_all_in_their_order(policy: Policy):
    groups = [group(40), group(3), group(1)]
    waiting = line(policy, *groups)
    assert owners(waiting.take([]), *groups) == [0] * 40 + [1] * 3 + [2]
    assert not waiting
    assert waiting.take([]) == []


def test_places_are_taken_in_turns_of_requests(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """The first has had its share, so the others come first; after one turn each it goes on."""
    monkeypatch.setattr(admission, "TURN", 2)
    groups = [group(9), group(5), group(1)]
    waiting = line(policy, *groups, max_running=4)
    busy = waiting.take([])
    assert owners(busy, *groups) == [0] * 4
    order: list[int] = []
    while waiting:
        del busy[0]
        new = waiting.take(busy)
        order += owners(new, *groups)
        busy += new
    assert order == [1, 1, 2, 0, 0, 1, 1, 0, 0, 1, 0]


def test_whoever_waits_is_taken_once(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """Also if a few are put back, or a request leaves the line."""
    monkeypatch.setattr(admission, "TURN", 3)
    for seed in range(30):
        rng = random.Random(seed)
        groups = [group(rng.randint(1, 40), rng.randint(1, 300)) for _ in range(6)]
        waiting, busy = line(policy, max_running=rng.choice([1, 7, 40])), []
        taken, left, gone = [], list(groups), None
        while waiting or left:
            if left and rng.random() < 0.5:
                waiting.add(left.pop())
            elif gone is None and len(left) < 6 and rng.random() < 0.1:
                gone = rng.choice([each for each in groups if each not in left])
                waiting.drop(gone)
            new = waiting.take(busy)
            taken += new
            busy += new
            busy = [completion for completion in busy if rng.random() < 0.8]
        assert len(taken) == len(set(taken))
        for each in groups:
            got = [completion for completion in each.completions if completion in taken]
            assert each is gone or got == list(each.completions)
            assert got == list(each.completions[: each.next])


def test_a_few_wait_for_more_if_places_are_few(policy: Policy):
    groups = [group(100), group(100, first=9)]
    waiting = line(policy, *groups, max_running=100)
    busy = waiting.take([])
    assert waiting.take(busy[5:]) == []  # 5 places of 100
    assert owners(waiting.take(busy[8:]), *groups) == [1] * 8
    assert owners(line(policy, group(1), max_running=100).take(busy[1:])) == []


def test_one_that_fits_joins_at_once(policy: Policy):
    one = group(1)
    assert line(policy, one, max_running=100).take(list(group(99).completions)) == one.completions


def test_prompts_are_computed_in_parts_beside_others(policy: Policy):
    """At least one whole prompt; a prompt that several share counts once."""
    groups = [group(2, 400, first=9), group(1, 100, first=8), group(1, 100, first=7)]
    running = list(group(1).completions)
    waiting = line(policy, *groups)
    assert owners(waiting.take(running), *groups) == [0, 0, 1]
    assert owners(waiting.take(running), *groups) == [2]
    one = group(3, 2000)  # longer than a part, and yet read once for all of its completions
    assert owners(line(policy, one).take(running), one) == [0, 0, 0]
    alone = group(1, 500), group(1, 480, first=2)
    assert owners(line(policy, *alone).take([]), *alone) == [0, 1]


@pytest.mark.parametrize(("layout", "taken"), [("model_cache", 3), ("equal_lengths", 2)])
def test_without_shared_prompts_nobody_joins(policy: Policy, layout: Layout, taken: int):
    groups = [group(1, 3), group(1, 3), group(1, 5)]
    waiting = line(policy, *groups, layout=layout)
    assert waiting.take(list(group(1).completions)) == []
    assert len(waiting.take([])) == taken


def test_memory_is_planned_by_the_type_of_keys(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    config = policy.lm.config.get_text_config()
    room = kv_bytes(4, 10, config) + kv_bytes(1, 3, config)
    monkeypatch.setattr(admission, "kv_budget", lambda device: room)
    assert len(line(policy, group(9)).take([])) == 4
    assert len(line(policy, group(9), layout="model_cache").take([])) == 3
    rough = embedded(dtype="bfloat16")
    rough.round_weights()
    assert len(line(rough, group(9)).take([])) == 4  # attention in tiles keeps float32 on a CPU
    assert len(line(rough, group(9), layout="model_cache").take([])) == 6


def test_one_always_fits(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(admission, "kv_budget", lambda device: 1)
    assert len(line(policy, group(3)).take([])) == 1


def test_the_free_memory_bounds_the_budget(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    for text, budget in (
        ("MemTotal: 9 kB\nMemAvailable:     1024 kB\n", 2**19),
        (f"MemAvailable: {2**40} kB\n", admission.KV_BYTES),
        ("nothing", admission.KV_BYTES),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert kv_budget(cpu) == budget
