"""What `policy_loss` accepts, and what it refuses with the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from gspo.objective import PRESETS, LossOutput, Objective, policy_loss

OLD = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.7, -1.1]])
NEW = OLD + torch.tensor([[0.1, -0.2, 0.15], [0.05, 0.0, -0.4]])
ADVANTAGES = torch.tensor([-1.0, 1.0])  # nothing is clipped
ROWS = torch.tensor([[0, 0, 0], [1, 1, 1]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def called(
    objective: Any = PRESETS["grpo"].objective, ids: Tensor | None = ROWS, **masks: Any
) -> tuple[LossOutput, Tensor]:
    new = NEW.clone().requires_grad_()
    out = policy_loss(new, OLD, ids, ADVANTAGES, objective, **masks)
    (gradient,) = torch.autograd.grad(out.loss, new)
    return out, gradient


def assert_equal(one: tuple[LossOutput, Tensor], two: tuple[LossOutput, Tensor]) -> None:
    assert torch.equal(one[0].loss, two[0].loss)
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("name", ["ratio_mask", "loss_mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_mask_of_0_and_1_is_the_mask_of_booleans(name: str, dtype: torch.dtype) -> None:
    assert_equal(called(**{name: MASK.to(dtype)}), called(**{name: MASK}))
    assert not torch.equal(called(**{name: MASK})[1], called()[1])


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("name", ["ratio_mask", "loss_mask"])
@pytest.mark.parametrize(
    ("mask", "message"), [(MASK.long() * 2, r"holds \[2\]"), (MASK.long() - 1, r"holds \[-1\]")]
)
def test_other_numbers_are_no_mask(name: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{message}: .*0 and 1"):
        called(**{name: mask})


@pytest.mark.usefixtures("unhooked")
def test_a_mask_of_floats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_mask is torch\.float32"):
        called(loss_mask=MASK.float())


def test_without_ids_each_row_is_a_sequence() -> None:
    assert_equal(called(ids=None), called())


@pytest.mark.usefixtures("unhooked")
def test_a_packed_row_needs_ids() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\): give sequence_ids"):
        policy_loss(NEW[0], OLD[0], None, ADVANTAGES[:1], PRESETS["gspo"].objective)


@pytest.mark.parametrize("name", ["gspo", "dr_grpo", "vespo"])
def test_a_preset_stands_for_its_objective(name: str) -> None:
    assert_equal(called(PRESETS[name]), called(PRESETS[name].objective))


def test_a_dropped_token_changes_the_others_weight_where_t_is_left_to_be_counted() -> None:
    """As the docstring says: with `token_mean`, T is the caller's to keep."""
    dapo, drop = PRESETS["dapo"].objective, MASK
    _, whole = called(dapo)
    _, fewer = called(dapo, loss_mask=drop)
    _, same = called(dapo, loss_mask=drop, total_tokens=6)
    torch.testing.assert_close(fewer[drop], whole[drop] * 6 / 5)
    torch.testing.assert_close(same[drop], whole[drop])
    for name in ("gspo", "grpo", "dr_grpo", "luspo"):
        _, whole = called(PRESETS[name])
        _, fewer = called(PRESETS[name], loss_mask=drop)
        assert torch.equal(fewer[drop], whole[drop])


# What the objective refuses, and that it says why.


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
    ("are 0 to 2, but there are 2 seq", {"sequence_ids": torch.tensor([0, 1, 2])}),
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
