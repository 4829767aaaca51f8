"""Checkpoints: everything that the next step depends on, written beside and renamed into place.

<step>/                 Hugging Face layout: loads with from_pretrained
    config.json, model.safetensors, tokenizer.json, ...   (LoRA: adapter_model.safetensors)
    optimizer.safetensors   AdamW's moments by parameter name, and torch's RNG state
    trainer.json            step, policy version, steered epsilon
    manifest.json           format, and size and SHA-256 of every other file; written last
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gspo.errors import CheckpointError, RunError
from gspo.policy.load import Policy, save_weights
from gspo.timing import timed
from gspo.train.trainer import Trainer

FORMAT = 1
_RNG = "rng.torch"


def checkpoint_name(step: int) -> str:
    """Folder name of a step.

    >>> checkpoint_name(7)
    '0007'
    """
    return f"{step:04d}"


def steps_saved(folder: Path) -> list[int]:
    """Steps that have a complete checkpoint below `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())


@timed("checkpoint")
def save_checkpoint(folder: Path, trainer: Trainer) -> Path:
    """Write `folder/<step>`; it exists whole or not at all.

    Raises:
        RunError: the disk is full or read-only. Earlier checkpoints are as they were.
    """
    target = folder / checkpoint_name(trainer.step)
    building = folder / f".{target.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        building.mkdir()
        _write(building, trainer)
        if target.exists():  # the same step saved again, after a resume
            shutil.rmtree(target)
        os.rename(building, target)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise RunError(
            f"cannot save step {trainer.step} to {target}: {why}. Free some space or choose "
            "another path; the checkpoints already there are intact"
        ) from None
    return target


def load_trainer_state(folder: Path, trainer: Trainer) -> None:
    """Optimizer, RNG, step and version of a checkpoint whose weights the policy already has."""
    tensors = load_file(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop(_RNG))
    trainer.optimizer.load_state(tensors)
    state = json.loads((folder / "trainer.json").read_text())
    trainer.step = state["step"]
    trainer.policy.version = state["policy_version"]
    trainer.epsilon.epsilon_low = state.get("epsilon_low")


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is missing, of another size, or of other content; or the
            checkpoint was written by a newer gspo.
    """
    remedy = f"delete {folder} to go on from the checkpoint before it"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            raise CheckpointError(
                f"{folder} has format {manifest['format']}, this gspo reads up to {FORMAT}: "
                "upgrade gspo"
            )
        files: dict[str, Any] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/manifest.json is damaged ({error}); {remedy}") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {remedy}")
        if path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: it differs from the manifest; {remedy}")


def _write(folder: Path, trainer: Trainer) -> None:
    policy: Policy = trainer.policy
    save_weights(policy, folder)
    tensors = {**trainer.optimizer.state(), _RNG: torch.get_rng_state()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "optimizer.safetensors")
    state = {
        "step": trainer.step,
        "policy_version": policy.version,
        "epsilon_low": trainer.epsilon.epsilon_low,
    }
    (folder / "trainer.json").write_text(json.dumps(state))
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "base_model": policy.source, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_unfinished(folder: Path) -> None:
    """What a killed process left behind. The run folder's lock keeps other writers out."""
    for path in folder.glob(".[0-9]*"):
        shutil.rmtree(path, ignore_errors=True)
