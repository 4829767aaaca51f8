"""`TrainConfig` and `TrainSFTConfig`: what ART's public training configurations have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gspo import absent
from gspo.core.options import LARGEST_COUNT, Options


class TrainConfig(Options):
    """What most users set for one call of `model.train`.

    >>> TrainConfig(learning_rate=1e-5).learning_rate
    1e-05
    """

    refused: ClassVar[Mapping[str, str]] = absent.of_options("TrainConfig")

    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Peak learning rate of AdamW. None: by the model's size, ten times as large for LoRA, with a
    warmup of 5 calls (docs/defaults.md)."""
    kl_penalty_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 KL term against the frozen base model; 0 computes no reference."""


class TrainSFTConfig(Options):
    """What one call of `model.train_sft` does with its trajectories.

    >>> TrainSFTConfig(batch_size=4, epochs=2).learning_rate
    """

    refused: ClassVar[Mapping[str, str]] = absent.of_options("TrainSFTConfig")

    learning_rate: (
        Annotated[float, Field(gt=0, le=1)] | list[Annotated[float, Field(gt=0, le=1)]] | None
    ) = None
    """Peak learning rate of AdamW, or one rate for each batch of the call. None: by the model's
    size, as in `TrainConfig`."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """`linear` rises over the first tenth of the call's batches and falls to 0 at its end."""
    batch_size: int = Field(default=8, ge=1, le=LARGEST_COUNT)
    """Trajectories of one optimizer step."""
    assistant_turns: Literal["all", "last"] = "all"
    """Whether the earlier answers of a conversation are trained on too, or are context."""
    epochs: int = Field(default=1, ge=1, le=LARGEST_COUNT)
    """Passes over the trajectories."""
    seed: int | None = None
    """Of the order of the trajectories, another one in each epoch. None: as they are given."""
