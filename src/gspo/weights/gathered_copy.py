"""An unsharded copy of weights that several ranks hold a part of each, for the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gspo.kernels.sharded import full, reshard
from gspo.policy.policy import Policy
from gspo.weights.rollout_copy import overwrite, without_weights


@torch.no_grad()
def whole_weights(policy: Policy, frozen: bool) -> dict[str, Tensor]:
    """The whole weights by name, on the first rank; {} on the others. All ranks call it together.

    Args:
        policy: sharded.
        frozen: also those that are not trained.
    """
    reshard(policy.lm)
    named = dict(policy.lm.named_parameters()) if frozen else policy.trainable
    whole = ((name, full(weight).detach()) for name, weight in named.items())
    return {name: weight for name, weight in whole if policy.workers.rank == 0}


class GatheredCopy:
    """The copy, and its publisher (see `Publisher`). Its weights are rounded as FSDP rounds them.

    Args:
        policy: of the same model, loaded whole; it is written over.
        gather: `whole_weights` of the trainer's policy, called on every rank.
    """

    tolerance = 0.0

    def __init__(self, policy: Policy, gather: Callable[[bool], Mapping[str, Tensor]]):
        self.policy, self._gather, self._trained = policy, gather, set(policy.trainable)
        policy.lm.requires_grad_(False)
        self._modules = replace(policy, lm=without_weights(policy.lm))
        overwrite(policy, gather(True).items())
        self._hashes = self._frozen_hashes()

    def publish(self, policy: Policy) -> int:
        overwrite(self.policy, self._gather(False).items())
        self.policy.version = policy.version
        return policy.version

    def expected(self, policy: Policy) -> tuple[Policy, Mapping[str, Tensor]]:
        """In modules that the engine doesn't have. Frozen weights are gathered only if the copy's
        are others than at first."""
        types = {name: tensor.dtype for name, tensor in self._modules.tensors.items()}
        changed = self._frozen_hashes() != self._hashes
        whole = {n: w.to(types[n]) for n, w in self._gather(changed).items()}
        return self._modules, self.policy.tensors | dict(policy.lm.named_buffers()) | whole

    def _frozen_hashes(self) -> dict[str, list[int]]:
        """A number for each row of the weights that are not trained."""
        named = self.policy.lm.named_parameters()
        return {n: torch.hash_tensor(w, -1).tolist() for n, w in named if n not in self._trained}
