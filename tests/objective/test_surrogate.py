"""The clip at its very edge, where a minimum of two rounded products would tie."""

from __future__ import annotations

import pytest
import torch

from gspo.objective import clipped_surrogate

LOW, HIGH = 3e-4, 4e-4
MAGNITUDES = torch.linspace(0.01, 3.0, 500)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_at_the_edge_and_silent_one_rounding_beyond(sign: float, dtype: torch.dtype) -> None:
    advantage = (sign * MAGNITUDES).to(dtype)
    edge = torch.tensor(1 + HIGH if sign > 0 else 1 - LOW, dtype=dtype).expand_as(advantage)
    beyond = edge.nextafter(edge + sign)
    for ratio, silent in ((edge, False), (beyond, True)):
        ratio = ratio.clone().requires_grad_()
        value, clipped = clipped_surrogate(ratio, advantage, LOW, HIGH)
        value.sum().backward()
        assert clipped.tolist() == [silent] * len(advantage)
        assert value.tolist() == (edge * advantage).tolist()
        assert ratio.grad is not None
        assert ratio.grad.tolist() == ([0.0] * len(advantage) if silent else advantage.tolist())
