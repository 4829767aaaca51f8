"""The gradient of the attention in tiles, by torch's kernel and by itself, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gspo.kernels import attention_gradient
from gspo.kernels.attention_gradient import attend_backward
from gspo.kernels.tile_attention import attend
from kernels.test_tile_attention import BENT, Case, random


def gradients(case: Case) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Of query, keys, values and the context's; of the sinks; of the output."""
    inputs = case.query, *case.own, case.context
    out, log_total = attend(*inputs, case.hidden, scoring=case.scoring)
    up = random(6, *out.shape)
    given = case.context_of, case.hidden, case.scoring
    query, own, shared, sinks = attend_backward(up, out, log_total, *inputs, *given)
    return [query, *own, *shared], sinks, up


@pytest.mark.parametrize("bent", BENT)
@pytest.mark.parametrize("depth", [5, 8])  # torch's kernel wants keys and values of one depth
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5, 2)])
def test_it_is_the_gradient_of_one_softmax(sizes, queries: int, large: bool, depth: int, bent):
    case = Case(sizes, queries, bent, depth, large)
    found, of_sinks, up = gradients(case)
    case.expected.backward(up.double())
    if case.sinks is None:
        assert of_sinks is None
    else:
        assert of_sinks is not None and case.sinks.grad is not None
        torch.testing.assert_close(of_sinks.double(), case.sinks.grad, atol=2e-5, rtol=1e-4)
    for one, leaf in zip(found, case.leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(one.double(), leaf.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("bent", [(None, False), (0.7, False)])
def test_the_kernel_is_used_where_it_can(bent, monkeypatch: pytest.MonkeyPatch):
    plain, real = list[int](), attention_gradient._plain

    def noted(*given: Any) -> Any:
        plain.append(given[3].shape[-1])  # the width of the values
        return real(*given)

    monkeypatch.setattr(attention_gradient, "_plain", noted)
    for depth in (8, 5):
        gradients(Case((2,), 3, bent, depth))
    assert plain == ([8, 5] if bent[0] else [5])


def test_a_part_of_the_sequences_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch):
    whole, _, _ = gradients(Case((1, 5, 2), 3, (None, False), 8))
    monkeypatch.setattr(attention_gradient, "_JOINED_BYTES", 40_000)  # one sequence takes 24,576
    assert len(whole[0]) == 8
    parts, _, _ = gradients(Case((1, 5, 2), 3, (None, False), 8))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
