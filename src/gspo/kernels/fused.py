"""On a GPU: modules of a model computed by fewer kernels, and experts in half precision.

A module is changed only if it gives the same numbers on a trial.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_CLOSE = 1e-5


def fuse(lm: nn.Module) -> int:
    """Compute RMS norms by one kernel each; returns how many modules were changed.

    transformers' own take eight kernels forward and twelve backward.
    """
    changed = 0
    alike: dict[type, bool] = {}
    for module in lm.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and alike.setdefault(kind, _is_plain(module)):
            module.forward = MethodType(_rms_norm, module)
            changed += 1
    return changed


def _epsilon(norm: Any) -> float | None:
    found = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if isinstance(value, float)), None)


@torch.no_grad()
def _is_plain(norm: nn.Module) -> bool:
    """Whether a module computes weight * x / rms(x), and nothing else."""
    parameters = dict(norm.named_parameters())
    weight = parameters.pop("weight", None)
    if parameters or weight is None or weight.dim() != 1 or _epsilon(norm) is None:
        return False
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(3, len(weight), generator=rng) * 3).to(weight)
    try:
        expected = norm(x)
    except (TypeError, RuntimeError):  # it takes something else too
        return False
    return torch.allclose(_rms_norm(norm, x), expected, atol=_CLOSE, rtol=_CLOSE)


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    # Its kernel takes one type only: that of the weight, as the product with it has.
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
    weight = self.weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return functional.rms_norm(x, weight.shape, weight, _epsilon(self))


@cache
def cast_experts() -> Any:
    """Let autocast cast the products of experts on a GPU, as it casts all others.

    Without this torch multiplies float32 experts one by one, and waits for the device before. It is
    registered once, for the process; returns what keeps it.
    """
    library = torch.library.Library("aten", "IMPL")

    def product(a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None):
        dtype = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", enabled=False):
            return torch._grouped_mm(
                a.to(dtype), b.to(dtype), offs=offs, bias=bias, out_dtype=out_dtype
            )

    library.impl("_grouped_mm", product, "AutocastCUDA")
    return library
