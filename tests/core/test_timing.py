"""Spans nest, add up, and are nothing without a clock."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from gspo.core.compute import ComputeThread
from gspo.core.timing import Clock, beside, span, timing


def ticking() -> Clock:
    """Each look at the time is one second after the last."""
    at = itertools.count()
    return Clock(now=lambda: float(next(at)))


@span("inner")
def inner(value: int, *, twice: bool = False) -> int:
    """Documented."""
    return value * (2 if twice else 1)


def test_time_goes_to_the_innermost_span_and_adds_up():
    clock = ticking()
    with timing(clock), span("step"):  # 0
        with span("a"):  # 1
            with span("b"):  # 2..3
                pass
            with span("b"):  # 4..5
                pass
        inner(1)  # 7..8
    assert dict(clock.seconds) == {"step": 3.0, "a": 3.0, "b": 2.0, "inner": 1.0}
    assert sum(clock.seconds.values()) == 9.0
    assert dict(clock.calls) == {"step": 1, "a": 1, "b": 2, "inner": 1}


def test_a_span_in_itself_is_not_counted_twice():
    clock = ticking()
    with clock.span("step"), clock.span("a"), clock.span("a"):
        pass
    assert dict(clock.seconds) == {"step": 2.0, "a": 3.0}


def test_outside_of_the_root_nothing_is_counted():
    clock = ticking()
    with timing(clock), span("a"):
        pass
    assert not clock.seconds and not clock.calls


def test_an_error_closes_its_spans():
    clock = ticking()
    with pytest.raises(ZeroDivisionError), timing(clock), span("step"), span("a"):
        raise ZeroDivisionError
    assert dict(clock.seconds) == {"step": 2.0, "a": 1.0}
    with span("step"):
        pass
    assert clock.calls["step"] == 1


def test_without_a_clock_a_timed_function_is_itself():
    assert inner(3, twice=True) == 6
    assert (inner.__name__, inner.__doc__) == ("inner", "Documented.")
    with span("anything"):
        pass


def test_the_device_is_waited_for_at_each_edge():
    waits = []
    clock = Clock(sync=lambda: waits.append(1))
    with clock.span("step"), clock.span("a"):
        pass
    with clock.span("a"):
        pass
    assert len(waits) == 4


def test_threads_beside_one_another_share_each_moment():
    """They wait for one another, so that the clock ticks in the order of the comments."""
    clock = ticking()
    a_open, b_closed, one_ended = (threading.Event() for _ in range(3))

    def first() -> None:  # 1
        with span("a"):  # 2..6
            a_open.set()
            assert b_closed.wait(10)

    def second() -> None:  # 3
        with span("b"):  # 4..5
            pass
        b_closed.set()
        assert one_ended.wait(10)

    with timing(clock), span("step"):  # 0..9
        one, two = (threading.Thread(target=beside(work)) for work in (first, second))
        one.start()
        assert a_open.wait(10)
        two.start()
        one.join()  # 7
        one_ended.set()
        two.join()  # 8
    assert dict(clock.seconds) == {"step": 6.0, "a": 2.5, "b": 0.5}


async def test_the_compute_thread_has_the_callers_clock():
    clock, compute = ticking(), ComputeThread()
    names = []

    def work() -> None:
        names.append(threading.current_thread().name)
        inner(1)

    with timing(clock), span("step"):
        await compute.run(work)
    await compute.run(work)
    compute.close()
    await asyncio.sleep(0)
    assert clock.calls["inner"] == 1
    assert all(name.startswith("gspo-compute") for name in names)
