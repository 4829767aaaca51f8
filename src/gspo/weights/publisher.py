"""How new weights reach an engine.

Another way is another class with this protocol, in its own file, and a line in `publisher_for`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from gspo.dev import RolloutDtype
from gspo.policy.load import Policy
from gspo.weights.rollout_copy import RoundedCopy


class Publisher(Protocol):
    """Brings the trainer's weights to one engine, and says what that must compute then.

    Attributes:
        tolerance: nats by which the engine's log-probs may differ from `expected`'s on a CPU. 0: it
            computes the same in the same way. A publisher to an engine that computes otherwise
            measures it when the model is loaded.
    """

    tolerance: float

    def publish(self, policy: Policy) -> int:
        """Give the engine the weights of `policy`; returns their version.

        Called after each call of `Trainer.train`, even if that raised: minibatches before the
        failure have moved the weights. Called in the thread that computes, so that the engine
        samples nothing meanwhile.

        Before: the engine answers with the weights, and as the version, of the last publication
            (or of the load). The new weights are in `policy`, and `policy.version` counts them.
        After: each token that the engine samples is drawn under the new weights, and
            `Engine.policy_version` is the returned version, which is `policy.version`. A
            receipt proves it (`gspo.weights.receipt`) before anything is sampled.
        Again: a second call with the same weights changes nothing.
        Failure: whatever is raised ends the call of `train` before its checkpoint is written. The
            engine may hold a mixture then; a run that is started again trains that step again.

        Args:
            policy: the trainer's, which is only read.
        """
        ...

    def expected(self, policy: Policy) -> tuple[Policy, Mapping[str, Tensor]]:
        """What the engine must compute with after a publication, made from the trainer's weights.

        Returns:
            A policy whose scores the engine must reproduce, and the weights and buffers that must
            replace the policy's for that, which are those that the engine must hold. Empty: none.
        """
        ...


class SharedMemory:
    """Publishes by doing nothing: the engine samples from the trainer's own module."""

    tolerance = 0.0

    def publish(self, policy: Policy) -> int:
        return policy.version

    def expected(self, policy: Policy) -> tuple[Policy, Mapping[str, Tensor]]:
        return policy, {}


def publisher_for(policy: Policy, rollout_dtype: RolloutDtype | None) -> tuple[Policy, Publisher]:
    """Return what an engine in this process samples from, and how it gets new weights.

    Args:
        policy: the trainer's.
        rollout_dtype: precision of the engine; None: the trainer's own weights.

    Raises:
        ModelError: see `RoundedCopy`.
    """
    if rollout_dtype is None:
        return policy, SharedMemory()
    copy = RoundedCopy(policy, rollout_dtype)
    return copy.policy, copy
