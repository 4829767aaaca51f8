"""AdamW, its learning-rate schedule, and its state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gspo.core.errors import CheckpointError, NumericsError
from gspo.core.timing import timed
from gspo.dev import TrainConfig

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
    """AdamW over named parameters; hyper-parameters are set anew at each step."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]):
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        fused = all(p.device.type in _FUSED for p in self._parameters)
        self._adam = torch.optim.AdamW(self._parameters, lr=0.0, fused=fused)

    @timed("optimizer")
    def step(self, rate: float, options: TrainConfig) -> float:
        """Clip the gradient, update, and clear it. Returns the norm before clipping.

        Raises:
            NumericsError: the gradient is NaN or infinite; nothing was updated.
        """
        limit = math.inf if options.max_grad_norm is None else options.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit).item()
        if not math.isfinite(norm):
            self.clear()
            raise NumericsError(
                f"the gradient's norm is {norm}: lower the learning rate, or look at the batch's "
                "ratio/log_abs_max"
            )
        for group in self._adam.param_groups:
            group["lr"] = rate
            group["betas"] = options.adam_betas
            group["eps"] = options.adam_epsilon
            group["weight_decay"] = options.weight_decay
        self._adam.step()
        self.clear()
        return norm

    def clear(self) -> None:
        """Drop the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`<parameter>.<exp_avg|exp_avg_sq|step>` -> tensor; empty before the first step."""
        out = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for key, value in self._adam.state.get(parameter, {}).items():
                out[f"{name}.{key}"] = value.detach().cpu()
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` returned.

        Raises:
            CheckpointError: the state is of other parameters.
        """
        known = set()
        for name, parameter in zip(self._names, self._parameters, strict=True):
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in state.items()
                if key.rpartition(".")[0] == name
            }
            known |= {f"{name}.{key}" for key in own}
            if own:
                self._adam.state[parameter] = {
                    key: value.clone() if key == "step" else value.clone().to(parameter.device)
                    for key, value in own.items()
                }
        if known != set(state):
            strange = sorted(set(state) - known)[0]
            raise CheckpointError(f"the optimizer state has {strange!r}, which the model lacks")
