"""Modules of a model computed by fewer operations.

A module is changed only if it gives the same numbers on a trial.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_close = partial(torch.allclose, atol=1e-5, rtol=1e-5)


def fuse(lm: nn.Module) -> None:
    """Compute RMS norms, and the gates of feed-forward layers, by one kernel each.

    transformers' norms take eight kernels forward and twelve backward, its gates two and four.
    """
    alike: dict[type, bool] = {}
    for module in lm.modules():
        kind, new = type(module), _gated if hasattr(module, "gate_proj") else _rms_norm
        if kind not in alike:
            is_one = _is_gated(module) if new is _gated else _is_norm(module)
            alike[kind] = is_one and _gives_the_same(module, new)
        if alike[kind]:
            module.forward = MethodType(new, module)


def shorten(lm: nn.Module) -> None:
    """On a CPU: compute RMS norms in one call where no gradient is asked for, of the same bits."""
    for module in lm.modules():
        if _is_norm(module) and _gives_the_same(module, _rms_norm, torch.equal):
            norm = cast(Any, module)
            norm.gspo_epsilon, norm.forward = _epsilon(norm), MethodType(_short_norm, norm)


def _short_norm(self: Any, hidden_states: Tensor) -> Tensor:
    dtype = self.weight.dtype
    if torch.is_grad_enabled() or not hidden_states.dtype == dtype == torch.float32:
        return type(self).forward(self, hidden_states)
    return torch.rms_norm(hidden_states, self.weight.shape, self.weight, self.gspo_epsilon)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is built as one: a vector of weights, and an epsilon."""
    names = [name for name, _ in module.named_parameters()]
    if not type(module).__name__.endswith("RMSNorm") or names != ["weight"]:
        return False
    return module.get_parameter("weight").dim() == 1 and _epsilon(module) is not None


def _is_gated(module: Any) -> bool:
    """Whether it is built as a feed-forward layer of three projections."""
    projections = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    names = {name for name, _ in module.named_children()}
    linear = all(isinstance(one, nn.Linear) for one in projections)
    return linear and names == {"gate_proj", "up_proj", "down_proj", "act_fn"}


@torch.no_grad()
def _gives_the_same(
    module: Any,
    forward: Callable[[Any, Tensor], Tensor],
    alike: Callable[[Tensor, Tensor], bool] = _close,
) -> bool:
    weight = next(module.parameters())
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0)) * 3
    x = x.to(weight)
    try:
        return alike(forward(module, x), module(x))
    except (TypeError, RuntimeError):  # it takes something else too
        return False


def _gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(silu_product(self.gate_proj(x), self.up_proj(x)))


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if gate.is_cuda and gate.dtype == up.dtype and importlib.util.find_spec("triton"):
        from gspo.kernels.gate_kernels import SiluProduct

        return SiluProduct.apply(gate, up)
    return functional.silu(gate) * up


def _epsilon(norm: Any) -> float | None:
    found = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if isinstance(value, float)), None)


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    # Its kernel takes one type only: that of the weight, as the product with it has.
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
    weight = self.weight.to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, _epsilon(self))
