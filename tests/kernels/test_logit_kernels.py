"""Triton's kernels against torch's operations: on a GPU, and where Triton interprets them."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from gspo.kernels import split_projection
from gspo.kernels.running_softmax import RunningSoftmax
from gspo.kernels.split_projection import LogitBlock

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()),
        reason="needs a CUDA device, or TRITON_INTERPRET=1",
    ),
]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_they_do_what_torchs_operations_do(softcap: float | None, monkeypatch):
    from gspo.kernels import logit_kernels

    monkeypatch.setattr(logit_kernels, "_BLOCK", 64)
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 300, generator=rng) * 5).to(DEVICE)
    targets = torch.tensor([0, 129, 130, 299, 5, 64, 200, 131, 7], device=DEVICE)
    temperatures = torch.linspace(0.3, 2, 9, device=DEVICE)
    chosen = torch.linspace(0.1, 0.9, 9, device=DEVICE)
    up, tokens = torch.cos(torch.arange(9, device=DEVICE) * 1.0), slice(2, 9)
    results = []
    for kernels in (split_projection, logit_kernels):
        softmax, picked = RunningSoftmax(temperatures), torch.zeros(9, device=DEVICE)
        for start, stop in ((0, 130), (130, 300)):
            part = logits[tokens, start:stop].contiguous()
            block = LogitBlock(softmax, tokens, part, targets[tokens], start, softcap)
            kernels.add(block, picked[tokens])
        part = logits[tokens, 130:].contiguous()
        block = LogitBlock(softmax, tokens, part, targets[tokens], 130, softcap)
        pulled = kernels.pull(block, chosen[tokens], up[tokens])
        state = softmax.max, softmax.total, softmax.entropy(), picked
        results.append([*(x[tokens] for x in state), pulled.float()])
    for one, other, near in zip(*results, (1e-6, 1e-5, 1e-5, 1e-6, 2**-7), strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)
