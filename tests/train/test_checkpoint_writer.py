"""A large checkpoint is written from a copy, while training goes on."""

from __future__ import annotations

import errno
import os
import pickle
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
from gspo.policy.workers import Workers
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


class Rank(Workers):
    """One of two; the first one's `share` comes before the other one's."""

    size = 2

    def __init__(self, rank: int, told: list[bytes]):
        super().__init__()
        self.rank, self._told = rank, told

    def share(self, value):
        if self.rank == 0:
            self._told.append(pickle.dumps(value))
        return value if self.rank == 0 else pickle.loads(self._told.pop(0))


def saved_on_ranks(folder: Path, trainer: Trainer, writers: list[CheckpointWriter]) -> list:
    """What `save` returns or raises, on each rank."""
    told, results = list[bytes](), []
    for rank, writer in enumerate(writers):
        trainer.policy.workers = Rank(rank, told)
        try:
            results.append(writer.save(folder, trainer))
        except RunError as error:
            results.append(str(error))
    assert not told
    return results


@pytest.mark.parametrize("size", [0, 2**40])
def test_an_error_of_the_first_rank_alone_is_raised_on_all(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, size: int
):
    """Else they disagree on whether the call went well, and all end."""
    finish, failures = checkpoint._finish, [OSError(errno.ENOSPC, "full")]

    def full(*args):
        if failures:
            raise failures.pop()
        return finish(*args)

    monkeypatch.setattr(checkpoint, "_finish", full)
    monkeypatch.setattr(checkpoint, "_write_shards", lambda *args: None)
    monkeypatch.setattr(checkpoint_writer, "BACKGROUND_BYTES", size)
    monkeypatch.setattr(trainer.policy, "workers", Workers())  # put back at the end
    monkeypatch.setattr(trainer, "step", trainer.step)
    writers = [CheckpointWriter(), CheckpointWriter()]
    results = saved_on_ranks(tmp_path, trainer, writers)
    if size == 0:  # written beside training: the next call says it
        assert results == [tmp_path / f"{trainer.step:04}"] * 2
        assert writers[0]._last is not None
        wait([writers[0]._last[1]], 30)
        trainer.step += 1
        results = saved_on_ranks(tmp_path, trainer, writers)
    assert results[0] == results[1] and "the disk is full" in results[0]
    trainer.step += 1
    assert saved_on_ranks(tmp_path, trainer, writers) == [tmp_path / f"{trainer.step:04}"] * 2
    assert all(writer.wait() or size for writer in writers)  # before `_finish` is another test's


def test_a_folder_that_the_first_rank_cannot_make_holds_up_no_other(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer.policy, "workers", Workers())
    (tmp_path / "file").touch()
    writers = [CheckpointWriter(), CheckpointWriter()]
    results = saved_on_ranks(tmp_path / "file", trainer, writers)
    assert results[0] == results[1] and "cannot write" in results[0]


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


ENDED = """
import os, sys, threading
from types import SimpleNamespace
from gspo.policy.workers import Workers
from gspo.train import checkpoint_writer

def hang():
    threading.Event().wait()

def fail():
    raise OSError(28, "full")

trainer = SimpleNamespace(policy=SimpleNamespace(trainable={}, workers=Workers()))
checkpoint_writer.LIMIT = 0.5
checkpoint_writer.BACKGROUND_BYTES = 0
writers = {hang: checkpoint_writer.CheckpointWriter(), fail: checkpoint_writer.CheckpointWriter()}
for write, writer in writers.items():
    checkpoint_writer.begin_checkpoint = lambda *_, **__: (write.__name__, write)
    writer.save("", trainer)
if os.fork() == 0:  # has no thread that writes
    sys.exit()
os.wait()
"""


def test_a_program_that_ends_says_what_was_not_written():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ENDED]
    ended = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.stderr.count("hang is not written after 0 s") == 1
    assert ended.stderr.count("cannot write the checkpoint fail") == 1


KILLED = """
import asyncio, os, signal, sys, gspo as art
from gspo.policy.workers import Workers
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
                def dying(path, tensors):  # that of the step before may still be written beside
                    told = write(path, tensors)
                    if path.name == "model.safetensors" and f"{stop:04}" in path.parent.name:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return told
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
