from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import in_virtual_time

import gspo as art
from gspo.core import progress
from gspo.core.errors import ConfigError, DataError, RolloutTimeoutError
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.server import Serving
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from support import choice, trajectory


async def fine(reward: float = 1.0) -> art.Trajectory:
    return trajectory(reward)


async def broken() -> art.Trajectory:
    raise RuntimeError("broken")


async def test_groups_come_back_in_order():
    groups = await art.gather_trajectory_groups(
        art.TrajectoryGroup(fine(float(g)) for _ in range(2)) for g in range(3)
    )
    assert [[t.reward for t in group] for group in groups] == [[0, 0], [1, 1], [2, 2]]


async def test_failures_within_the_budget_are_kept_apart():
    groups = await art.gather_trajectory_groups(
        [art.TrajectoryGroup([fine(), broken(), fine()])], max_exceptions=1
    )
    assert len(groups[0]) == 2
    assert groups[0].exceptions[0].message == "broken"


async def test_a_share_of_failures_may_be_allowed():
    group = art.TrajectoryGroup([fine(), broken(), fine(), fine()])
    assert len((await art.gather_trajectory_groups([group], max_exceptions=0.25))[0]) == 3
    group = art.TrajectoryGroup([fine(), broken(), broken(), fine()])
    with pytest.raises(RuntimeError, match="broken"):
        await art.gather_trajectory_groups([group], max_exceptions=0.25)


async def test_one_failure_too_many_cancels_the_rest():
    cancelled = asyncio.Event()

    async def slow() -> art.Trajectory:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return trajectory()

    with pytest.raises(RuntimeError, match="broken"):
        await art.gather_trajectory_groups(
            [art.TrajectoryGroup([slow()]), art.TrajectoryGroup([broken()])]
        )
    assert cancelled.is_set()


async def test_after_each_replaces_drops_and_splits():
    async def after(group: art.TrajectoryGroup):
        reward = group.trajectories[0].reward
        return None if reward == 0 else [group, group] if reward == 1 else group

    groups = await art.gather_trajectory_groups(
        (art.TrajectoryGroup([fine(float(r))]) for r in range(3)), after_each=after
    )
    assert [g.trajectories[0].reward for g in groups] == [1, 1, 2]


async def test_nothing_to_gather_is_an_error():
    with pytest.raises(DataError, match="at least one"):
        await art.gather_trajectory_groups([])


@pytest.mark.parametrize("gather", [art.gather_trajectories, art.gather_trajectory_groups])
async def test_what_cannot_be_awaited_is_refused(gather: Any):
    with pytest.raises(DataError, match=r"got <function .*give coroutines"):
        await gather([fine(), fine])


async def test_gather_trajectories_keeps_places():
    results = await art.gather_trajectories([fine(), broken(), fine(2.0)], max_exceptions=1)
    assert isinstance(results[1], RuntimeError)
    assert [r.reward for r in results if isinstance(r, art.Trajectory)] == [1.0, 2.0]


async def test_retry_tries_again_and_reports():
    seen: list[int] = []

    @art.retry(max_attempts=3, delay=0, on_retry=lambda error, attempt: seen.append(attempt))
    async def flaky() -> str:
        if len(seen) < 2:
            raise ValueError("not yet")
        return "done"

    assert await flaky() == "done"
    assert seen == [1, 2]


async def test_retry_gives_up_and_lets_other_errors_through():
    @art.retry(max_attempts=2, delay=0, exceptions=ValueError)
    async def other() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await other()
    with pytest.raises(DataError, match="at least 1"):
        art.retry(max_attempts=0)
    with pytest.raises(DataError, match=r"decorate with @art.retry\(\)"):
        art.retry(cancels_itself)  # pyright: ignore[reportArgumentType]


async def cancels_itself() -> art.Trajectory:
    raise asyncio.CancelledError


async def test_a_rollouts_own_cancelled_error_counts_as_a_failure():
    async def waits_for_a_cancelled_task() -> art.Trajectory:
        task = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task
        return trajectory()

    group = art.TrajectoryGroup([fine(), cancels_itself(), waits_for_a_cancelled_task()])
    (done,) = await art.gather_trajectory_groups([group], max_exceptions=2)
    assert [len(done), len(done.exceptions)] == [1, 2]
    assert "nobody has cancelled it" in done.exceptions[0].message
    with pytest.raises(DataError, match="nobody has cancelled it"):
        await art.gather_trajectory_groups([art.TrajectoryGroup([fine(), cancels_itself()])])


async def test_a_gather_that_is_cancelled_ends_whatever_its_budget():
    started = asyncio.Event()

    async def slow() -> art.Trajectory:
        started.set()
        await asyncio.sleep(60)
        return trajectory()

    work = art.gather_trajectory_groups([art.TrajectoryGroup([slow(), slow()])], max_exceptions=9)
    task = asyncio.ensure_future(work)
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("budget", [float("nan"), True, "x", None, -1, -0.5])
async def test_a_budget_that_means_nothing(budget: Any):
    calls: tuple[Any, ...] = (art.gather_trajectory_groups, art.gather_trajectories)
    for call in calls:
        with pytest.raises(ConfigError, match=r"max_exceptions = .*how many rollouts may fail"):
            await call([art.TrajectoryGroup([trajectory()])], max_exceptions=budget)


async def test_arguments_that_are_not_there_are_named():
    groups = [art.TrajectoryGroup([trajectory()])]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_metrics": -1}, "max_metrics = -1"),
        ({"timeout": 0}, "^timeout = 0"),
        ({"timeout": float("nan")}, "^timeout = nan"),
        ({"rollout_timeout": True}, "^rollout_timeout = True"),
        ({"rollout_timeout": "60"}, "^rollout_timeout = '60'"),
        ({"max_exception": 3}, "Did you mean 'max_exceptions'"),
    )
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            await art.gather_trajectory_groups(groups, **options)
    with pytest.raises(ConfigError, match="unknown argument 'after_each'"):
        await art.gather_trajectories([], after_each=None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrong", [{"max_exception": 1}, {"max_metrics": -1}, {"timeout": 0}])
async def test_a_refused_gather_closes_its_rollouts(wrong: dict[str, Any]):
    async def rollout() -> art.Trajectory:
        return trajectory()

    calls: tuple[Any, ...] = (art.gather_trajectory_groups, art.gather_trajectories)
    for call in calls:
        given = rollout()
        group: Any = art.TrajectoryGroup([given]) if call is calls[0] else given
        with pytest.raises(ConfigError):
            await call([group], **wrong)
        with pytest.raises(RuntimeError, match="cannot reuse"):
            await given
    given = rollout()
    with pytest.raises(ConfigError, match="batch_size"):
        async for _ in art.trajectory_group_batches([art.TrajectoryGroup([given])], batch_size=0):
            pass
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await given


@pytest.mark.parametrize("reward", [None, "1.5", 1j])
async def test_a_reward_that_is_no_number_is_named_at_once(reward: Any):
    async def rollout() -> art.Trajectory:
        own = trajectory()
        own.reward = reward
        return own

    with pytest.raises(DataError, match=r"a Trajectory whose reward is .*must be a number"):
        await art.gather_trajectory_groups([art.TrajectoryGroup([rollout()])], max_exceptions=9)


async def test_metrics_of_any_kind_do_not_stop_a_gather():
    """They are refused by `train`, with their place; numpy's scalars are numbers."""

    async def rollout() -> art.Trajectory:
        own = trajectory()
        own.reward = np.float32(0.5)  # pyright: ignore[reportAttributeAccessIssue]
        own.metrics["acc"] = None  # pyright: ignore[reportArgumentType]
        return own

    (group,) = await art.gather_trajectory_groups([art.TrajectoryGroup([rollout()])])
    assert group.trajectories[0].reward == 0.5


async def hangs() -> art.Trajectory:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_rollout_that_never_ends_is_named_and_left_out(caplog: pytest.LogCaptureFixture):
    groups = await art.gather_trajectory_groups(
        [art.TrajectoryGroup([fine(), fine()]), art.TrajectoryGroup([fine(0.0), fine(), hangs()])],
        rollout_timeout=0.05,
    )
    assert [len(group) for group in groups] == [2, 2]
    (given_up,) = groups[1].exceptions
    assert given_up.type == "RolloutTimeoutError"
    assert given_up.message.startswith("group 1, rollout 2 (hangs) was given up after 0.")
    assert "(rollout_timeout=0.05)" in given_up.message
    assert "group 1, rollout 2 (hangs)" in caplog.text
    backend = art.FakeBackend()
    model = art.TrainableModel(name="m", project="p", base_model="any")
    await model.register(backend)
    assert (await model.train(groups)).metrics["train/reward"] == 0.75  # the rest trains


async def test_a_gather_gives_up_all_that_run_when_its_time_is_over():
    began = time.monotonic()
    results = await art.gather_trajectories([fine(), hangs(), hangs()], timeout=0.1)
    assert [isinstance(result, RolloutTimeoutError) for result in results] == [False, True, True]
    assert "rollout 1 (hangs)" in str(results[1])
    assert "(timeout=0.1)" in str(results[1])
    assert time.monotonic() - began < 5
    with pytest.raises(RolloutTimeoutError, match=r"group 0, rollout \d \(hangs\)"):
        await art.gather_trajectory_groups([art.TrajectoryGroup([hangs(), hangs()])], timeout=0.05)


async def test_the_time_of_a_gather_is_one_for_all_its_rollouts():
    """A rollout that starts late, behind others of its own coroutine, has what is left."""

    async def in_turns() -> art.TrajectoryGroup:
        first = await art.TrajectoryGroup([fine()])
        await asyncio.sleep(0.15)
        return art.TrajectoryGroup([*first, *(await art.TrajectoryGroup([hangs()])).trajectories])

    began = time.monotonic()
    (group,) = await art.gather_trajectory_groups([in_turns()], timeout=0.2)
    assert len(group) == 1
    assert time.monotonic() - began < 5


async def test_what_hangs_around_rollouts_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gspo.gather._MARGIN", 0.01)

    async def judge(group: art.TrajectoryGroup) -> art.TrajectoryGroup:
        await asyncio.Event().wait()
        return group

    async def group() -> art.TrajectoryGroup:
        await asyncio.Event().wait()
        return art.TrajectoryGroup()

    with pytest.raises(RolloutTimeoutError, match=r"after_each .*judge.* has not ended after 0.05"):
        await art.gather_trajectory_groups(
            [art.TrajectoryGroup([fine()])], after_each=judge, timeout=0.05
        )
    with pytest.raises(RolloutTimeoutError, match=r"a group .*group.* has not ended after 0.06"):
        await art.gather_trajectory_groups([group()], timeout=0.05)


async def test_a_rollout_that_ignores_cancellation_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(progress, "LET_GO_SECONDS", 0.05)
    over = asyncio.Event()

    async def stubborn() -> art.Trajectory:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue
        return trajectory()

    results = await art.gather_trajectories([fine(), stubborn()], rollout_timeout=0.05)
    assert isinstance(results[1], RolloutTimeoutError)
    assert "something in it catches CancelledError" in caplog.text
    with pytest.raises(RuntimeError, match="broken"):
        await art.gather_trajectories([broken(), stubborn()])
    over.set()


async def test_a_rollout_that_cancels_its_own_task_cancels_nothing_else():
    async def cancels_its_task() -> art.Trajectory:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return trajectory()

    results = await art.gather_trajectories([fine(), cancels_its_task()], max_exceptions=1)
    assert isinstance(results[1], DataError)


class SlowEngine(FakeEngine):
    """Answers after `seconds`; counts the requests that it still works on."""

    seconds = 60.0
    inside = most = 0

    async def complete(self, request: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(self.seconds)
            return await super().complete(request)
        finally:
            self.inside -= 1


async def test_nothing_that_was_given_up_stays_in_the_engine():
    engine = SlowEngine()
    backend = FakeBackendOn(engine)
    model = art.TrainableModel(name="m", project="p", base_model="any")
    await model.register(backend)

    async def asks() -> None:
        client = model.openai_client().chat.completions
        message: Any = {"role": "user", "content": "?"}
        await client.create(model=model.inference_name, messages=[message])

    async def rollout() -> art.Trajectory:
        await asyncio.gather(asks(), asks())
        return trajectory()

    @art.retry(max_attempts=2, delay=0, exceptions=TimeoutError)
    async def tries_again() -> art.Trajectory:
        await asyncio.wait_for(asks(), 0.1)
        return trajectory()

    results = await art.gather_trajectories(
        [fine(), rollout(), rollout(), tries_again()], rollout_timeout=0.5, max_exceptions=1
    )
    assert [isinstance(result, art.Trajectory) for result in results] == [True, False, False, False]
    assert engine.most == 5
    assert engine.inside == 0
    await backend.close()


class FakeBackendOn(art.FakeBackend):
    """A fake backend with another engine."""

    def __init__(self, engine: FakeEngine):
        super().__init__()
        self.engine = engine
        self._serving = Serving(engine, lambda: self._names)


async def test_a_rollout_may_return_several_trajectories():
    async def two() -> list[art.Trajectory]:
        return [trajectory(1.0), trajectory(2.0)]

    results = await art.gather_trajectories([two(), fine(3.0)])
    assert [t.reward for t in results if isinstance(t, art.Trajectory)] == [1.0, 2.0, 3.0]
    (group,) = await art.gather_trajectory_groups([art.TrajectoryGroup([two(), fine(3.0)])])
    assert [t.reward for t in group] == [1.0, 2.0, 3.0]

    async def wrong() -> Any:
        return [trajectory(), None]

    with pytest.raises(DataError, match=r"returned None .*or a list of them"):
        await art.gather_trajectories([wrong()])


async def test_the_bar_counts_metrics_and_tokens():
    async def rollout(reward: float) -> art.Trajectory:
        own = trajectory(reward)
        own.metrics |= {"right": reward > 0, "turns": 3}
        return own

    gather = progress.Gather(total=2)
    with progress.gathering(gather):
        await art.TrajectoryGroup([rollout(0.0), rollout(1.0)])
    assert gather.metrics == {"right": (1.0, 2), "turns": (6.0, 2)}
    assert gather.completion_tokens == 4
    await art.gather_trajectories(
        [rollout(1.0)], max_metrics=1, pbar_total_completion_tokens=True, pbar_desc=None
    )


async def test_batches_come_in_the_order_given_while_later_ones_run():
    began: list[int] = []

    async def rollout(number: int) -> art.Trajectory:
        began.append(number)
        await asyncio.sleep(0.02 if number % 2 else 0)
        return trajectory(float(number))

    def groups() -> list[art.TrajectoryGroup]:
        return [art.TrajectoryGroup([rollout(g)]) for g in range(7)]

    seen = []
    async for batch in art.trajectory_group_batches(
        groups(), batch_size=2, max_concurrent_batches=2, skip_batches=1
    ):
        seen.append([group.trajectories[0].reward for group in batch])
        if len(seen) == 1:
            assert sorted(began) == [2, 3, 4, 5]  # one batch runs ahead, and no more
    assert seen == [[2.0, 3.0], [4.0, 5.0], [6.0]]
    batches = art.trajectory_group_batches(groups(), batch_size=2)
    async for _ in batches:
        break
    await batches.aclose()  # type: ignore[attr-defined]
    for options in ({"batch_size": 0}, {"batch_size": 1, "skip_batches": -1}, {"batch_size": True}):
        with pytest.raises(ConfigError, match="must be a whole number"):
            async for _ in art.trajectory_group_batches([], **options):  # type: ignore[arg-type]
                pass


def stale_and_trained(
    lengths: list[int], train: int, size: int, most: int, bound: int
) -> tuple[int, list[int]]:
    """How many trajectories are older than `bound` when they are trained on, and all that are.

    Rollout i samples a token a second, `lengths[i]` of them; `train` takes its seconds.
    """
    version, trained, stale = 0, [], 0

    async def rollout(number: int) -> art.Trajectory:
        versions = []
        for _ in range(lengths[number]):
            versions.append(version)
            await asyncio.sleep(1)
        return trajectory(float(number), choice([4] * len(versions), policy_versions=versions))

    async def loop() -> None:
        nonlocal version, stale
        # Each twice, since a group of one trains on nothing.
        groups = [art.TrajectoryGroup([rollout(n), rollout(n)]) for n in range(len(lengths))]
        async for batch in art.trajectory_group_batches(
            groups, batch_size=size, max_concurrent_batches=most, pbar_desc=None
        ):
            settings = resolve(None, art.dev.TrainConfig(max_staleness=bound))
            stale += prepare(batch, settings, context=99, vocabulary=9, version=version).stale
            trained.extend(int(t.reward) for group in batch for t in group)
            await asyncio.sleep(train)
            version += 1

    in_virtual_time(loop())
    return stale, trained


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    train=st.integers(0, 20),
    size=st.integers(1, 3),
    most=st.integers(1, 4),
)
def test_nothing_is_older_than_the_batches_that_run_ahead_and_all_is_trained_on(
    lengths: list[int], train: int, size: int, most: int
):
    stale, trained = stale_and_trained(lengths, train, size, most, most - 1)
    assert stale == 0
    assert trained == [number for number in range(len(lengths)) for _ in range(2)]


def test_the_bound_is_reached():
    assert stale_and_trained([30, 2, 2, 2], 5, 1, 3, 1)[0] > 0


async def test_a_batch_that_fails_cancels_those_that_run_ahead():
    cancelled = asyncio.Event()

    async def slow() -> art.Trajectory:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return trajectory()

    groups = [art.TrajectoryGroup([broken()]), art.TrajectoryGroup([slow()])]
    with pytest.raises(RuntimeError, match="broken"):
        async for _ in art.trajectory_group_batches(groups, batch_size=1):
            pass
    assert cancelled.is_set()


async def test_what_a_rollout_has_sampled_is_used_again_word_for_word():
    call = '<tool_call>{"name":"add",   "arguments":{"n":1}}</tool_call>'
    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    async def rollout(model: art.TrainableModel) -> art.Trajectory:
        client, told = model.openai_client(), art.Trajectory(tools=tools)
        told.messages_and_choices.append({"role": "user", "content": "1"})
        for _ in range(2):
            response = await client.chat.completions.create(
                model=model.inference_name, messages=told.messages(), tools=tools
            )
            told.messages_and_choices.append(response.choices[0])
            asked: Any = response.choices[0].message.tool_calls
            result = {"role": "tool", "tool_call_id": asked[0].id, "content": "2"}
            told.messages_and_choices.append(result)
        return told

    def extends(t: art.Trajectory) -> bool:
        first, second = ((c.prompt_token_ids, c.token_ids) for c in t.choices())  # pyright: ignore[reportAttributeAccessIssue]
        before = [*first[0], *first[1]]
        return second[0][: len(before)] == before

    async with art.FakeBackend(lambda prompt, index: call) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="x")
        await model.register(backend)
        assert not extends(await rollout(model))  # the template writes the call in its own way
        for t in await art.gather_trajectories([rollout(model), rollout(model)]):
            assert isinstance(t, art.Trajectory) and extends(t)
        (group,) = await art.gather_trajectory_groups([art.TrajectoryGroup([rollout(model)])])
        assert extends(group.trajectories[0])
