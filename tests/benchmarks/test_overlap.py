"""The simulation of rollouts beside training, in virtual time: what is gained, and on what is
trained."""

from __future__ import annotations

import doctest
import os
from statistics import mean

import overlap
import pytest
import virtual_time
from overlap import GOAL, Sizes, discarding, same_distribution, simulate
from virtual_time import in_virtual_time


def test_doctests() -> None:
    for module in (overlap, virtual_time):
        assert doctest.testmod(module).failed == 0


def test_rollouts_beside_training_are_faster_and_nothing_is_too_old_or_thrown_away() -> None:
    serial = in_virtual_time(simulate(Sizes(steps=6, ahead=0)))
    assert set(serial.ages) == {0} and min(serial.sampled) == 1 and max(serial.sampled) >= 28
    for ahead in (1, 2):
        found = in_virtual_time(simulate(Sizes(steps=6, ahead=ahead)))
        assert serial.seconds / found.seconds >= GOAL
        assert max(found.ages) == ahead
        assert same_distribution(found) > 0.05
        assert sorted(found.trained) == sorted(found.sampled) == sorted(serial.trained)


def test_discarding_what_is_too_old_trains_on_shorter_episodes() -> None:
    found = in_virtual_time(simulate(Sizes(steps=10), discarding))
    assert max(found.ages) == 1  # the same bound, bought otherwise
    assert same_distribution(found) < 1e-3
    assert mean(found.trained) < 0.8 * mean(found.sampled)


def test_each_part_is_a_case() -> None:
    assert tuple(overlap.CASES) == overlap.PARTS
    row = overlap.measure_part("half", tiny=True)
    assert row["detail"]["admitted"]["p"] == 1.0 and row["unit"] == "simulated s"


@pytest.mark.slow  # it loads a model twice
@pytest.mark.parametrize("part", ["tool", "vllm", "vllm_tool"])
def test_a_real_model_runs(part: str) -> None:
    if "vllm" in part and not os.environ.get("GSPO_VLLM_PYTHON"):
        pytest.skip("GSPO_VLLM_PYTHON names no environment with vLLM")
    row = overlap.measure_part(part, 1, tiny=True)
    assert row["ratio"] > 0 and row["unit"] == "s"
