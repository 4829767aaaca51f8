"""What `policy_loss` accepts: masks of integers, batches without sequence ids, presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gspo.objective import PRESETS, LossOutput, policy_loss

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
    ("mask", "message"), [(MASK.long() * 2, "holds 2"), (MASK.long() - 1, "holds -1")]
)
def test_other_numbers_are_no_mask(name: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name} {message}.*0 and 1"):
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
