"""The compute thread: one piece of work at a time, from whatever event loop it comes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from gspo.core import compute as module
from gspo.core.compute import ComputeThread, Threads, free_cores
from gspo.core.errors import RunError, ServeError


@pytest.fixture
def compute():
    compute = ComputeThread()
    yield compute
    compute.close()


def test_work_of_several_loops_never_overlaps(compute: ComputeThread):
    running, most, threads = 0, 0, set()

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threads.add(threading.get_ident())
        time.sleep(0.002)
        running -= 1

    async def several() -> None:
        await asyncio.gather(*(compute.run(work) for _ in range(5)))

    callers = [threading.Thread(target=lambda: asyncio.run(several())) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=30)
    asyncio.run(several())
    assert (most, len(threads)) == (1, 1)


def test_a_loop_that_was_left_holds_up_no_other(compute: ComputeThread):
    """Its coroutine never goes on, but the next loop's work does."""
    left = asyncio.new_event_loop()
    started = threading.Event()
    task = left.create_task(compute.run(started.wait, 5.0))
    left.run_until_complete(asyncio.sleep(0.01))
    started.set()
    assert asyncio.run(asyncio.wait_for(compute.run(lambda: 7), timeout=10)) == 7
    assert not task.done()
    left.run_until_complete(task)
    left.close()


async def test_an_exception_that_no_future_can_carry_arrives(compute: ComputeThread):
    def ends() -> None:
        raise StopIteration

    with pytest.raises(RuntimeError, match="ends raised StopIteration"):
        await asyncio.wait_for(compute.run(ends), timeout=10)


async def test_a_job_knows_whether_others_wait(compute: ComputeThread):
    """So it can be cut, and queue the rest of its work behind them."""
    seen: list[str] = []
    begun, waits, over = threading.Event(), threading.Event(), threading.Event()

    def rest() -> None:
        seen.append(f"rest {compute.contended()}")
        over.set()

    def first() -> None:
        seen.append(f"first {compute.contended()}")
        begun.set()
        waits.wait(10)
        seen.append(f"first {compute.contended()}")
        compute.submit(rest)

    compute.submit(first)
    await asyncio.to_thread(begun.wait, 10)
    other = asyncio.create_task(compute.run(seen.append, "other"))
    await asyncio.sleep(0)
    waits.set()
    await other
    await asyncio.to_thread(over.wait, 10)
    assert seen == ["first False", "first True", "other", "rest False"]


async def test_after_close_it_says_so(compute: ComputeThread):
    compute.close()
    with pytest.raises(RunError, match="the backend is closed"):
        await compute.run(int)


async def test_what_waits_at_the_close_is_told_so(compute: ComputeThread):
    started, done = threading.Event(), threading.Event()

    def slow() -> int:
        started.set()
        done.wait(10)
        return 7

    running = asyncio.ensure_future(compute.run(slow))
    waiting = asyncio.ensure_future(compute.run(int))
    await asyncio.to_thread(started.wait, 10)
    compute.close()
    with pytest.raises(RunError, match="closed while int waited for it"):
        await asyncio.wait_for(waiting, 10)
    done.set()
    assert await running == 7


async def test_in_a_fork_it_says_so(compute: ComputeThread, monkeypatch: pytest.MonkeyPatch):
    await compute.run(int)
    monkeypatch.setattr(compute, "_process", 1)
    with pytest.raises(RunError, match="loaded in process 1, and a fork has no threads"):
        await compute.run(int)


async def test_a_long_wait_names_what_it_waits_for(
    compute: ComputeThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(module, "NOTICE_SECONDS", 0.01)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    done = threading.Event()

    def slow() -> None:
        done.wait(10)

    waits = asyncio.gather(compute.run(slow), compute.run(int))
    with caplog.at_level(logging.WARNING, "gspo"):
        while len(caplog.records) < 2:
            await asyncio.sleep(0.005)
    done.set()
    await waits
    assert "int has waited" in caplog.text
    assert all("slow" in record.message.split("running:")[1] for record in caplog.records)


async def test_a_stuck_job_is_named_to_all_who_wait(
    compute: ComputeThread, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LIMIT", 0.05)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    done, ran = threading.Event(), []

    def stuck() -> None:
        done.wait(30)

    waits = [compute.run(stuck), compute.run(ran.append, 1), compute.run(ran.append, 2)]
    errors = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 20)
    assert [type(error) for error in errors] == [ServeError] * 3
    assert all("stuck: it has been in" in str(e) and "stuck for 0 s" in str(e) for e in errors)
    done.set()  # it was slow only, so work goes on; whoever had given up is not served
    assert compute.submit(lambda: 7).result(30) == 7
    assert ran == []


async def test_a_job_says_what_it_does_and_how_long_that_may_take(compute: ComputeThread):
    said, done = threading.Event(), threading.Event()

    def steps() -> None:
        compute.doing("step 3", 0.0)
        said.set()
        done.wait(30)
        compute.doing("step 4", 60.0)

    job = compute.submit(steps)
    await asyncio.to_thread(said.wait, 10)
    with pytest.raises(ServeError, match=r"it has been in step 3 for 0 s, since ..:..:.., and 0 s"):
        compute.check()
    done.set()
    job.result(10)
    compute.check()


def test_the_thread_of_one_that_nobody_holds_ends():
    compute = ComputeThread()
    (thread,) = compute._threads.each
    compute.submit(int).result(10)
    del compute
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


AT_THE_END = """
import sys, threading, time
from gspo.core import compute as module

module.EXIT_SECONDS = float(sys.argv[1])
compute, begun, go_on = module.ComputeThread(), threading.Event(), threading.Event()

def job():
    begun.set()
    go_on.wait()
    print("done")

compute.submit(job)
compute.submit(print, "never")
begun.wait()
if sys.argv[2] == "slow":
    def release():
        while not compute._closed:  # until the program's end
            time.sleep(0.01)
        go_on.set()

    threading.Thread(target=release, daemon=True).start()
elif sys.argv[2] == "stuck and failed":
    raise ValueError("the program's own")
"""


@pytest.mark.parametrize(
    ("kind", "seconds"), [("stuck", "0.1"), ("stuck and failed", "0.1"), ("slow", "60")]
)
def test_a_program_ends_even_if_a_job_never_does(kind: str, seconds: str):
    """With its own error, and not before a job that ends in time. What is left undone is no
    success, which a launcher of several processes looks at."""
    command = [sys.executable, "-c", AT_THE_END, seconds, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if kind == "slow":
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert ("ValueError: the program's own" in done.stderr) == (kind == "stuck and failed")
        assert "job still runs 0 s after the program: it is left undone" in done.stderr


def test_work_waits_in_a_queue_for_the_first_thread_that_is_free():
    threads, names = Threads(2, "some"), set()
    both = threading.Barrier(2)

    def work() -> None:
        both.wait(10)
        names.add(threading.get_ident())

    for job in [threads.submit(work) for _ in range(4)]:
        job.result(10)
    assert len(names) == 2
    threads.close()
    for thread in threads.each:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads.each)


def test_cores_are_counted_where_the_system_cannot_say_which_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert free_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert free_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert free_cores() == 1
