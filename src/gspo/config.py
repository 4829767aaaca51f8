"""`TrainConfig`: the two numbers that ART's public training configuration has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from gspo.core.options import Options


class TrainConfig(Options):
    """What most users set for one call of `model.train`.

    >>> TrainConfig(learning_rate=1e-5).learning_rate
    1e-05
    """

    refused: ClassVar[Mapping[str, str]] = {
        "batch_size": "a batch is what one call of train is given; dev.TrainConfig(minibatches=) "
        "says into how many optimizer steps it is divided.",
    }

    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Peak learning rate of AdamW. None: by the model's size, ten times as large for LoRA, with a
    warmup of 5 calls (docs/defaults.md)."""
    kl_penalty_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 KL term against the frozen base model; 0 computes no reference."""
