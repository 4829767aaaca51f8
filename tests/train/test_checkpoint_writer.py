"""A large checkpoint is written from a copy, while training goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspo.core.errors import RunError
from gspo.train import checkpoint, checkpoint_writer
from gspo.train.checkpoint import steps_saved, verify_checkpoint
from gspo.train.checkpoint_writer import CheckpointWriter
from gspo.train.trainer import Trainer
from support import embedded


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(embedded(dtype="bfloat16"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Every checkpoint is large, and none is written until the second event is set."""
    begun, go_on = threading.Event(), threading.Event()
    write = checkpoint.write_tensors

    def held(*args):
        begun.set()
        assert go_on.wait(30)
        return write(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", held)
    monkeypatch.setattr(checkpoint_writer, "BACKGROUND_BYTES", 0)
    return begun, go_on


def test_what_is_written_is_what_was_when_it_was_asked_for(tmp_path: Path, trainer, slow):
    begun, go_on = slow
    writer, before = CheckpointWriter(), dict(trainer.optimizer.masters)
    before = {name: master.clone() for name, master in before.items()}
    target = writer.save(tmp_path, trainer)
    assert begun.wait(30) and not target.exists()
    writer.check()  # nothing is wrong, and it doesn't wait
    for master in trainer.optimizer.masters.values():  # a step
        master += 1
    trainer.policy.version += 1
    go_on.set()
    assert writer.wait() and not writer.wait()
    verify_checkpoint(target)
    saved = load_file(target / "model.safetensors")
    assert torch.equal(saved["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_one_is_in_flight(tmp_path: Path, trainer: Trainer, slow):
    _, go_on = slow
    writer = CheckpointWriter()
    writer.save(tmp_path, trainer)
    trainer.step += 1
    saving = threading.Thread(target=writer.save, args=(tmp_path, trainer))
    saving.start()
    saving.join(0.1)
    assert saving.is_alive() and steps_saved(tmp_path) == []
    go_on.set()
    saving.join(30)
    writer.wait()
    assert steps_saved(tmp_path) == [trainer.step - 1, trainer.step]


@pytest.mark.parametrize("call", ["check", "wait", "save"])
def test_an_error_is_raised_by_the_next_call_with_its_folder(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, call: str
):
    write, failures = checkpoint.write_tensors, [OSError(errno.ENOSPC, "full")]

    def full(*args):
        if failures:
            raise failures.pop()
        return write(*args)

    monkeypatch.setattr(checkpoint_writer, "BACKGROUND_BYTES", 0)
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    writer = CheckpointWriter()
    target = writer.save(tmp_path, trainer)
    assert writer._last is not None and wait([writer._last[1]], 30).done
    trainer.step += 1
    with pytest.raises(RunError, match=f"{target.name}: the disk is full"):
        writer.save(tmp_path, trainer) if call == "save" else getattr(writer, call)()
    writer.wait()  # it was said
    assert steps_saved(tmp_path) == ([trainer.step] if call == "save" else [])


def test_a_disk_that_hangs_is_named(tmp_path: Path, trainer: Trainer, slow, monkeypatch):
    _, go_on = slow
    monkeypatch.setattr(checkpoint_writer, "LIMIT", 0.05)
    writer = CheckpointWriter()
    target = writer.save(tmp_path, trainer)
    with pytest.raises(RunError, match=f"{target} is not written after 0 s"):
        writer.wait()
    monkeypatch.setattr(checkpoint_writer, "LIMIT", 30.0)
    go_on.set()
    assert writer.wait()


KILLED = """
import asyncio, os, signal, sys, gspo as art
from gspo.train import checkpoint, checkpoint_writer
from support import random_groups

checkpoint_writer.BACKGROUND_BYTES = 0
stop, write = int(sys.argv[2]), checkpoint.write_tensors

async def main():
    async with art.LocalBackend(sys.argv[1]) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="embedded:sort",
            _internal_config=art.dev.InternalModelConfig(dtype="bfloat16", threads=1, exact=False))
        await model.register(backend)
        policy = backend._service(model).trainer.policy
        for step in range(await model.get_step(), 3):
            if step + 1 == stop:  # in the midst of its last file
                def dying(path, tensors):
                    write(path, tensors)
                    if path.name == "model.safetensors":
                        os.kill(os.getpid(), signal.SIGKILL)
                    return {}
                checkpoint.write_tensors = dying
            groups = random_groups(policy, seed=step)
            await model.train(groups, config=art.TrainConfig(learning_rate=1e-3))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_resumes_to_the_bit(tmp_path: Path):
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])

    def run(folder: str, stop: int) -> int:
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), str(stop)]
        return subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, timeout=300
        ).returncode

    assert run("straight", 0) == 0
    assert run("killed", 2) == -signal.SIGKILL
    folders = [tmp_path / name / "p" / "m" / "checkpoints" for name in ("straight", "killed")]
    assert steps_saved(folders[1]) == [1]
    assert run("killed", 0) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = ((folder / "0003" / name).read_bytes() for folder in folders)
        assert one == two
    assert not list(folders[1].glob(".*"))
