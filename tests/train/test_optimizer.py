from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.core.errors import CheckpointError, NumericsError
from gspo.dev import TrainConfig
from gspo.train.optimizer import Optimizer, learning_rate


def parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(3)) for name in ("a", "b.c", "b")}


def drive(optimizer: Optimizer, own: dict[str, torch.nn.Parameter], options, steps: int) -> None:
    for step in range(steps):
        for i, parameter in enumerate(own.values()):
            parameter.grad = torch.full((3,), 0.1 * (step + i))
        optimizer.step(1e-2, options)


def test_step_equals_torchs_adamw():
    options = TrainConfig(weight_decay=0.1, adam_betas=(0.8, 0.9), max_grad_norm=None)
    own, other = parameters(), parameters()
    drive(Optimizer(own, {}), own, options, 3)
    adam = torch.optim.AdamW(other.values(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(3):
        for i, parameter in enumerate(other.values()):
            parameter.grad = torch.full((3,), 0.1 * (step + i))
        adam.step()
    for name in own:
        assert torch.equal(own[name], other[name])


def test_the_gradient_is_clipped_to_the_norm():
    own = {"a": torch.nn.Parameter(torch.zeros(4))}
    own["a"].grad = torch.full((4,), 3.0)
    assert Optimizer(own, {}).step(0.1, TrainConfig(max_grad_norm=1.0)) == pytest.approx(6.0)


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 1 / 6), (12.0, 1.0), (None, 1.0)])
def test_the_update_is_made_from_the_clipped_gradient(limit: float | None, scale: float):
    """With a large adam_epsilon AdamW is nearly gradient descent: a step has its size."""
    own = {"a": torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))}
    own["a"].grad = torch.full((4,), 3.0, dtype=torch.float64)
    options = TrainConfig(max_grad_norm=limit, adam_epsilon=1e6)
    assert Optimizer(own, {}).step(0.1, options) == pytest.approx(6.0)
    assert own["a"].tolist() == pytest.approx([-0.1 * 3.0 * scale / 1e6] * 4, rel=1e-4)


def test_a_gradient_that_is_not_finite_updates_nothing():
    own = {"a": torch.nn.Parameter(torch.ones(2))}
    own["a"].grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(NumericsError, match="norm is nan: lower the learning rate"):
        Optimizer(own, {}).step(0.1, TrainConfig())
    assert own["a"].tolist() == [1.0, 1.0]
    assert own["a"].grad is None


def test_state_round_trips_exactly():
    options = TrainConfig()
    own, other = parameters(), parameters()
    first = Optimizer(own, {})
    drive(first, own, options, 2)
    state = {k: v.clone() for k, v in first.state().items()}
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(own[name])
    second = Optimizer(other, {})
    second.load_state(state)
    drive(first, own, options, 2)
    drive(second, other, options, 2)
    for name in own:
        assert torch.equal(own[name], other[name])


def test_state_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match=r"'z\.exp_avg'"):
        Optimizer(parameters(), {}).load_state({"z.exp_avg": torch.zeros(3)})


def test_schedules():
    cosine = TrainConfig(lr_schedule="cosine", lr_total_steps=10, lr_final=0.1)
    assert learning_rate(2.0, cosine, 0.0, 0.5) == 2.0
    assert learning_rate(2.0, cosine, 5.0, 6.0) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(2.0, cosine, 99.0, 100.0) == pytest.approx(0.2)
    warmup = TrainConfig(lr_warmup_steps=4)
    halves = [learning_rate(1.0, warmup, at / 2, (at + 1) / 2) for at in (0, 1, 7, 8, 100)]
    assert halves == [0.125, 0.25, 1, 1, 1]
    assert math.isclose(learning_rate(3e-4, TrainConfig(), 7, 8), 3e-4)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("minibatches", [1, 3, 4])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_no_update_within_the_schedule_has_a_rate_of_0(kind: Any, minibatches: int, warmup: int):
    options = TrainConfig(lr_schedule=kind, lr_warmup_steps=warmup, lr_total_steps=8)
    edges = [call + at / minibatches for call in range(8) for at in range(minibatches)] + [8.0]
    rates = [learning_rate(1.0, options, a, b) for a, b in itertools.pairwise(edges)]
    rising = warmup * minibatches
    assert rates[:rising] == pytest.approx([(k + 1) / rising for k in range(rising)])
    assert rates[rising] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[rising:]))
    assert min(rates) > 0
    assert learning_rate(1.0, options, 8.0, 9.0) == pytest.approx(0.0)  # lr_final, from here on


def rounded(masters: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """What computes: bfloat16 copies, whose gradients are float32."""
    copies = {name: torch.nn.Parameter(value.bfloat16()) for name, value in masters.items()}
    for copy in copies.values():
        copy.grad_dtype = torch.float32
    return copies


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_an_update_of_masters_is_the_float32_update_rounded(seed: int, steps: int):
    own = parameters()
    masters = {name: p.detach().clone() for name, p in own.items()}
    copies = rounded(masters)
    plain, mixed = Optimizer(own, {}), Optimizer(copies, masters)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for name, parameter in own.items():
            parameter.grad = torch.randn(3, generator=generator)
            copies[name].grad = parameter.grad.clone()
        norms = [one.step(1e-3, TrainConfig(weight_decay=0.1)) for one in (plain, mixed)]
        assert norms[0] == norms[1]
    for name, parameter in own.items():
        assert torch.equal(mixed.masters[name], parameter)
        assert torch.equal(copies[name], parameter.bfloat16())
        assert copies[name].grad is None and masters[name].grad is None
    assert all(torch.equal(value, mixed.state()[key]) for key, value in plain.state().items())


def test_updates_that_bfloat16_cannot_hold_are_not_lost():
    """1,000 updates of 1e-5 of a weight are 1 %; bfloat16's next number is 0.8 % away."""
    masters = {"a": torch.ones(4)}
    copies = rounded(masters)
    alone = {"a": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    mixed, lost = Optimizer(copies, masters), Optimizer(alone, {})
    for _ in range(1000):
        copies["a"].grad = torch.ones(4)
        alone["a"].grad = torch.ones(4, dtype=torch.bfloat16)
        mixed.step(1e-5, TrainConfig())
        lost.step(1e-5, TrainConfig())
    assert masters["a"].tolist() == pytest.approx([0.99] * 4, abs=2e-5)
    assert torch.equal(copies["a"], masters["a"].bfloat16())
    assert alone["a"].tolist() == [1.0] * 4
