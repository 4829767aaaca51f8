"""How fast the device multiplies matrices and copies memory: what all else is held against."""

from __future__ import annotations

from typing import Any

import torch

from gpu_parts.bench import Bench
from gpu_parts.profiling import precision

SIZE = 8192
_REPEATS = 10
_PRODUCTS = (
    ("bfloat16", torch.bfloat16, "highest"),
    ("float32", torch.float32, "highest"),
    ("tf32", torch.float32, "high"),
)


def measure(bench: Bench) -> None:
    """Square products of random matrices, and a copy from device memory to device memory."""
    size = bench.size(SIZE, 128)
    for name, dtype, rounding in _PRODUCTS:
        with bench.row(f"{name} product") as row, precision(rounding):
            a, b = (torch.randn(size, size, device=bench.card.device).to(dtype) for _ in range(2))
            row |= _times(bench, lambda a=a, b=b: torch.mm(a, b))
            row |= {"size": size, "tflops": 2 * size**3 / row["median_s"] / 1e12}
    with bench.row("copy") as row:
        source = torch.ones(bench.size(2**30, 2**16), device=bench.card.device)
        target = torch.empty_like(source)
        row |= _times(bench, lambda: target.copy_(source))
        moved = 2 * source.numel() * source.itemsize  # read and written
        row |= {"bytes": moved, "tb_per_s": moved / row["median_s"] / 1e12}


def _times(bench: Bench, work: Any) -> dict[str, Any]:
    return bench.time(work, repeats=_REPEATS, warmup=3)
