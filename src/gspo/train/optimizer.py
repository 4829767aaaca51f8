"""AdamW, its learning-rate schedule, and its state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gspo.core.errors import CheckpointError, NumericsError
from gspo.core.timing import span
from gspo.dev import TrainConfig
from gspo.kernels.sharded import full

_MOMENTS = ("exp_avg", "exp_avg_sq")
_FUSED = ("cpu", "cuda")
"""Devices on which the update of all parameters is one kernel."""


def learning_rate(peak: float, options: TrainConfig, begin: float, end: float) -> float:
    """The rate of one optimizer step.

    The warmup is read at the step's end and the decay at its begin. So no step has a rate of 0: the
    first one has a share of the peak already, and the last one is still above `lr_final`.

    Args:
        peak: the largest rate.
        options: the schedule.
        begin, end: calls of `train` that are done before the step and after it; fractions count
            the minibatches of a call.

    >>> options = TrainConfig(lr_schedule="linear", lr_warmup_steps=2, lr_total_steps=6)
    >>> [learning_rate(1.0, options, call, call + 1) for call in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup, total = options.lr_warmup_steps or 0, options.lr_total_steps
    if begin < warmup:
        return peak * min(1.0, end / warmup)
    if options.lr_schedule == "constant" or total is None:
        return peak
    done = min(1.0, (begin - warmup) / (total - warmup))
    share = 1 - done if options.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (options.lr_final + (1 - options.lr_final) * share)


class Optimizer:
    """AdamW over named parameters; each step sets its hyper-parameters.

    A parameter that computes rounded is the copy of a float32 master: the update, which may be
    smaller than its last digit, is made to the master, and the copy is rounded again.

    Args:
        parameters: what has gradients.
        masters: by name, the float32 numbers of those that are rounded (`Policy.round_weights`).

    Attributes:
        masters: these, as they are after the last step.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], masters: Mapping[str, Tensor]):
        self._parameters, self.masters = dict(parameters), dict(masters)
        self._updated = {**self._parameters, **self.masters}
        fused = all(p.device.type in _FUSED for p in self._parameters.values())
        meshes: dict[Any, list[Tensor]] = {}  # torch takes those of one mesh at a time
        for tensor in self._updated.values():
            meshes.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
        groups = [{"params": tensors} for tensors in meshes.values()]
        self._adam = torch.optim.AdamW(groups, lr=0.0, fused=fused)

    @span("optimizer")
    def step(self, rate: float, options: TrainConfig) -> float:
        """Clip the gradient, update, and clear it. Returns the norm before clipping.

        Raises:
            NumericsError: the gradient is NaN or infinite; nothing was updated.
        """
        copies: list[Tensor] = [self._parameters[name] for name in self.masters]
        for master, copy in zip(self.masters.values(), copies, strict=True):
            master.grad = copy.grad
        limit = math.inf if options.max_grad_norm is None else options.max_grad_norm
        total = self._norm()
        norm = total.item()
        if not math.isfinite(norm):
            self.clear()
            raise NumericsError(
                f"the gradient's norm is {norm}: lower the learning rate, or look at the batch's "
                "ratio/log_abs_max"
            )
        for group in self._adam.param_groups:
            torch.nn.utils.clip_grads_with_norm_(group["params"], limit, total)
            group["lr"], group["weight_decay"] = rate, options.weight_decay
            group["betas"], group["eps"] = options.adam_betas, options.adam_epsilon
        self._adam.step()
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(copies, list(self.masters.values()))  # pyright: ignore[reportPrivateImportUsage]
        self.clear()
        return norm

    def _norm(self) -> Tensor:
        """Of the whole gradient."""
        norms = []
        for group in self._adam.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            norms.append(full(norm))
        return norms[0] if len(norms) == 1 else torch.stack(norms).norm()

    def clear(self) -> None:
        """Drop the gradients."""
        for tensor in (*self._parameters.values(), *self.masters.values()):
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """`<parameter>.<exp_avg|exp_avg_sq|step>` -> tensor; empty before the first step."""
        return {
            f"{name}.{key}": value.detach()
            for name, parameter in self._updated.items()
            for key, value in self._adam.state.get(parameter, {}).items()
        }

    def empty_state(self) -> dict[str, Tensor]:
        """What `state()` has after a step, of zeros."""
        zeros: dict[str, Tensor] = {}
        for name, parameter in self._updated.items():
            zeros |= {f"{name}.{k}": torch.zeros_like(parameter.detach()) for k in _MOMENTS}
            zeros[f"{name}.step"] = torch.zeros(())
        return zeros

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` returned.

        Raises:
            CheckpointError: the state is of other parameters.
        """
        for name, value in state.items():
            parameter, _, key = name.rpartition(".")
            if parameter not in self._parameters:
                raise CheckpointError(f"the optimizer state has {name!r}, which the model lacks")
            weights = self._updated[parameter]
            device = value.device if key == "step" else weights.device
            self._adam.state[weights][key] = value.clone().to(device)
