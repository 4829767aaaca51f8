"""One decode step at a time: requests come, go and are cancelled; weights change in between.

Whatever happens, everybody who waits gets an answer, and no place is lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gspo.core import compute as compute_module
from gspo.core.compute import ComputeThread
from gspo.core.errors import BusyError, NumericsError, RunError, ServeError
from gspo.kernels.prompt_cache import SharedPrompts
from gspo.policy.policy import Policy
from gspo.serve import scheduler as module
from gspo.serve.batch import Batch
from gspo.serve.engine import Completion, Piece, Request, SamplingParams
from gspo.serve.selfcheck import make_exact
from gspo.serve.torch_engine import TorchEngine
from support import embedded

LIMIT = 60.0


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


@pytest.fixture
def compute() -> Iterator[ComputeThread]:
    compute = ComputeThread()
    yield compute
    compute.close()
    compute._threads.each[0].join()  # its steps are no other test's


@pytest.fixture
def engine(policy: Policy, compute: ComputeThread) -> TorchEngine:
    """As behind a socket: requests join those that run."""
    return TorchEngine(policy, compute, max_running=8, sockets=True)


@pytest.fixture
def patient(policy: Policy, compute: ComputeThread) -> TorchEngine:
    """In a program: requests wait until a batch is over."""
    return TorchEngine(policy, compute)


class Steps:
    """Watches the steps of every batch.

    Attributes:
        sizes: for each step, the completions that it decoded; `before` is called before each.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.sizes: list[int] = []
        self.before: Callable[[], object] = lambda: None
        real = Batch.step

        def step(batch: Batch, new: Any) -> bool:
            self.before()
            self.sizes.append(len(batch.busy) + len(new))
            return real(batch, new)

        monkeypatch.setattr(Batch, "step", step)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def request(length: int = 5, n: int = 1, seed: int = 0, prompt: int = 3, **params: Any) -> Request:
    """A request whose completions all have `length` tokens, but under a grammar."""
    common: Any = {"n": n, "max_tokens": length, "seed": seed, "ignore_eos": True}
    return Request(tuple(range(6, 6 + prompt)), SamplingParams(**common | params))


async def several(engine: TorchEngine, count: int = 4) -> list[Any]:
    answers = (engine.complete(request(seed=i)) for i in range(count))
    return await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), LIMIT)


async def until(true: Any) -> None:
    limit = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < limit
        await asyncio.sleep(0.001)


def is_idle(engine: TorchEngine) -> bool:
    scheduler = engine._scheduler
    return not (
        scheduler._queued or scheduler._active or scheduler._inbox or scheduler._open
    ) and all(not (d._sent or d._waiting) for d in scheduler._desks.values())


@pytest.mark.parametrize("orders", [25, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sockets", [True, False])
async def test_random_arrivals_and_cancellations_lose_nothing(
    policy: Policy, compute: ComputeThread, sockets: bool, orders: int, steps: Steps
):
    """Each answer is the one that the request gets alone; cancelled ones leave."""
    engine = TorchEngine(policy, compute, max_running=5, sockets=sockets)
    asked = [request(1 + i % 7, n=1 + i % 3, seed=i, prompt=1 + i % 4) for i in range(12)]
    expected = [[c.token_ids for c in engine.generate([one])[0]] for one in asked]
    steps.sizes.clear()

    async def one(i: int, late: int) -> Any:
        for _ in range(late):
            await asyncio.sleep(0)
        return [c.token_ids for c in await engine.complete(asked[i])]

    for order in range(orders):
        rng = random.Random(order)
        chosen = rng.sample(range(12), 6)
        tasks = [asyncio.create_task(one(i, rng.randrange(60))) for i in chosen]
        doomed = rng.sample(tasks, rng.randrange(3))
        for task in doomed:
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            task.cancel()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LIMIT)
        for i, task, answer in zip(chosen, tasks, answers, strict=True):
            cancelled = task in doomed and isinstance(answer, asyncio.CancelledError)
            assert cancelled or answer == expected[i]
        await until(lambda: is_idle(engine))
    assert max(steps.sizes) <= 5


async def test_a_cancelled_request_frees_its_places_within_one_step(
    engine: TorchEngine, steps: Steps
):
    long = asyncio.create_task(engine.complete(request(400, n=8)))
    await until(lambda: len(steps.sizes) > 2)
    waiting = asyncio.create_task(engine.complete(request(3, seed=7)))
    await until(lambda: len(engine._scheduler._active) == 2)  # it is in the line
    seen: list[int] = []
    gate = threading.Event()
    steps.before = lambda: (seen.append(1), gate.wait(LIMIT))
    await until(lambda: seen)  # a step has begun
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    steps.before = lambda: None
    first = len(steps.sizes)
    gate.set()
    assert len((await asyncio.wait_for(waiting, LIMIT))[0].token_ids) == 3
    assert steps.sizes[first : first + 4] == [8, 1, 1, 1]
    await until(lambda: is_idle(engine))


async def test_a_request_joins_those_that_run(engine: TorchEngine, steps: Steps):
    long = asyncio.create_task(engine.complete(request(200)))
    await until(lambda: len(steps.sizes) > 2)
    short = await asyncio.wait_for(engine.complete(request(3, seed=1)), LIMIT)
    assert len(short[0].token_ids) == 3 and not long.done()
    assert max(steps.sizes) == 2
    long.cancel()


async def test_in_a_program_it_waits_until_the_batch_is_over(patient: TorchEngine, steps: Steps):
    """So the same requests are decoded together in each run."""
    ended: list[str] = []

    async def one(name: str, length: int, seed: int) -> None:
        await patient.complete(request(length, seed=seed))
        ended.append(name)

    first = [asyncio.create_task(one(name, n, n)) for name, n in (("long", 60), ("short", 2))]
    await until(lambda: len(steps.sizes) > 3)
    await asyncio.wait_for(asyncio.gather(one("late", 2, 1), *first), LIMIT)
    assert ended == ["long", "short", "late"]
    assert steps.sizes == [2] * 2 + [1] * 58 + [1] * 2


async def test_what_is_asked_together_is_decoded_together(patient: TorchEngine, steps: Steps):
    await several(patient, 40)
    assert steps.sizes == [40] * 5


async def test_a_large_request_does_not_starve_a_small_one(engine: TorchEngine, steps: Steps):
    """It waits for at most as many steps as one turn of each request before it takes."""
    large = [asyncio.create_task(engine.complete(request(4, n=500, seed=i))) for i in range(2)]
    await until(lambda: len(steps.sizes) > 8)
    before = len(steps.sizes)
    await asyncio.wait_for(engine.complete(request(4, seed=9)), LIMIT)
    turns = 2 * 32 / 8  # two turns of 32 completions, 8 at once
    assert len(steps.sizes) - before <= 4 * (turns + 2)
    assert not any(task.done() for task in large)
    for task in large:
        task.cancel()


async def test_the_queue_is_bounded(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_OPEN", 3)
    results = await several(engine, 5)
    assert [type(result) for result in results] == [list] * 3 + [BusyError] * 2
    assert "3 requests are not answered yet" in str(results[3])
    assert len(await engine.complete(request())) == 1


async def test_who_waits_for_the_device_gets_it_after_one_step(
    engine: TorchEngine, compute: ComputeThread, steps: Steps
):
    long = asyncio.create_task(engine.complete(request(400)))
    await until(lambda: len(steps.sizes) > 2)
    gate, entered = threading.Event(), threading.Event()
    steps.before = lambda: (entered.set(), gate.wait(LIMIT))
    await asyncio.to_thread(entered.wait, LIMIT)
    turns = [asyncio.create_task(compute.run(lambda: len(steps.sizes))) for _ in range(2)]
    await until(compute.contended)
    before = len(steps.sizes)
    gate.set()
    assert await asyncio.gather(*turns) == [before + 1] * 2
    await until(lambda: len(steps.sizes) > before + 3)  # and it goes on
    long.cancel()


async def test_each_token_has_the_version_that_sampled_it(compute: ComputeThread, steps: Steps):
    """Its log-prob too: up to the publication that of the old weights, then of the new."""
    policy = embedded()
    engine = TorchEngine(policy, compute, sockets=True)
    old = engine.generate([request(40)])[0][0]

    def publish() -> None:
        policy.version = 5
        with torch.no_grad():
            for weight in policy.trainable.values():
                weight.mul_(1.05)

    at: list[int] = []
    pieces: list[Piece] = []
    published: asyncio.Task[None] | None = None
    async for piece in engine.stream(request(40)):
        pieces.append(piece)
        if published is None:
            published = asyncio.create_task(compute.run(publish))
        at.append(policy.version)
    (whole,) = [piece.completion for piece in pieces if piece.completion]
    versions = list(whole.policy_versions)
    assert len(versions) == 40 and versions == sorted(versions) and set(versions) == {0, 5}
    changed = versions.index(5)
    logprobs = [x for piece in pieces for x in piece.logprobs]
    assert logprobs[:changed] == pytest.approx(list(old.logprobs[:changed]), abs=1e-5)
    assert logprobs[changed] != pytest.approx(old.logprobs[changed], abs=1e-5)
    assert set((await engine.complete(request(3)))[0].policy_versions) == {5}


async def test_a_stream_is_what_complete_answers(engine: TorchEngine):
    asked = request(6, n=3, seed=4)
    whole = await engine.complete(asked)
    pieces = [piece async for piece in engine.stream(asked)]
    for i, done in enumerate(whole):
        mine = [piece for piece in pieces if piece.index == i]
        assert tuple(token for piece in mine for token in piece.token_ids) == done.token_ids
        assert [piece.completion for piece in mine] == [None] * 5 + [done]


async def test_a_slow_reader_holds_few_pieces_and_stalls_nobody(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MAX_PIECES", 10)
    asked = request(150, n=3, seed=4)
    stream: Any = engine.stream(asked)
    pieces = [await anext(stream)]
    (ticket,) = engine._scheduler._active
    quick = await asyncio.wait_for(engine.complete(request(20)), LIMIT)  # beside it
    await until(lambda: not engine._scheduler._active)  # nobody has read, and it is done
    await asyncio.sleep(0.01)
    assert ticket.box.qsize() < 10 + 3 * 3 and len(quick[0].token_ids) == 20
    pieces += [piece async for piece in stream]
    for i, done in enumerate(await engine.complete(asked)):
        mine = [piece for piece in pieces if piece.index == i]
        assert tuple(token for piece in mine for token in piece.token_ids) == done.token_ids
        logprobs = [x for piece in mine for x in piece.logprobs]
        assert logprobs == pytest.approx(list(done.logprobs), abs=1e-5)
        assert [piece.completion is None for piece in mine] == [True] * (len(mine) - 1) + [False]


async def test_a_stream_that_is_closed_frees_its_places(engine: TorchEngine, steps: Steps):
    stream: Any = engine.stream(request(400, n=2))
    assert (await anext(stream)).index == 0
    await stream.aclose()
    await until(lambda: is_idle(engine))
    assert len(steps.sizes) < 399


async def test_a_step_that_fails_ends_its_requests_alone(
    engine: TorchEngine, steps: Steps, caplog: pytest.LogCaptureFixture
):
    """Those that wait for a place are answered, and so are the next ones."""
    broken = MemoryError("no room")

    def fails() -> None:
        if len(steps.sizes) == 3:
            steps.before = lambda: None
            raise broken

    steps.before = fails
    with caplog.at_level(logging.CRITICAL, "gspo"):
        results = await several(engine, 12)
    assert [type(result) for result in results] == [ServeError] * 8 + [list] * 4
    assert str(results[0]) == "sampling failed: MemoryError: no room"
    assert results[0].__cause__ is broken
    assert [type(result) for result in await several(engine)] == [list] * 4


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), NumericsError("nan")])
@pytest.mark.parametrize("place", ["step", "line"])
async def test_whatever_fails_all_are_answered_and_it_goes_on(
    engine: TorchEngine,
    error: BaseException,
    place: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    def fails(*_: Any) -> Any:
        raise error

    owner = Batch if place == "step" else TorchEngine
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL, "gspo"):
        patch.setattr(owner, place, fails)
        results = await several(engine)
    kind = NumericsError if isinstance(error, NumericsError) else ServeError
    assert [type(result) for result in results] == [kind] * 4
    assert len(await engine.complete(request())) == 1


def test_one_loop_after_another(patient: TorchEngine):
    for _ in range(3):
        assert all(len(done) == 1 for done in asyncio.run(several(patient)))
    assert len(patient._scheduler._desks) <= 2  # closed loops are let go of


@pytest.mark.parametrize("kind", ["engine", "patient"])
def test_several_loops_at_once(kind: str, request: pytest.FixtureRequest):
    engine: TorchEngine = request.getfixturevalue(kind)
    answers: list[Any] = []
    callers = [
        threading.Thread(target=lambda: answers.extend(asyncio.run(several(engine))))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(LIMIT)
    assert len(answers) == 16
    assert all(len(done) == 1 for done in answers)


async def test_a_loop_that_ended_in_midst_of_a_batch_holds_up_no_other(
    engine: TorchEngine, steps: Steps
):
    async def leaves() -> None:
        await asyncio.wait({asyncio.ensure_future(engine.complete(request(400, n=8)))}, timeout=0.1)

    await asyncio.to_thread(asyncio.run, leaves())
    assert len((await asyncio.wait_for(engine.complete(request(3)), LIMIT))[0].token_ids) == 3


async def test_a_task_that_gathers_and_is_cancelled_answers_all(patient: TorchEngine):
    """As by a program that cancels every task it finds."""
    waiting = asyncio.ensure_future(several(patient))
    for _ in range(3):
        await asyncio.sleep(0)
    (desk,) = patient._scheduler._desks.values()
    assert desk._gathering is not None
    desk._gathering.cancel()
    results = await waiting
    assert [type(result) for result in results] == [ServeError] * 4
    assert "a program cancelled the task" in str(results[0])
    assert len(await patient.complete(request())) == 1


async def test_a_stuck_step_gives_an_error_that_names_it(
    engine: TorchEngine, steps: Steps, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "STEP_SECONDS", 0.2)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    gate = threading.Event()
    steps.before = lambda: gate.wait(LIMIT)
    with pytest.raises(ServeError, match=r"is stuck: .* in decode step 1 for \d+ s, since ..:..:"):
        await asyncio.wait_for(engine.complete(request()), LIMIT)
    stream: Any = engine.stream(request())
    with pytest.raises(ServeError, match=r"End this program and start it again"):
        await asyncio.wait_for(anext(stream), LIMIT)
    steps.before = lambda: None
    gate.set()
    await until(lambda: is_idle(engine))
    assert len(await engine.complete(request())) == 1


async def test_a_wait_for_the_device_has_a_limit_too(
    engine: TorchEngine, compute: ComputeThread, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compute_module, "LIMIT", 0.2)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    gate = threading.Event()
    training = asyncio.create_task(compute.run(gate.wait, LIMIT))
    with pytest.raises(ServeError, match=r"has been in Event\.wait for"):
        await asyncio.wait_for(engine.complete(request()), LIMIT)
    gate.set()
    await training


async def test_close_fails_what_waits_and_what_comes(engine: TorchEngine, steps: Steps):
    running = asyncio.create_task(engine.complete(request(400, n=8)))
    await until(lambda: steps.sizes)
    waiting = asyncio.create_task(engine.complete(request()))
    await asyncio.sleep(0)
    engine.close()
    results = await asyncio.wait_for(
        asyncio.gather(running, waiting, return_exceptions=True), LIMIT
    )
    assert [type(result) for result in results] == [ServeError] * 2
    with pytest.raises(ServeError, match="is closed"):
        await engine.complete(request())
    await until(lambda: not engine._scheduler._queued)
    assert len(steps.sizes) < 399


async def test_a_compute_thread_that_ends_leaves_nobody_waiting(
    engine: TorchEngine, compute: ComputeThread
):
    gate, entered = threading.Event(), threading.Event()
    training = asyncio.ensure_future(compute.run(lambda: (entered.set(), gate.wait(LIMIT))))
    await asyncio.to_thread(entered.wait, LIMIT)
    waiting = asyncio.create_task(engine.complete(request()))
    await until(compute.contended)
    compute.close()
    with pytest.raises(ServeError, match="is closed"):
        await asyncio.wait_for(waiting, LIMIT)
    with pytest.raises(RunError, match="is closed"):
        await asyncio.wait_for(engine.complete(request()), LIMIT)
    gate.set()
    await training


def test_completions_are_answered_in_their_order(engine: TorchEngine):
    asked = request(5, n=4, seed=2)
    done: list[Completion] = asyncio.run(engine.complete(asked))
    assert [c.token_ids for c in done] == [c.token_ids for c in engine.generate([asked])[0]]


@pytest.fixture(scope="module")
def exact() -> Policy:
    policy = embedded()
    make_exact(TorchEngine(policy), required=True)
    return policy


KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9, "top_logprobs": 3},
    {"top_k": 5, "min_p": 0.02},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"logit_bias": ((6, -100.0), (7, 3.0)), "top_k": 30},
    {"grammar": '{"type": "array", "items": {"type": "integer"}, "minItems": 2}'},
    {"min_tokens": 6, "ignore_eos": False, "temperature": 0.7},
    {"temperature": 0.0, "frequency_penalty": 0.5},
)
"""One of each request: their numbers, too, are those that it gets alone."""


async def arrive(engine: TorchEngine, rng: random.Random) -> dict[int, list[Completion]]:
    """Eight requests that come when they like, some of which are cancelled and asked again."""

    async def one(number: int) -> list[Completion]:
        while True:
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
            asked = request(
                *(4 + number, 1 + number % 3, number, 3 + 9 * (number % 5)), **KINDS[number]
            )
            task = asyncio.ensure_future(engine.complete(asked))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                continue
            return await task

    numbers = rng.sample(range(8), 8)
    answers = await asyncio.gather(*map(one, numbers))
    return dict(zip(numbers, answers, strict=True))


ORDERS = [range(1, 7), *(range(first, first + 50) for first in range(1, 1001, 50))]
"""The first few; and a thousand, in pieces that are run and counted one by one."""


@pytest.mark.parametrize(
    "orders",
    [
        pytest.param(o, id=f"{o[0]}-{o[-1]}", marks=[pytest.mark.slow] * (o is not ORDERS[0]))
        for o in ORDERS
    ],
)
async def test_a_completion_is_a_function_of_its_request(
    exact: Policy, compute: ComputeThread, orders: range, unhooked: None
):
    """Whatever the order of arrival, the joins, the cancellations and the size of the batch: the
    same tokens, the same bits of their log-probs."""
    engine = TorchEngine(exact, compute)
    assert engine.policy.exact
    expected = await arrive(engine, random.Random(0))
    for seed in orders:
        rng = random.Random(seed)
        await until(lambda: is_idle(engine))
        engine.max_running = rng.choice([1, 2, 3, 5, 8, 64, 512])
        assert await arrive(engine, rng) == expected, f"order {seed}"


@pytest.mark.parametrize(
    ("length", "piece"), [(700, 64), pytest.param(8192, 512, marks=pytest.mark.slow)]
)
async def test_a_long_prompt_stalls_nobody(
    length: int, piece: int, compute: ComputeThread, steps: Steps, monkeypatch: pytest.MonkeyPatch
):
    """While it is read, a step reads so many of its tokens, and those beside it get one token each;
    cancelled, it is gone with the next step; and it is answered as if it were alone."""
    policy = embedded()
    policy.context = length + 100
    engine = TorchEngine(policy, compute)
    make_exact(engine, required=True)
    for room in ("admission", "batch"):
        monkeypatch.setattr(f"gspo.serve.{room}.PROMPT_TOKENS", (piece, piece))
    text = tuple(6 + i * i % 50 for i in range(length))
    long = Request(text, SamplingParams(n=2, max_tokens=4, seed=3, ignore_eos=True))
    fed: list[list[int]] = []  # tokens of each pass, by step
    steps.before = lambda: fed.append([])
    feed = SharedPrompts.feed

    def seen(cache: SharedPrompts, tokens: torch.Tensor) -> torch.Tensor:
        fed[-1].append(tokens.numel())
        return feed(cache, tokens)

    monkeypatch.setattr(SharedPrompts, "feed", seen)

    async def beside(count: int) -> tuple[asyncio.Task[Any], list[asyncio.Task[Any]]]:
        short = [asyncio.create_task(engine.complete(request(90, seed=i))) for i in range(count)]
        await until(lambda: engine._scheduler.traffic == (count, 0))
        first = len(fed)
        task = asyncio.create_task(engine.complete(long))
        await until(lambda: sum(max(step, default=0) >= piece for step in fed[first:]) >= 3)
        return task, short

    task, short = await beside(3)
    answer = await asyncio.wait_for(task, 10 * LIMIT)
    await asyncio.gather(*short)
    reading = [step for step in fed if max(step, default=0) >= piece]
    assert len(reading) == length // piece  # once for both; the last may be shorter
    assert all(sorted(step) == [3, piece] for step in reading[1:])  # a token each
    task, short = await beside(3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    at = len(fed)
    await asyncio.gather(*short)
    assert all(step == [3] or sum(step) < 3 for step in fed[at + 1 :])
    assert answer == engine.generate([long])[0]
