from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo import dev
from gspo.config import TrainConfig
from gspo.core.errors import CheckpointError, RunError
from gspo.dev import InternalModelConfig
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.train import checkpoint
from gspo.train.checkpoint import (
    load_trainer_state,
    steps_saved,
    verify_checkpoint,
)
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from gspo.weights.rollout_copy import RoundedCopy
from support import embedded, random_groups, save_checkpoint

SETTINGS = resolve(TrainConfig(learning_rate=1e-3))


def trained(steps: int = 1, **config) -> Trainer:
    trainer = Trainer(embedded(**config))
    for step in range(steps):
        groups = random_groups(trainer.policy, seed=step)
        trainer.train(prepare(groups, context=512), SETTINGS)
    return trainer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, dev.LoraConfig(r=2)])
def test_a_resumed_trainer_ends_in_the_same_weights_bit_for_bit(tmp_path: Path, lora, dtype):
    straight = trained(3, lora=lora, dtype=dtype)
    half = trained(1, lora=lora, dtype=dtype)
    folder = save_checkpoint(tmp_path, half)
    verify_checkpoint(folder)
    config = InternalModelConfig(lora=lora, dtype=dtype)
    policy = load_policy("embedded:sort", config, checkpoint=folder)
    choose_packing(policy)  # as a backend does
    resumed = Trainer(policy)
    load_trainer_state(folder, resumed)
    assert (resumed.step, resumed.policy.version) == (1, 1)
    for step in (1, 2):
        groups = random_groups(resumed.policy, seed=step)
        resumed.train(prepare(groups, context=512), SETTINGS)
    assert list(resumed.policy.trainable) == list(straight.policy.trainable)
    for name, parameter in straight.policy.trainable.items():
        assert torch.equal(parameter, resumed.policy.trainable[name]), name
    masters = straight.optimizer.masters
    assert list(masters) == (list(straight.policy.trainable) if dtype == "bfloat16" else [])
    for name, master in masters.items():
        assert torch.equal(master, resumed.optimizer.masters[name]), name


def test_a_checkpoint_of_rounded_weights_holds_the_float32_ones(tmp_path: Path):
    trainer = trained(dtype="bfloat16")
    masters, weights = trainer.optimizer.masters, dict(trainer.policy.lm.named_parameters())
    folder = save_checkpoint(tmp_path, trainer)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, masters[name])
        assert torch.equal(weight.bfloat16(), weights[name])
    assert any((m != m.bfloat16().float()).any() for m in masters.values())
    # What is published are the rounded weights: nothing rounds them again.
    for name, weight in RoundedCopy(trainer.policy, "bfloat16").policy.lm.named_parameters():
        assert torch.equal(weight, weights[name])


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


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\ud800", '{"format": 1}', '{"format": "1", "files": {}}']
    + [json.dumps({"format": 1, "files": f}) for f in ([], None, {}, {"a": 1}, {"model.bin": {}})],
)
def test_a_manifest_that_proves_nothing_is_refused(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged.*; delete"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "state",
    ["", "[]", "null", '{"step": 1}', '{"step": "1", "policy_version": 1}'],
)
def test_a_training_state_of_another_kind_is_named(tmp_path: Path, state: str):
    trainer = trained()
    folder = save_checkpoint(tmp_path, trainer)
    (folder / "trainer.json").write_text(state)
    with pytest.raises(CheckpointError, match=r"0001: its training state is damaged.*; delete"):
        load_trainer_state(folder, trainer)
    (folder / "optimizer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"0001: its training state is damaged.*; delete"):
        load_trainer_state(folder, trainer)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path):
    trainer = trained()
    folder = save_checkpoint(tmp_path, trainer).rename(tmp_path / "0009")
    with pytest.raises(CheckpointError, match=r"0009 holds step 1, so it was copied or renamed"):
        load_trainer_state(folder, trainer)


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path: Path):
    for name in ("0001", "0010", "10000", "²", "12", "00020", "0003.old", ".0004.1.tmp", "-001"):
        (tmp_path / name).mkdir()
    (tmp_path / "0002").touch()
    (tmp_path / "0005").symlink_to(tmp_path / "0001")
    assert steps_saved(tmp_path) == [1, 5, 10, 10000]


def test_a_newer_format_is_refused(tmp_path: Path):
    folder = save_checkpoint(tmp_path, trained())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="upgrade gspo"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
@pytest.mark.parametrize("when", ["save_weights", "write_tensors"])
def test_a_full_disk_leaves_the_checkpoints_before_it(
    tmp_path: Path, monkeypatch, when: str, error: Exception
):
    trainer = trained()
    save_checkpoint(tmp_path, trainer)
    trainer.step += 1

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint, when, full)
    with pytest.raises(RunError, match="the disk is full"):
        save_checkpoint(tmp_path, trainer)
    assert steps_saved(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path: Path):
    trainer = trained()
    for _ in range(2):
        folder = save_checkpoint(tmp_path, trainer)
        (folder / "of the first").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]
    folder = save_checkpoint(tmp_path, trainer)
    assert not (folder / "of the first").exists()


def test_a_steered_clip_range_goes_on_where_it_was(tmp_path: Path):
    trainer = trained()
    trainer.epsilon.epsilon_low = 0.0123
    save_checkpoint(tmp_path, trainer)
    again = Trainer(trainer.policy)
    load_trainer_state(tmp_path / "0001", again)
    assert again.epsilon.epsilon_low == 0.0123


def test_ranks_whose_steps_were_all_skipped_write_a_whole_checkpoint(tmp_path: Path):
    """AdamW has no moments yet, so there is nothing that ranks could write a part of."""
    trainer = Trainer(embedded())
    trainer.policy.workers.size = 2
    folder = save_checkpoint(tmp_path, trainer)
    verify_checkpoint(folder)
    trainer.policy.workers.size = 1
    load_trainer_state(folder, trainer)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            CheckpointException("", {1: (OSError(errno.ENOSPC, "No space left"), None)}),  # pyright: ignore[reportArgumentType]
            r"optimizer: rank 1: .*No space left\. Free some space there",
        ),
        (RuntimeError("Connection closed"), r"a rank has ended or hangs .*start the command again"),
    ],
)
def test_what_a_rank_could_not_write_is_said(
    error: BaseException, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def save(*args, **options):
        raise error

    monkeypatch.setattr(checkpoint.state_dict_saver, "save", save)
    with pytest.raises(RunError, match=said):
        checkpoint._write_shards(tmp_path / "optimizer", {}, None)


def test_one_process_reads_what_ranks_wrote_without_a_warning(tmp_path: Path):
    """torch warns that it assumes a single process, which is what is meant."""
    trainer = Trainer(embedded())
    moments = {n: torch.rand_like(t) for n, t in trainer.optimizer.empty_state().items()}
    with warnings.catch_warnings(action="ignore"):
        checkpoint._write_shards(tmp_path, moments, None)
    with warnings.catch_warnings(action="error"):
        read = checkpoint._read_shards(tmp_path, trainer)
    assert read.keys() == moments.keys() and all(torch.equal(read[n], moments[n]) for n in read)
