"""Write checkpoints while training goes on, one at a time.

A large checkpoint is first copied to host memory, which is 12 bytes for each trained parameter
(float32 weights and AdamW's two moments) until it is on the disk. A small one is waited for.
"""

from __future__ import annotations

import atexit
import weakref
from concurrent.futures import Future, wait
from pathlib import Path

from gspo.core.compute import Threads
from gspo.core.errors import GspoError, RunError
from gspo.core.log import log
from gspo.core.timing import span
from gspo.train.checkpoint import begin_checkpoint
from gspo.train.trainer import Trainer

BACKGROUND_BYTES = 64 * 2**20
"""Smaller checkpoints (of trained weights and moments) are waited for."""
LIMIT = 3600.0
"""Seconds that a checkpoint may take to be written."""
_living: weakref.WeakSet[CheckpointWriter] = weakref.WeakSet()


class CheckpointWriter:
    """Writes the checkpoints of one run, on each rank its part. Called by one thread at a time.

    A program that ends waits for what is being written, as `wait` does.
    """

    def __init__(self) -> None:
        self._thread = Threads(1, "gspo-checkpoint")
        self._last: tuple[Path, Future[None]] | None = None
        _living.add(self)

    @span("checkpoint")
    def save(self, folder: Path, trainer: Trainer) -> Path:
        """Write `folder/<step>`: it is there whole when `wait` returns, or not at all.

        Raises:
            RunError: it cannot be written, or the one before it could not; this one is then. On all
                ranks alike: what the first one, which writes most of it, has found.
        """
        failed = self._failure()
        large = 12 * sum(w.numel() for w in trainer.policy.trainable.values()) >= BACKGROUND_BYTES
        target, write = begin_checkpoint(folder, trainer, copied=large)
        self._last = target, self._thread.submit(write)
        if not large:
            failed = self._failure() or failed
        failed = trainer.policy.workers.share(failed)
        if failed is not None:
            raise failed
        return target

    def _failure(self) -> GspoError | None:
        """What `wait` raises."""
        try:
            self.wait()
        except GspoError as error:
            return error
        return None

    def check(self) -> None:
        """Say at once if the last checkpoint could not be written.

        Raises:
            RunError: names its folder.
        """
        if self._last is not None and self._last[1].done():
            self.wait()

    def wait(self) -> bool:
        """Return when the last checkpoint is on the disk; whether there was any to wait for.

        Raises:
            RunError: it could not be written, or takes longer than `LIMIT`. Names its folder.
        """
        if self._last is None:
            return False
        target, writing = self._last
        if not wait([writing], LIMIT).done:
            raise RunError(f"{target} is not written after {LIMIT:.0f} s: does its disk hang?")
        self._last, error = None, writing.exception()
        if error is None:
            return True
        told = RunError(f"cannot write the checkpoint {target}: {error}")
        raise error if isinstance(error, GspoError) else told


@atexit.register
def _end() -> None:
    for writer in [*_living]:
        if writer._thread.each[0].is_alive():  # not so in a fork
            try:
                writer.wait()
            except GspoError as error:
                log.error("%s", error)
