"""Metrics are the same however the work was split."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo.core.metrics import QUANTILES, Metrics, user_metric

# Dyadic, so that sums are exact in any order.
NUMBERS = st.integers(-(2**20), 2**20).map(lambda n: n / 64)
FLOATS = st.floats(-1e6, 1e6)


def recorded(values: list[float]) -> Metrics:
    """Each value into a metric of each kind."""
    metrics = Metrics()
    for value in values:
        metrics.add("sum", value)
        metrics.mean("mean", value, 1)
        metrics.maximum("max", value)
        metrics.distribution("log", [value])
    return metrics


@given(values=st.lists(NUMBERS, min_size=1, max_size=40), data=st.data())
def test_any_order_and_split_gives_identical_results(values: list[float], data: Any) -> None:
    shuffled = data.draw(st.permutations(values))
    assert recorded(shuffled).compute() == recorded(values).compute()
    cut = data.draw(st.integers(0, len(values)))
    parts = Metrics()
    for part in (shuffled[:cut], shuffled[cut:]):
        parts.mean("mean", sum(part), len(part))
        parts.distribution("log", part)
    assert parts.compute().items() <= recorded(values).compute().items()


@given(values=st.lists(FLOATS, min_size=1, max_size=40), data=st.data())
def test_any_float_agrees_to_rounding(values: list[float], data: Any) -> None:
    merged = recorded(data.draw(st.permutations(values)))
    slack = 1e-12 * sum(map(abs, values))
    assert merged.compute() == pytest.approx(recorded(values).compute(), rel=1e-12, abs=slack)


@given(values=st.lists(FLOATS, min_size=1, max_size=60))
def test_a_distribution_equals_numpy(values: list[float]) -> None:
    metrics = Metrics()
    metrics.distribution("x", values)
    expected = {"x_mean": np.mean(values), "x_abs_max": np.abs(values).max()}
    expected |= {f"x_{key}": np.quantile(values, q) for key, q in QUANTILES.items()}
    assert metrics.compute() == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_each_kind_by_hand() -> None:
    metrics = Metrics()
    metrics.add("tokens", 3)
    metrics.add("tokens", 4)
    metrics.mean("reward", total=3.0, count=2)
    metrics.mean("reward", total=1.0, count=2)
    metrics.maximum("longest", -5.0)
    metrics.maximum("longest", -7.0)
    metrics.distribution("r", [0.0, 10.0])
    metrics.distribution("r", [-20.0])
    assert metrics.compute() == {
        "longest": -5.0,
        "r_abs_max": 20.0,
        "r_mean": pytest.approx(-10 / 3),
        "r_p01": pytest.approx(-19.6),
        "r_p50": 0.0,
        "r_p99": pytest.approx(9.8),
        "reward": 1.0,
        "tokens": 7,
    }


def test_a_zero_has_no_sign() -> None:
    metrics = recorded([-0.0, 0.0, -0.0])
    metrics.add("minus", -0.0)
    found = metrics.compute()
    assert {name: str(value) for name, value in found.items()} == dict.fromkeys(found, "0.0")


def test_names_are_sorted() -> None:
    names = list(recorded([1.0]).compute())
    assert names == sorted(names)


def test_nothing_is_reported_over_nothing() -> None:
    metrics = Metrics()
    assert metrics.compute() == {}
    metrics.mean("mean", total=0.0, count=0)
    metrics.distribution("log", [])
    assert metrics.compute() == {}


def test_a_total_may_come_apart_from_its_count() -> None:
    """As `loss/policy` does: one count per step, a part of the total per microbatch."""
    metrics = Metrics()
    metrics.mean("loss", 0.0, 1)
    metrics.mean("loss", 0.25, 0)
    metrics.mean("loss", 0.5, 0)
    assert metrics.compute() == {"loss": 0.75}


def test_what_was_recorded_is_a_copy() -> None:
    metrics, values = Metrics(), [1.0, 2.0]
    metrics.distribution("x", values)
    values.append(30.0)
    metrics.distribution("y", (value for value in values))
    for _ in range(2):
        assert metrics.compute()["x_abs_max"] == 2.0
        assert metrics.compute()["y_abs_max"] == 30.0


def test_distributions_of_awkward_size_are_exact_in_any_order() -> None:
    values = [1e16, 1.0, -1e16, 1.0]
    metrics = Metrics()
    metrics.distribution("x", values)
    backwards = Metrics()
    backwards.distribution("x", reversed(values))
    assert metrics.compute() == backwards.compute()
    assert metrics.compute()["x_mean"] == math.fsum(values) / 4 == 0.5


@pytest.mark.parametrize(
    "name", ["reward", "reward_std", "reward_low", "reward_high", "prompts", "trajectories"]
)
def test_a_users_metric_replaces_none_of_a_split(name: str) -> None:
    assert user_metric(name, "val") == f"val/user/{name}"
    assert user_metric(f"val/{name}", "train") == f"val/user/{name}"
