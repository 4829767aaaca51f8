"""A trainer goes on where its checkpoint was written, or begins with the base model."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo import TrainConfig, dev
from gspo.backend.loading import load_step, load_trainer
from gspo.core.errors import CheckpointError, ModelError
from gspo.dev import InternalModelConfig
from gspo.policy.policy import Policy
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import Settings, resolve
from models import folder
from support import random_groups, save_checkpoint

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


class MallInfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns; `hblkhd` are the bytes that are mapped one by one."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES.split())


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2") or "MALLOC_MMAP_THRESHOLD_" in os.environ,
    reason="no glibc with mallinfo2, or its threshold is set",
)
def test_freed_tensors_go_back_to_the_system():
    """Left alone, glibc keeps the second tensor's memory, since it has seen one of that size."""
    load_trainer("embedded:sort", CONFIG, None)
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    megabytes = 2**20 // 4
    torch.zeros(30 * megabytes)
    before = mallinfo().hblkhd
    tensor = torch.zeros(16 * megabytes)
    assert mallinfo().hblkhd - before >= tensor.nbytes
    del tensor
    assert mallinfo().hblkhd == before


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    folder = save_checkpoint(tmp_path, load_trainer("embedded:sort", CONFIG, None))
    (folder / "model.safetensors").write_bytes(b"half")
    for load in (load_step, load_trainer):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load("embedded:sort", CONFIG, folder)


def flat_batch(policy: Policy) -> RolloutBatch:
    """Groups whose rewards are equal: the KL term is all that there is to learn from."""
    groups = random_groups(policy)
    for t in [t for group in groups for t in group]:
        t.reward = 1.0
    return prepare(groups, context=policy.context)


def against(name: str, **options: Any) -> Settings:
    options = {"minibatches": 1, "kl_reference": name} | options
    return resolve(TrainConfig(learning_rate=1e-3, kl_penalty_coef=1.0), dev.TrainConfig(**options))


def test_a_teacher_of_another_shape_is_what_the_kl_term_is_against(tmp_path: Path):
    teacher = folder(tmp_path, "llama", max_position_embeddings=512, vocab_size=128)
    trainer = load_trainer("embedded:sort", CONFIG, None)
    batch, threads = flat_batch(trainer.policy), torch.get_num_threads()
    lms = [trainer.policy.lm, AutoModelForCausalLM.from_pretrained(teacher).eval()]
    expected = []
    for (sample,) in batch.samples:
        tokens = torch.from_numpy(sample.tokens)[None]
        mask = torch.from_numpy(sample.ratio_mask)[1:]
        with torch.no_grad():
            student, other = (
                lm(input_ids=tokens).logits[0, :-1, : trainer.policy.entries].double() for lm in lms
            )
        q = (other.log_softmax(-1) - student.log_softmax(-1)).gather(-1, tokens[0, 1:, None])
        q = q.squeeze(-1)[mask]
        expected.append((q.exp() - q - 1).mean().item())
    found = trainer.train(batch, against(teacher)).metrics.compute()
    assert found["loss/kl"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert found["loss/policy"] == 0 and trainer.step == 1
    assert torch.get_num_threads() == threads
    again = trainer.train(batch, against(teacher)).metrics.compute()
    assert again["loss/kl"] < found["loss/kl"]
    own = trainer.train(batch, against("embedded:sort")).metrics.compute()
    assert own["loss/kl"] < again["loss/kl"] / 2


@pytest.mark.slow
def test_with_lora_a_teacher_is_a_model_of_its_own(tmp_path: Path):
    teacher = load_trainer("embedded:sort", CONFIG, None)
    with torch.no_grad():
        teacher.policy.head.weight.mul_(1.5)
    saved = str(save_checkpoint(tmp_path, teacher))
    trainer = load_trainer("embedded:sort", InternalModelConfig(lora=dev.LoraConfig(r=2)), None)
    batch = flat_batch(trainer.policy)
    found = [trainer.train(batch, against(n)).metrics.compute() for n in ("embedded:sort", saved)]
    assert found[0]["loss/kl"] == pytest.approx(0, abs=1e-9) and found[1]["loss/kl"] > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("none", "kl_reference, the teacher: unknown model"),
        ("tokens", "has other tokens than 'embedded:sort'.*Give a model with the same tokenizer"),
        ("context", "kl_reference, the teacher: max_context = 512, but .* has a context of 256"),
    ],
)
def test_a_teacher_that_cannot_score_the_tokens_is_refused(
    tmp_path: Path, change: str, message: str
):
    name = str(tmp_path / "teacher")
    if change != "none":
        context = 256 if change == "context" else 512
        folder(Path(name), "llama", max_position_embeddings=context, vocab_size=128)
    if change == "tokens":
        other = AutoTokenizer.from_pretrained(name)
        other.add_tokens(["another"])
        other.save_pretrained(name)
    trainer = load_trainer("embedded:sort", CONFIG, None)
    before = {n: p.detach().clone() for n, p in trainer.policy.trainable.items()}
    with pytest.raises(ModelError, match=message):
        trainer.train(flat_batch(trainer.policy), against(name))
    assert trainer.step == 0
    assert all(torch.equal(p, before[n]) for n, p in trainer.policy.trainable.items())
