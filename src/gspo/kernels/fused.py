"""Modules of a model computed by fewer operations.

A module is changed only if it gives the same numbers on a trial.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional

from gspo.kernels.experts import sorted_experts
from gspo.kernels.hf import usual_experts


def fuse(lm: nn.Module) -> None:
    """Compute RMS norms, and the gates of feed-forward layers, by one kernel each; experts by few.

    transformers' norms take eight kernels forward and twelve backward, its gates two and four.
    """
    silu_experts = partial(sorted_experts, gate=silu_product)
    experts = (usual_experts, silu_experts), (usual_experts, sorted_experts)
    forms = (_is_norm, _rms_norm), (_is_gated, _gated), *experts
    alike: dict[type, Callable[..., Tensor] | None] = {}
    for module in lm.modules():
        kind = type(module)
        if kind not in alike:
            fitting = (new for fits, new in forms if fits(module))
            alike[kind] = next((new for new in fitting if _gives_the_same(module, new)), None)
        if new := alike[kind]:
            module.forward = MethodType(new, module)


def shorten(lm: nn.Module) -> None:
    """On a CPU: compute RMS norms in one call where no gradient is asked for, of the same bits."""
    for module in lm.modules():
        if _is_norm(module) and _gives_the_same(module, _rms_norm, torch.equal):
            norm = cast(Any, module)
            norm.gspo_epsilon, norm.forward = _epsilon(norm), MethodType(_short_norm, norm)


def _close(output: Tensor, usual: Tensor) -> bool:
    return bool((output - usual).abs().max() <= 1e-5 * usual.abs().max())


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
    forward: Callable[..., Tensor],
    alike: Callable[[Tensor, Tensor], bool] = _close,
) -> bool:
    """Whether it does on three tokens; with other weights, if its own are divided among ranks."""
    divided = [p for p in module.parameters() if isinstance(p, DTensor)]
    if isinstance(module, FSDPModule) or any(p.device_mesh.ndim > 1 for p in divided):
        return False  # it cannot be copied, or has this process's experts
    if divided:
        # Two experts: all of a large model have no room beside it. From n on: a gate that is
        # exchanged with its factor has other numbers.
        few, device = 2 if usual_experts(module) else 0, divided[0].device
        shapes = [torch.Size((few or len(p), *p.shape[1:])) for p in divided]
        made = (torch.arange(n, n + s.numel(), device=device) for n, s in enumerate(shapes))
        whole = (nn.Parameter(w.sin().view(s)) for w, s in zip(made, shapes, strict=True))
        module = copy.deepcopy(module, dict(zip(map(id, divided), whole, strict=True)))
        module.num_experts = few
    weight = next(module.parameters())
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0)) * 3
    given = [x.to(weight)]
    if usual_experts(module):
        chosen = torch.arange(6, device=weight.device).view(3, 2) % module.num_experts
        given += [chosen, given[0][:, :2]]
    try:
        return alike(forward(module, *given), module(*given))
    except (TypeError, RuntimeError):  # it takes something else too
        return False


def _gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(silu_product(self.gate_proj(x), self.up_proj(x)))


def silu_product(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up; without `up`, the last dimension of `gate` holds both, side by side."""
    alike = up is None or gate.dtype == up.dtype
    if gate.is_cuda and alike and importlib.util.find_spec("triton"):
        from gspo.kernels.gate_kernels import SiluProduct

        return SiluProduct.apply(gate, up)
    if up is None:
        gate, up = gate.chunk(2, -1)
    return functional.silu(gate) * up


def _epsilon(norm: Any) -> float | None:
    found = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if isinstance(value, float)), None)


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    # Its kernel takes one type only: that of the weight, as the product with it has.
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
    weight = self.weight.to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, _epsilon(self))
