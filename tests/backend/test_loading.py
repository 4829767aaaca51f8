"""A trainer goes on where its checkpoint was written, or begins with the base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gspo.backend.loading import load_step, load_trainer
from gspo.core.errors import CheckpointError
from gspo.dev import InternalModelConfig
from gspo.train.checkpoint import save_checkpoint

CONFIG = InternalModelConfig()


def test_from_the_base_model_and_from_a_checkpoint(tmp_path: Path):
    trainer = load_trainer("embedded:sort", CONFIG, None)
    assert trainer.step == 0
    with torch.no_grad():
        next(iter(trainer.policy.trainable.values())).add_(1.0)
    trainer.step, trainer.policy.version = 3, 5
    folder = save_checkpoint(tmp_path, trainer)
    again = load_trainer("embedded:sort", CONFIG, folder)
    assert (again.step, again.policy.version) == (3, 5)
    weights = again.policy.trainable
    for name, weight in trainer.policy.trainable.items():
        assert torch.equal(weights[name], weight)
    assert again.policy.packing == trainer.policy.packing  # chosen, not the default


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    folder = save_checkpoint(tmp_path, load_trainer("embedded:sort", CONFIG, None))
    (folder / "model.safetensors").write_bytes(b"half")
    for load in (load_step, load_trainer):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load("embedded:sort", CONFIG, folder)
