from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo import dev
from gspo.config import TrainConfig
from gspo.dev import InternalModelConfig
from gspo.errors import CheckpointError, RunError
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.train import checkpoint
from gspo.train.checkpoint import (
    load_trainer_state,
    save_checkpoint,
    steps_saved,
    verify_checkpoint,
)
from gspo.train.rollouts import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from support import embedded, random_groups

SETTINGS = resolve(TrainConfig(learning_rate=1e-3))


def trained(steps: int = 1, **config) -> Trainer:
    trainer = Trainer(embedded(**config))
    for step in range(steps):
        groups = random_groups(trainer.policy, seed=step)
        trainer.train(prepare(groups, context=512), SETTINGS)
    return trainer


@pytest.mark.parametrize("lora", [None, dev.LoraConfig(r=2)])
def test_a_resumed_trainer_ends_in_the_same_weights_bit_for_bit(tmp_path: Path, lora):
    straight = trained(3, lora=lora)
    half = trained(1, lora=lora)
    folder = save_checkpoint(tmp_path, half)
    verify_checkpoint(folder)
    config = InternalModelConfig(lora=lora)
    resumed = Trainer(load_policy("embedded:sort", config, checkpoint=folder))
    choose_packing(resumed.policy)  # as a backend does
    load_trainer_state(folder, resumed)
    assert (resumed.step, resumed.policy.version) == (1, 1)
    for step in (1, 2):
        groups = random_groups(resumed.policy, seed=step)
        resumed.train(prepare(groups, context=512), SETTINGS)
    assert list(resumed.policy.trainable) == list(straight.policy.trainable)
    for name, parameter in straight.policy.trainable.items():
        assert torch.equal(parameter, resumed.policy.trainable[name]), name


def test_a_checkpoint_is_an_ordinary_hugging_face_folder(tmp_path: Path):
    trainer = trained()
    folder = save_checkpoint(tmp_path, trainer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(6, 16)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, trainer.policy.lm(tokens).logits)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


def test_damage_is_named_with_the_remedy(tmp_path: Path):
    folder = save_checkpoint(tmp_path, trained())
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*delete"):
        verify_checkpoint(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify_checkpoint(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify_checkpoint(folder)


def test_a_newer_format_is_refused(tmp_path: Path):
    folder = save_checkpoint(tmp_path, trained())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="upgrade gspo"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("when", ["save_weights", "save_file"])
def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path: Path, monkeypatch, when: str):
    trainer = trained()
    save_checkpoint(tmp_path, trainer)
    trainer.step += 1

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, when, full)
    with pytest.raises(RunError, match="the disk is full"):
        save_checkpoint(tmp_path, trainer)
    assert steps_saved(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path):
    (tmp_path / ".0001.4711").mkdir()
    (tmp_path / ".0001.4711" / "half").write_text("x")
    save_checkpoint(tmp_path, trained())
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]
