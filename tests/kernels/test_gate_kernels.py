"""silu(gate) * up and its gradient: on a GPU, and where Triton interprets its kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kernels.test_logit_kernels import DEVICE
from kernels.test_logit_kernels import pytestmark as pytestmark


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_they_do_what_torchs_operations_do(kind: torch.dtype):
    from gspo.kernels.gate_kernels import SiluProduct

    rng = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(9, 300, generator=rng).to(DEVICE, kind) for _ in range(3))
    given = gate.requires_grad_(), up.requires_grad_()
    one = SiluProduct.apply(*given)
    other = functional.silu(gate.float()) * up.float()
    near = 1e-5 if kind == torch.float32 else 2**-7
    pairs = zip(
        [one, *torch.autograd.grad(one, given, grad)],
        [other, *torch.autograd.grad(other, given, grad.float())],
        strict=True,
    )
    for found, expected in pairs:
        assert found.dtype == kind
        torch.testing.assert_close(found.float(), expected.float(), atol=near, rtol=near)
