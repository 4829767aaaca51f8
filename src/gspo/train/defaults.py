"""The learning rate of a run that names none: by what is trained, and by the model's size.

docs/defaults.md has the table and the runs behind it.
"""

from __future__ import annotations

import math

from gspo.policy.policy import Policy
from gspo.train.settings import Settings

FULL = 0.072
"""Full fine-tuning takes FULL / sqrt(parameters): Adam's best rate falls as 1 / width, and the
parameters of a layer grow as width squared."""
LARGEST = 1.5e-4
"""Even a smaller model gets no more than this."""
LORA = 10
"""Adapters take this many times the rate of full fine-tuning."""
WARMUP = 5
"""Calls of `train`. AdamW's first steps have the size of the learning rate whatever the gradient
is; at the full rate they can undo what the model has learned."""


def default_learning_rate(parameters: int, lora: bool) -> float:
    """The peak learning rate for a base model of so many parameters, to two digits.

    >>> default_learning_rate(229_184, False), default_learning_rate(600_000_000, False)
    (0.00015, 2.9e-06)
    >>> default_learning_rate(600_000_000, True)
    2.9e-05
    """
    full = min(LARGEST, FULL / math.sqrt(parameters))
    return float(f"{full * (LORA if lora else 1):.1e}")


def with_defaults(settings: Settings, policy: Policy) -> Settings:
    """The settings with the learning rate and the warmup that apply to `policy`.

    The user's learning rate stays as it is, without a warmup that was not asked for.
    """
    if settings.learning_rate is not None:
        return settings
    rate = default_learning_rate(base_parameters(policy), policy.peft is not None)
    warmup = settings.lr_warmup_steps
    if warmup is None:
        total = settings.lr_total_steps
        warmup = WARMUP if total is None else min(WARMUP, total - 1)
    return settings.model_copy(update={"learning_rate": rate, "lr_warmup_steps": warmup})


def base_parameters(policy: Policy) -> int:
    """Parameters of the base model, without adapters."""
    total = sum(p.numel() for p in policy.lm.parameters())
    return total - sum(p.numel() for p in policy.trainable.values()) if policy.peft else total
