"""What the objective refuses, and that it says why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from gspo.objective import PRESETS, Objective, policy_loss

KL = Objective("sequence", 0.2, 0.2, kl_coef=0.1)
TOKEN = Objective("sequence_token", 0.2, 0.2)


def call(objective: Objective = PRESETS["gspo"].objective, **changed: Any) -> None:
    arguments: dict[str, Any] = {
        "logprobs": torch.full((3,), -1.0),
        "old_logprobs": torch.full((3,), -1.0),
        "sequence_ids": torch.tensor([0, 0, 1]),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    policy_loss(objective=objective, **(arguments | changed))


def test_the_plain_call_is_accepted() -> None:
    call()
    call(ratio_mask=torch.tensor([True, True, False]), sequence_ids=torch.tensor([0, 1, 9]))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("logprobs are torch.bfloat16", {"logprobs": torch.zeros(3, dtype=torch.bfloat16)}),
    ("logprobs are torch.float16", {"logprobs": torch.zeros(3, dtype=torch.float16)}),
    ("old_logprobs are torch.bfloat16", {"old_logprobs": torch.zeros(3, dtype=torch.bfloat16)}),
    ("old_logprobs has shape", {"old_logprobs": torch.zeros(2)}),
    ("old_logprobs has shape", {"old_logprobs": torch.zeros(1)}),
    ("old_logprobs has shape", {"old_logprobs": torch.zeros(1, 3)}),
    ("sequence_ids has shape", {"sequence_ids": torch.tensor([0, 1])}),
    ("ratio_mask has shape", {"ratio_mask": torch.tensor([True])}),
    ("either advantages", {"advantages": None}),
    ("either advantages", {"token_advantages": torch.ones(3)}),
    ("advantages have shape", {"advantages": torch.ones(2, 1)}),
    ("advantages have shape", {"advantages": torch.tensor(1.0)}),
    ("'sequence_token'", {"advantages": None, "token_advantages": torch.ones(3)}),
    (
        "token_advantages has shape",
        {"advantages": None, "token_advantages": torch.ones(1), "objective": TOKEN},
    ),
    ("reach 2, but there are 2", {"sequence_ids": torch.tensor([0, 1, 2])}),
    ("reference_logprobs are missing", {"objective": KL}),
    ("reference_logprobs are given", {"reference_logprobs": torch.zeros(3)}),
]


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(("message", "changed"), REFUSED)
def test_refused_with_the_reason(message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("loss_mask has shape", {"loss_mask": torch.tensor([True])}),
        ("loss_mask has shape", {"loss_mask": torch.tensor([True, False])}),
        ("reference_logprobs", {"objective": KL, "reference_logprobs": torch.zeros(1)}),
        ("reference_logprobs", {"objective": KL, "reference_logprobs": torch.zeros(2)}),
        ("reference_logprobs", {"objective": KL, "reference_logprobs": torch.zeros(3).half()}),
        ("sequence_ids", {"sequence_ids": torch.tensor([0, -1, 1])}),
        ("total_sequences", {"total_sequences": 0}),
        ("total_sequences", {"total_sequences": -4}),
    ],
)
def test_refused_before_it_is_broadcast_or_indexed(message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("level", "sequence_token"),
        ("surrogate", "truncate"),
        ("aggregate", "token_mean"),
        ("epsilon_scale", "sqrt_length"),
    ],
)
def test_an_unknown_name_is_refused_when_the_objective_is_made(name: str, choice: str) -> None:
    named: dict[str, Any] = {"level": "sequence", "epsilon_low": 0.2, "epsilon_high": 0.2}
    named[name] = "foo"
    with pytest.raises(ValueError, match=f"unknown {name} 'foo': it is one of .*{choice}"):
        Objective(**named)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"surrogate": "gate"}, "'gate' has the constants tau_pos, tau_neg, but none were given"),
        ({"constants": {"tau": 1.0}}, "'clip' has the constants none, but tau were given"),
        ({"level": "sequence", "surrogate": "truncate"}, "'token', not 'sequence'"),
    ],
)
def test_a_surrogate_is_given_what_it_reads(changed: dict[str, Any], message: str) -> None:
    named: dict[str, Any] = {"level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2}
    with pytest.raises(ValueError, match=message):
        Objective(**named | changed)


@pytest.mark.parametrize("low", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_lower_clip_distance_outside_0_to_1_is_refused(low: float) -> None:
    with pytest.raises(ValueError, match="epsilon_low"):
        Objective("sequence", low, 0.2)
    with pytest.raises(ValueError, match="epsilon_low"):
        TOKEN.with_epsilon(low, 0.2)


@pytest.mark.parametrize("high", [0.0, -0.1, math.nan])
def test_an_upper_clip_distance_that_is_not_positive_is_refused(high: float) -> None:
    with pytest.raises(ValueError, match="epsilon_high"):
        Objective("sequence", 0.2, high)


@pytest.mark.parametrize("coef", [-1e-9, math.nan])
def test_a_negative_kl_weight_is_refused(coef: float) -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        Objective("sequence", 0.2, 0.2, coef)


def test_with_epsilon_changes_the_clip_range_only() -> None:
    assert KL.with_epsilon(0.1, 0.3) == Objective("sequence", 0.1, 0.3, kl_coef=0.1)


def test_the_import_hook_checks_shapes() -> None:
    """Otherwise conftest.py came too late, and no test of this folder checks annotations."""
    with pytest.raises(TypeCheckError):
        call(old_logprobs=torch.zeros(2))
