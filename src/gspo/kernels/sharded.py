"""Calls of a model whose weights are divided among several processes (FSDP2)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gspo.core.errors import ModelError

# That an exchange along two dimensions takes two steps: nothing that a user could mend.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
_state_of: Any = fully_shard.state  # pyright: ignore[reportFunctionMemberAccess]


def begin_sharded(lm: PreTrainedModel) -> None:
    """Call a sharded model once as a whole: FSDP wants that before any part of it is called.

    FSDP then has two entries for a weight that embedding and head share, and where the vocabulary
    is no multiple of the ranks, each entry has padded rows of its own: the optimizer would move one
    of them. They get the same rows here.
    """
    with torch.no_grad():
        lm(input_ids=torch.ones(1, 2, dtype=torch.long, device=lm.device), use_cache=False)
    reshard(lm)
    states = {_state_of(m): None for m in lm.modules() if isinstance(m, FSDPModule)}
    try:
        groups = chain.from_iterable(state._fsdp_param_groups for state in states)
        entries: list[Any] = [entry for group in groups for entry in group.fsdp_params]
    except AttributeError as error:  # without this a tied head drifts from the second step on
        raise ModelError(
            f"torch {torch.__version__} keeps sharded weights in another way than torch 2.13, "
            f"which several processes need: {error}"
        ) from error
    rows = {e._sharded_param_data.untyped_storage().data_ptr(): e for e in entries}
    for entry in entries:
        seen = entry.sharded_param._local_tensor.untyped_storage().data_ptr()
        entry._sharded_param_data = rows[seen]._sharded_param_data


def inside_forward(lm: PreTrainedModel, run: Callable[[], Any]) -> Any:
    """Call `run` as if it were the model's forward pass: around it FSDP gathers the weights that
    belong to no layer, such as a tied output head's. A part of the model alone would lack them."""
    lm.forward = run
    try:
        return lm()
    finally:
        del lm.forward


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that several processes hold a part of each; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_host(
    tensors: Mapping[str, Tensor], *, copied: bool, whole: bool = False, receiver: bool = True
) -> dict[str, Tensor]:
    """Tensors in host memory; tied ones stay tied.

    Args:
        copied: those that are there already, too.
        whole: all of each, not this process's part; all processes call it together.
        receiver: whether this process gets the numbers; if not, the tensors are empty.
    """
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copies:
            own = full(tensor) if whole else tensor
            own = own if receiver else own.new_empty(0)
            copies[id(tensor)] = own.detach().to("cpu", copy=copied)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def reshard(lm: torch.nn.Module) -> None:
    """Free what was gathered of a sharded model's weights: each parameter is this rank's part."""
    for module in lm.modules():
        if isinstance(module, FSDPModule):
            # Not `module.reshard()`: after a call of the backbone alone it leaves norm and head
            # gathered, and LoRA would freeze what is gathered and train this rank's part.
            for group in _state_of(module)._fsdp_param_groups:
                group._to_sharded()
