"""Threads that compute a microbatch each."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from gspo.policy.workers import Workers


def test_results_are_in_the_order_of_the_items():
    def later_first(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    assert Workers(2).map(later_first, [0.05, 0.0, 0.02]) == [0.05, 0.0, 0.02]


def test_each_item_has_a_thread_with_one_openmp_thread():
    both = threading.Barrier(2, timeout=30)

    def name_of_thread(_item: int) -> tuple[str, int]:
        both.wait()  # it passes if two threads are here
        return threading.current_thread().name, torch.get_num_threads()

    names, threads = zip(*Workers(2).map(name_of_thread, [0, 1]), strict=True)
    assert len(set(names)) == 2
    assert all(name.startswith("gspo-microbatch") for name in names)
    assert threads == (1, 1)


@pytest.mark.parametrize("count, items", [(1, [0, 1]), (4, [0])])
def test_one_worker_or_one_item_stays_in_the_callers_thread(count: int, items: list[int]):
    caller = threading.current_thread()
    assert Workers(count).map(lambda _: threading.current_thread(), items) == [caller] * len(items)


def test_one_process_is_everywhere():
    assert Workers().everywhere(divmod, 7, 2) == (3, 1)


def test_the_first_error_is_raised_once_all_have_ended():
    ended = []

    def work(item: int) -> None:
        if item < 2:
            raise ValueError(item)
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ValueError, match="0"):
        Workers(3).map(work, [0, 1, 2])
    assert ended == [2]
