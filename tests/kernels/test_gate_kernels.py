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
    # Rows of less and of more than a block.
    for shape in ((9, 300), (2, 3, 1030)):
        gate, up, grad = (torch.randn(shape, generator=rng).to(DEVICE, kind) for _ in range(3))
        both = torch.cat([gate, up], -1).requires_grad_()
        given = gate.requires_grad_(), up.requires_grad_()
        expected = functional.silu(gate.float()) * up.float()
        wanted = torch.autograd.grad(expected, given, grad.float())
        one, joined = SiluProduct.apply(*given), SiluProduct.apply(both, None)
        (halves,) = torch.autograd.grad(joined, both, grad)
        found = [one, *torch.autograd.grad(one, given, grad), joined, *halves.chunk(2, -1)]
        near = 1e-5 if kind == torch.float32 else 2**-7
        for own, other in zip(found, [expected, *wanted] * 2, strict=True):
            assert own.dtype == kind
            torch.testing.assert_close(own.float(), other.float(), atol=near, rtol=near)
