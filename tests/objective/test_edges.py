"""Batches at the edge: nothing in them, nothing to train on, nothing but garbage around it."""

from __future__ import annotations

import math

import pytest
import torch

from gspo.objective import Level, Objective, policy_loss
from objective.cases import LEVELS


@pytest.mark.parametrize("level", LEVELS)
def test_an_empty_microbatch_adds_nothing(level: Level) -> None:
    none = torch.zeros(0, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long)
    objective = Objective(level, 0.2, 0.2)
    out = policy_loss(none, none, ids, torch.zeros(0), objective, total_sequences=8)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert out.log_ratio.shape == out.extreme.shape == (0,)


@pytest.mark.parametrize("level", LEVELS)
def test_padding_alone_adds_nothing(level: Level) -> None:
    new = torch.tensor([math.nan, -math.inf], requires_grad=True)
    mask, ids = torch.tensor([False, False]), torch.tensor([5, -5])
    out = policy_loss(
        new, new.detach(), ids, torch.tensor([2.0]), Objective(level, 0.2, 0.2), ratio_mask=mask
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert new.grad is not None
    assert new.grad.tolist() == [0.0, 0.0]
    assert out.lengths.tolist() == out.log_ratio.tolist() == [0.0]


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "sequence"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_token_advantages_outside_the_loss_mask_never_leak(level: Level, junk: float) -> None:
    """A token that was sampled and is not trained on has no advantage to speak of."""
    new = torch.tensor([-1.0, -1.1, -0.9], requires_grad=True)
    out = policy_loss(
        new,
        torch.full((3,), -1.0),
        torch.zeros(3, dtype=torch.long),
        None,
        Objective(level, 0.2, 0.2),
        token_advantages=torch.tensor([1.0, junk, 2.0]),
        loss_mask=torch.tensor([True, False, True]),
    )
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()
    assert new.grad[1] == 0


def test_only_the_loss_carries_gradient() -> None:
    new = torch.tensor([-1.0, -1.1], requires_grad=True)
    old = torch.tensor([-1.0, -1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], requires_grad=True)
    objective = Objective("sequence", 0.2, 0.2, kl_coef=0.1)
    out = policy_loss(
        new, old.detach(), torch.tensor([0, 1]), advantages.detach(), objective,
        reference_logprobs=old.detach(),
    )  # fmt: skip
    others = {name: value for name, value in vars(out).items() if name != "loss"}
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in others.values())


def test_bounded_sequences_of_levels_that_look_at_tokens_are_counted() -> None:
    """log-ratios of 50 and -50: the mean is 0, so only levels with token ratios are extreme."""
    new, old = torch.tensor([49.0, -51.0]), torch.tensor([-1.0, -1.0])
    ids, advantages = torch.tensor([0, 0]), torch.tensor([1.0])
    counted = {
        level: policy_loss(new, old, ids, advantages, Objective(level, 0.2, 0.2)).extreme.item()
        for level in LEVELS
    }
    assert counted == {
        "token": True,
        "sequence": False,
        "sequence_token": False,
        "average": True,
        "geometric_average": False,
    }
