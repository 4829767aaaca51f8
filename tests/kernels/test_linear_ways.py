"""Linear layers computed in another way: the same numbers, and the same bits for any rows."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from gspo.kernels.linear_ways import _by_blocks, _by_one_dnn


@pytest.mark.parametrize("way", [_by_blocks, _by_one_dnn])
@pytest.mark.parametrize("bias", [True, False])
def test_other_ways_of_a_linear_layer_are_the_layer_with_its_gradient(way: Any, bias: bool):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 10, bias=bias), torch.randn(1, 130, 24, requires_grad=True)
    weight = torch.randn(1, 130, 10)

    def run() -> list[torch.Tensor]:
        layer.zero_grad()
        x.grad = None
        out = layer(x)
        (out * weight).sum().backward()
        grads = [x.grad, *(p.grad for p in layer.parameters())]
        return [out.detach(), *(grad.clone() for grad in grads if grad is not None)]

    expected = run()
    layer.forward = MethodType(way, layer)
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    whole = layer(x)
    for rows in (2, 3, 64, 65):
        assert torch.equal(layer(x[:, :rows]), whole[:, :rows])
