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
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gspo.core.errors import ModelError
from gspo.dev import RolloutDtype
from gspo.kernels.hf import Conv1D
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
            never trained. Its `compute_dtype` is float32 whatever the precision, which means: no
            autocast over the copy's own types.

    Raises:
        ModelError: int8 or int4 of experts whose layout transformers doesn't declare.
    """

    def __init__(self, policy: Policy, dtype: RolloutDtype):
        lm = copy.deepcopy(policy.lm) if policy.peft is None else _merged(policy)
        lm_dtype = torch.float32 if dtype in _BITS else getattr(torch, dtype)
        lm.requires_grad_(False).zero_grad()
        for parameter in lm.parameters():
            # Parameters only: buffers such as the rotary frequencies stay float32 in engines too.
            parameter.data = parameter.data.to(lm_dtype)
        self.policy = replace(
            policy, lm=lm.eval(), peft=None, compute_dtype=torch.float32, checkpointing=False
        )
        self._bits = _BITS.get(dtype, 8)
        self._transposed = dict(quantized_weights(lm)) if dtype in _BITS else {}
        self.publish(policy)

    @torch.no_grad()
    def publish(self, policy: Policy) -> int:
        """Round the trainer's weights again, in place; see `Publisher`."""
        source = _merged(policy)
        values = dict(chain(source.named_parameters(), source.named_buffers()))
        lm = self.policy.lm
        for name, tensor in chain(lm.named_parameters(), lm.named_buffers()):
            value = values[name]
            if name in self._transposed:
                # Scales belong to outputs; the inputs are the last axis unless it is transposed.
                transposed = self._transposed[name]
                value = fake_quantized(value.mT if transposed else value, self._bits)
                value = value.mT if transposed else value
            tensor.copy_(value)
        self.policy.version = policy.version
        return policy.version


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


def _merged(policy: Policy) -> PreTrainedModel:
    """Return the model without adapters: the policy's model, or a copy with its adapters merged."""
    if policy.peft is None:
        return policy.lm
    return copy.deepcopy(policy.peft).merge_and_unload()
