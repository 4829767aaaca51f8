"""Work that all ranks do together: the first one says what, the others wait for it."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Timer, current_thread, main_thread
from typing import Any, NoReturn, TypeVar

import torch

from gspo.backend.loading import load_trainer
from gspo.core.compute import Threads, leave
from gspo.core.errors import ConfigError, GspoError
from gspo.train.checkpoint_writer import CheckpointWriter
from gspo.train.mesh import GRACE, Mesh
from gspo.train.trainer import Trainer

T = TypeVar("T")


class Ranks:
    """The ranks of this process's group. `call` on the first one, `follow` on all others."""

    def __init__(self, mesh: Mesh):
        self.mesh, mesh.everywhere = mesh, self.call
        self._known: list[Any] = [mesh]  # what each has of its own: trainers, writers

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of a module on every rank; what it has of its own, such as a trainer,
        each rank takes from there.

        Raises:
            RunError: see `Mesh.together`.
        """
        numbers = {id(known): n for n, known in enumerate(self._known)}
        told = [(n := numbers.get(id(a)), a if n is None else None) for a in args]
        return self.mesh.together(lambda: self._work(self.mesh.share((function, told))))

    def follow(self) -> int:
        """Do what the first rank says, until it closes.

        Returns:
            The status to end with: 1 if the first rank's script has failed. After a 0, the torchrun
            of this machine would wait 300 s for that of the first rank, and report success.

        Raises:
            RunError: a rank failed or ended, or there is no work; see `Mesh`.
        """
        done = None
        while not isinstance(done, Status):
            self.mesh.await_work()
            try:
                done = self.mesh.together(lambda: self._work(self.mesh.share(None)))
            except Exception as error:  # the first rank raises the same, and its user decides
                if self.mesh.broken:
                    raise
                print(f"rank {self.mesh.rank}: {type(error).__name__}: {error}", file=sys.stderr)
        for writer in self._known:  # the first rank knows already what became of a checkpoint
            if isinstance(writer, CheckpointWriter):
                with suppress(GspoError):
                    writer.wait()
        self.mesh.close()
        return int(done)

    def close(self, failed: bool = False) -> None:
        """End all ranks; the others by status 1 if the first one's script has failed."""
        if not self.mesh.broken:
            self.call(Status, failed)
        self.mesh.close()

    def _work(self, work: Any) -> Any:
        function, told = work
        args = [given if n is None else self._known[n] for n, given in told]
        result = function(*args)
        if isinstance(result, Trainer | CheckpointWriter):
            self._known += [result, result.policy] if isinstance(result, Trainer) else [result]
        return result


class Status(int):
    """The last work: with it the other ranks end."""


def load_on_ranks(mesh: Mesh, what: Any, folder: Path, cp_size: int, ep_size: int) -> Trainer:
    """Load a model on every rank, a part of it each.

    Args:
        what: base model, configuration and checkpoint, as `load_trainer` takes them.
        folder: of the run, which all ranks must see.
        cp_size, ep_size: see `Mesh.divide`.

    Raises:
        ConfigError: the ranks have other files of the model, or another folder.
        ModelError, CheckpointError: see `load_trainer`.
    """
    _check_shared(mesh, folder)
    mesh.divide(cp_size, ep_size)
    trainer = load_trainer(*what, mesh=mesh)
    packing = trainer.policy.packing, trainer.policy.shares_prompts
    mesh.agree("how samples are packed", packing, "use machines of one kind")
    return trainer


def _check_shared(mesh: Mesh, folder: Path) -> None:
    mark, fault = mesh.share(folder / f".shared-{uuid.uuid4().hex}"), "not asked"
    end = time.monotonic() + GRACE  # a network's file system may show it late
    while fault and time.monotonic() < end:
        try:
            mark.open("w" if mesh.rank == 0 else "r").close()
            fault = ""
        except OSError as error:
            fault = str(error)
            time.sleep(0.05)
    told = [f"rank {r} ({mesh.hosts[r]}): {one}" for r, one in enumerate(mesh.gather(fault)) if one]
    if mesh.rank == 0 and not fault:
        mark.unlink()
    if told:
        raise ConfigError(
            f"{'; '.join(told)}. Rank 0 ({mesh.hosts[0]}) writes {folder}, and all must see it: "
            "give ClusterBackend(path=) a folder that all machines share"
        )


def follow(mesh: Mesh) -> NoReturn:
    """A rank other than the first: work until the end, and leave the process.

    Not by an exception: what surrounds the constructor in the script is the first rank's work. The
    others learn of an error by the closed connection: no library may delay that.
    """
    if current_thread() is main_thread():  # the only one that may set handlers
        _pass_on_signals(mesh)
    try:
        # In another thread: inside torch, this one would answer no signal. Each thread has a
        # current GPU of its own, at first the machine's first; -1: as it is.
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else -1
        thread = Threads(1, "gspo-rank", partial(torch.cuda.set_device, gpu))
        job = thread.submit(Ranks(mesh).follow)
        while not wait([job], 1.0).done:
            continue  # a signal that comes just before the wait is answered after it
        mesh.closing, status = True, job.result()
        if status and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(6 * GRACE)  # else torchrun ends the first rank before its script says why
        leave(status)
    except Exception as error:
        print(f"rank {mesh.rank} ({mesh.hosts[mesh.rank]}) ends: {error}", file=sys.stderr)
        leave(1)


def _pass_on_signals(mesh: Mesh) -> None:
    """Let SIGINT and SIGTERM reach the first rank, whose script ends all ranks in order, unless it
    ends within `GRACE`, since it got the same, or has ended. A second one ends this process, and so
    does the first one if the work has ended."""
    arrived: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if arrived or mesh.closing:
            leave(128 + number)
        arrived.append(number)
        Timer(GRACE, lambda: _passed_on(mesh, number) or leave(128 + number)).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)


def _passed_on(mesh: Mesh, number: int) -> bool:
    """Let the first rank get a signal, unless its script ends already; whether that rank lives."""
    with suppress(RuntimeError):
        store = mesh.other_store()
        store.set("signal", f"{mesh.rank} {number}")
        store.wait(["lives-signal"], timedelta(seconds=4 * GRACE))
        return True
    return False
