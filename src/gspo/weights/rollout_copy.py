"""A copy of the weights for the engine, in the precision that it samples in.

A rollout engine is faster than the trainer because it computes in less precision, and its
log-probs differ from the trainer's on the same weights. This module makes that difference on
purpose, on any machine:

- `bfloat16`, `float16`: the weights are cast and the whole forward pass runs in that type. The
  vocabulary projection only is summed in float32 from the rounded weights and hidden states
  (`logprob.full_logits`), so an engine that also rounds its logits is noisier than this one.
- `int8`, `int4`: weight-only. Every linear and expert weight is rounded to the engine's grid and
  back, and the pass runs in float32: what is lost is what the integers lose, nothing else.
  int8 has one scale per output channel, int4 one per group of 32 inputs. Embedding, output head,
  norms, biases and routers stay float32, as quantized checkpoints leave them.
- `float32`: an exact copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gspo.core.errors import ModelError
from gspo.dev import RolloutDtype
from gspo.kernels.hf import Conv1D
from gspo.policy.lora import merged_weights
from gspo.policy.policy import Policy

GROUP = 32
"""Inputs that share a scale in int4."""
_BITS = {"int8": 8, "int4": 4}
_ROUTERS = ("gate", "router", "shared_expert_gate")


class RoundedCopy:
    """A copy of the trainer's weights in an engine's precision, and its publisher.

    LoRA adapters are merged before the weights are rounded.

    Attributes:
        policy: what the engine samples from. It shares no tensor with the trainer's policy and is
            never trained.

    Raises:
        ModelError: int8 or int4 of experts whose layout transformers doesn't declare.
    """

    tolerance = 0.0

    def __init__(self, policy: Policy, dtype: RolloutDtype):
        self._type = torch.float32 if dtype in _BITS else getattr(torch, dtype)
        self._bits = _BITS.get(dtype)
        whole = policy.peft or policy.lm
        empty = {id(p): torch.empty_like(p, dtype=self._type) for p in whole.parameters()}
        lm = _with_parameters(whole, empty)
        self.policy = self._plain(policy, lm if policy.peft is None else lm.unload())
        self._modules = None  # what `expected` weights compute in; None: the trainer's own modules
        if policy.peft is not None:  # which have other names
            self._modules = self._plain(policy, without_weights(self.policy.lm))
        self.publish(policy)

    def publish(self, policy: Policy) -> int:
        """Round the trainer's weights again, in place; see `Publisher`."""
        overwrite(self.policy, self._held(policy))
        self.policy.version = policy.version
        return policy.version

    @torch.no_grad()
    def expected(self, policy: Policy) -> tuple[Policy, dict[str, Tensor]]:
        """Round the trainer's weights again, beside the copy; see `Publisher`."""
        buffers = dict(policy.lm.named_buffers())
        weights = {n: w if n in buffers else w.to(self._type) for n, w in self._held(policy)}
        return self._modules or policy, weights

    def _held(self, policy: Policy) -> Iterator[tuple[str, Tensor]]:
        """Yield what the engine holds, one by one, before it is rounded to the engine's type."""
        layouts = {} if self._bits is None else dict(quantized_weights(self.policy.lm))
        for name, value in merged_weights(policy.lm):
            if self._bits is not None and name in layouts:
                # Scales belong to outputs; the inputs are the last axis unless it is transposed.
                value = value.mT if layouts[name] else value
                value = fake_quantized(value, self._bits)
                value = value.mT if layouts[name] else value
            yield name, value
        # Buffers such as the rotary frequencies stay float32 in engines too.
        yield from policy.lm.named_buffers()

    def _plain(self, policy: Policy, lm: PreTrainedModel) -> Policy:
        """Make a policy of a model without adapters, which is not trained."""
        other = {"dtype": self._type, "checkpointing": False, "multiple": 1, "exact": False}
        return replace(policy, lm=lm.eval(), peft=None, **other)


def _with_parameters(lm: Any, values: Mapping[int, Tensor]) -> Any:
    """A copy of a model with other parameters, by the `id` of its own, of which none is copied."""
    others = {place: torch.nn.Parameter(value, False) for place, value in values.items()}
    return copy.deepcopy(lm, others)


@torch.no_grad()
def overwrite(policy: Policy, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights and buffers, by name, into a policy's own, which rounds them to their type."""
    tensors = policy.tensors
    for name, weight in weights:
        tensors[name].copy_(weight)


def without_weights(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's modules, whose parameters are empty."""
    return _with_parameters(lm, {id(p): p.new_empty(0) for p in lm.parameters()})


def fake_quantized(weight: Float[Tensor, "*R C"], bits: int) -> Float[Tensor, "*R C"]:
    """Symmetric round-to-nearest to `bits` bits and back: |w - q(w)| <= scale / 2.

    The largest magnitude of a channel (8 bits) or of a group of inputs (4 bits) is representable.

    >>> fake_quantized(torch.tensor([[7.0, 3.4, -0.6, 0.2]]), 4).tolist()
    [[7.0, 3.0, -1.0, 0.0]]
    """
    width = weight.shape[-1]
    size = width if bits == 8 else GROUP
    padded = functional.pad(weight.float(), (0, -width % size))
    grouped = padded.unflatten(-1, (-1, size))
    scale = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Not `scale > 0`: that would turn a NaN weight into a silent 0.
    steps = torch.where(scale == 0, 0.0, grouped / scale).round()
    return (steps * scale).flatten(-2)[..., :width].to(weight.dtype)


def quantized_weights(lm: PreTrainedModel) -> Iterator[tuple[str, bool]]:
    """Names of the weights that int8 and int4 round, and whether inputs are their first axis.

    Raises:
        ModelError: stacked experts without transformers' `is_transposed`: their inputs could be
            either axis.
    """
    head = lm.get_output_embeddings()
    for name, module in lm.named_modules():
        if isinstance(module, torch.nn.Linear):
            if module is not head and name.rpartition(".")[2] not in _ROUTERS:
                yield f"{name}.weight", False
        elif isinstance(module, Conv1D):
            yield f"{name}.weight", True
        elif "experts" in name.rpartition(".")[2]:
            stacked = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
            if stacked and not hasattr(module, "is_transposed"):
                raise ModelError(
                    f"{type(module).__name__} ({name}) doesn't declare the layout of its weights, "
                    "so int8 and int4 have no output channels to scale: use bfloat16"
                )
            yield from ((f"{name}.{weight}", bool(module.is_transposed)) for weight in stacked)
