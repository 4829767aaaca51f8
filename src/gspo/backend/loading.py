"""A run's weights and its trainer, from a checkpoint or from the base model."""

from __future__ import annotations

import ctypes
import gc
import os
from functools import cache
from pathlib import Path

from gspo.core.errors import ModelError
from gspo.dev import InternalModelConfig
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.policy.workers import Workers
from gspo.train.checkpoint import load_trainer_state, understood, verify_checkpoint
from gspo.train.trainer import Trainer

_M_MMAP_THRESHOLD = -3  # as glibc's malloc.h numbers it


def load_step(base_model: str, config: InternalModelConfig, checkpoint: Path | None) -> Policy:
    """The weights of a checkpoint, to be sampled from; None: the base model's.

    Raises:
        ModelError: the base model cannot be loaded.
        CheckpointError: the checkpoint is damaged.
    """
    policy = _unrounded(base_model, config, checkpoint)
    policy.round_weights()
    return policy


def _unrounded(
    base_model: str,
    config: InternalModelConfig,
    checkpoint: Path | None,
    mesh: Workers | None = None,
) -> Policy:
    if checkpoint is None:
        policy = load_policy(base_model, config, mesh=mesh)
    else:
        verify_checkpoint(checkpoint)
        with understood(checkpoint, "the model"):
            policy = load_policy(base_model, config, checkpoint=checkpoint, mesh=mesh)
    choose_packing(policy)
    return policy


def load_trainer(
    base_model: str,
    config: InternalModelConfig,
    checkpoint: Path | None,
    mesh: Workers | None = None,
) -> Trainer:
    """Weights, optimizer and step of a checkpoint, or of the base model; see `load_policy`.

    Raises:
        ModelError: the base model cannot be loaded.
        CheckpointError: the checkpoint is damaged.
    """
    _prepare_process()
    policy = _unrounded(base_model, config, checkpoint, mesh)
    policy.workers.finish(policy.lm)

    def load_reference(name: str | None) -> Policy:
        if name is None:
            frozen = load_policy(base_model, config, mesh=mesh)
            frozen.packing, frozen.shares_prompts = policy.packing, policy.shares_prompts
            frozen.multiple = policy.multiple
        else:
            own = {"lora": None, "max_context": policy.context}
            try:
                frozen = load_policy(name, config.model_copy(update=own), mesh=mesh)
                choose_packing(frozen)
            except ModelError as error:
                raise ModelError(f"kl_reference, the teacher: {error}") from None
            if frozen.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
                raise ModelError(
                    f"kl_reference {name!r} has other tokens than {base_model!r}: it cannot score "
                    "what that samples. Give a model with the same tokenizer"
                )
        frozen.lm.requires_grad_(False)
        frozen.round_weights()
        policy.use_threads()  # those of the other model may be more
        return frozen

    trainer = Trainer(policy, load_reference)
    if checkpoint is not None:
        load_trainer_state(checkpoint, trainer)
    return trainer


@cache
def _prepare_process() -> None:
    """Settle, before the first model is loaded, how this process treats memory.

    Python's garbage collector does not search what torch and transformers made at import: 0.2 s
    each time, in the midst of training.

    glibc gives a tensor of 4 MiB or more back to the system when it is freed. Left alone it keeps
    some of up to 32 MiB for the next ones, in a pool of each thread that computes, with holes
    between them: a twentieth of all memory while long answers are trained, for no time that could
    be measured; from 1 MiB on it takes 5 to 8 % (docs/log.md, 2026-11-27). What the user has set
    stays.
    """
    gc.collect()
    gc.freeze()
    set_by_user = {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if os.name == "posix" and not set_by_user:  # other C libraries have no mallopt
        getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(_M_MMAP_THRESHOLD, 2**22)
