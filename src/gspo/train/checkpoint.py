"""Checkpoints: everything that the next step depends on, written beside and renamed into place.

<step>/                 Hugging Face layout: loads with from_pretrained
    config.json, model.safetensors, tokenizer.json, ...   (LoRA: adapter_model.safetensors)
    optimizer.safetensors   AdamW's moments by parameter name; of several ranks, optimizer/ with
                            a file of each (torch.distributed.checkpoint), for any number of ranks
    trainer.json            step, policy version, steered epsilon
    manifest.json           format, and size and SHA-256 of each other file; written last
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import hf_storage, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from gspo.core.errors import CheckpointError, GspoError, RunError
from gspo.core.files import explained, replacing, strict_json
from gspo.kernels import hf
from gspo.kernels.sharded import on_host
from gspo.policy.load import save_weights, weights_to_store
from gspo.policy.workers import Workers
from gspo.train.tensor_file import Proof, proof_of, write_tensors
from gspo.train.trainer import Trainer

FORMAT = 1
_WEIGHTS = "model.safetensors"
_OPTIMIZER, _SHARDS, _STATE = "optimizer.safetensors", "optimizer", "trainer.json"
TRAINING_FILES = (_OPTIMIZER, _SHARDS, _STATE, "manifest.json")
"""Files of a checkpoint that only training reads."""


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step.

    >>> checkpoint_name(7)
    '0007'
    """
    return f"{step:04d}"


def steps_saved(folder: Path) -> list[int]:
    """Steps that have a complete checkpoint below `folder`, ascending.

    Folders with other names, and files, are not gspo's; they are ignored.
    """
    names = [p.name for p in folder.glob("*") if p.is_dir() and p.name.isdecimal()]
    return sorted(int(name) for name in names if name == checkpoint_name(int(name)))


def begin_checkpoint(
    folder: Path, trainer: Trainer, *, copied: bool
) -> tuple[Path, Callable[[], None]]:
    """Where the checkpoint of what is now will be, and what writes it there. All ranks call this
    together, and each calls what writes, in whichever thread.

    Args:
        copied: to host memory, so that training may go on before it is written.
    """
    policy, workers = trainer.policy, trainer.policy.workers
    first, target = workers.rank == 0, folder / checkpoint_name(trainer.step)

    stored = weights_to_store(policy, trainer.optimizer.masters)
    weights = on_host(stored, copied=copied, whole=True, receiver=first)
    moments = on_host(trainer.optimizer.state(), copied=copied)
    epsilon = trainer.epsilon.epsilon_low
    state = {"step": trainer.step, "policy_version": policy.version, "epsilon_low": epsilon}
    with ExitStack() as begun:
        building = _begun(begun, target, workers)
        finish = begun.pop_all()

    def write() -> None:
        with finish:
            proofs = {}
            if workers.size > 1 and moments:  # a run whose steps were all skipped has none yet
                _write_shards(building / _SHARDS, moments, workers.checkpoint_group)
            elif first:
                proofs[_OPTIMIZER] = write_tensors(building / _OPTIMIZER, moments)
            if not first:
                return
            save_weights(policy, building, weights if policy.peft else {})
            if policy.peft is None:
                stored = hf.stored_tensors(policy.lm, weights)
                proofs[_WEIGHTS] = write_tensors(building / _WEIGHTS, stored)
            _finish(building, state, policy.source, proofs)

    return target, write


def _begun(begun: ExitStack, target: Path, workers: Workers) -> Path:
    """Where the first rank builds the checkpoint. What it cannot do is raised on all ranks, so that
    none waits for it."""
    building, failed = target, None
    try:
        if workers.rank == 0:
            building = begun.enter_context(replacing(target))
            with explained(target):
                building.mkdir(parents=True)
    except RunError as error:
        failed = error
    building, failed = workers.share((building, failed))
    if failed is not None:
        raise failed
    return building


def load_trainer_state(folder: Path, trainer: Trainer) -> None:
    """Optimizer, step and version of a checkpoint whose weights the policy already has.

    Raises:
        CheckpointError: the files hold something else, or another step than the folder's name.
    """
    with understood(folder, "its training state"):
        whole = (folder / _OPTIMIZER).exists()
        if whole and trainer.policy.workers.size == 1:
            tensors = load_file(folder / _OPTIMIZER)
            tensors.pop("rng.torch", None)  # torch's own generator, which nothing here draws from
        else:
            tensors = _read_shards(folder if whole else folder / _SHARDS, trainer)
        trainer.optimizer.load_state(tensors)
        state = json.loads((folder / _STATE).read_bytes())
        step, version, epsilon = state["step"], state["policy_version"], state.get("epsilon_low")
        if type(step) is not int or type(version) is not int:
            raise TypeError(f"step {step!r}, policy_version {version!r}")
    if checkpoint_name(step) != folder.name:
        raise CheckpointError(
            f"{folder} holds step {step}, so it was copied or renamed; {_remedy(folder)}"
        )
    trainer.step = step
    trainer.policy.version = version
    trainer.epsilon.epsilon_low = epsilon


def saved_version(folder: Path) -> int:
    """The policy version of a checkpoint's weights."""
    with understood(folder, "its training state"):
        return int(json.loads((folder / _STATE).read_bytes())["policy_version"])


def verify_checkpoint(folder: Path) -> None:
    """Compare each file with the manifest.

    Raises:
        CheckpointError: a file is missing, of another size, or of other content; or the
            checkpoint was written by a newer gspo.
    """
    with understood(folder, "manifest.json"):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        written, files = manifest["format"], manifest["files"]
        newer = written > FORMAT
        tensors = [n for n in files if n.endswith(".safetensors")]
        moments = [n for n in tensors if n == _OPTIMIZER or n.startswith(f"{_SHARDS}/")]
        if len(tensors) == len(moments) or not moments or _STATE not in files:
            raise ValueError(f"it lists no weights, no {_OPTIMIZER} or no {_STATE}")
    if newer:
        raise CheckpointError(
            f"{folder} has format {written}, this gspo reads up to {FORMAT}: upgrade gspo"
        )
    for path, proof in ((folder / name, proof) for name, proof in files.items()):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {_remedy(folder)}")
        if proof_of(path) != proof:
            raise CheckpointError(f"{path} is damaged: the manifest differs; {_remedy(folder)}")


@contextmanager
def understood(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever is raised while `what` of a checkpoint is read into a `CheckpointError`.

    Raises:
        CheckpointError: with the remedy.
    """
    try:
        yield
    except GspoError:
        raise
    except (Exception, CheckpointException) as error:  # each library has errors of its own
        raise CheckpointError(
            f"{folder}: {what} is damaged ({type(error).__name__}: {error}); {_remedy(folder)}"
        ) from error


def _remedy(folder: Path) -> str:
    return f"delete {folder} to go on from the checkpoint before it"


def _finish(
    folder: Path, state: Mapping[str, Any], base_model: str, proofs: Mapping[str, Proof]
) -> None:
    """Write the state, and the manifest of all files; `proofs` are known already."""
    (folder / _STATE).write_text(strict_json(state))
    names = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: proofs.get(name) or proof_of(path) for name, path in names.items()}
    manifest = {"format": FORMAT, "base_model": base_model, "files": files}
    (folder / "manifest.json").write_text(strict_json(manifest, indent=1))


def _write_shards(folder: Path, moments: Mapping[str, Tensor], group: Any) -> None:
    """Write this rank's part, in a group of ranks of its own: others may train meanwhile.

    Raises:
        RunError: it could not be written on a rank, which is named; on all ranks alike.
    """
    writer = hf_storage.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        state_dict_saver.save(dict(moments), storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        told = "; ".join(f"rank {rank}: {error[0]}" for rank, error in failed.failures.items())
        remedy = "Free some space there, or give all ranks a folder that they can write"
        raise RunError(f"cannot write {folder}: {told}. {remedy}") from None
    except RuntimeError as error:
        raise RunError(
            f"cannot write {folder}: a rank has ended or hangs ({error}); start the command again"
        ) from None


def _read_shards(folder: Path, trainer: Trainer) -> dict[str, Tensor]:
    """This rank's part of the optimizer's state, by whatever number of ranks it was written."""
    reader = hf_storage.HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {n: t for n, t in trainer.optimizer.empty_state().items() if n in stored}
    alone = trainer.policy.workers.size == 1
    with warnings.catch_warnings():  # that one process reads what several ranks wrote
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=alone)
    return tensors
