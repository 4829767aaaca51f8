"""The learning rate of a run that names none: by what is trained, and by the model's size.

docs/defaults.md has the table and the runs behind it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from gspo.dev import TrainConfig
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
is; at full rate they can undo what the model knew."""


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

    A learning rate of the user's stays as it is, and has no warmup that was not asked for.
    """
    if settings.learning_rate is not None:
        return settings
    options = settings.options
    if options.lr_warmup_steps is None:
        options = options.model_copy(update={"lr_warmup_steps": _warmup(options)})
    rate = default_learning_rate(base_parameters(policy), policy.peft is not None)
    return replace(settings, learning_rate=rate, options=options)


def base_parameters(policy: Policy) -> int:
    """Parameters of the base model, without adapters."""
    total = sum(p.numel() for p in policy.lm.parameters())
    return total - sum(p.numel() for p in policy.trainable.values()) if policy.peft else total


def _warmup(options: TrainConfig) -> int:
    """`WARMUP`, or less where the schedule ends before."""
    total = options.lr_total_steps
    return WARMUP if total is None else min(WARMUP, total - 1)
