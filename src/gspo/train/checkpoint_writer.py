"""Write checkpoints while training goes on: one at a time, and hashed in the pass that writes them.

A large checkpoint is first copied to host memory, which is 12 bytes for each trained parameter
(float32 weights and AdamW's two moments) until it is on the disk. A small one is written at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from gspo.core.errors import GspoError, RunError
from gspo.core.timing import timed
from gspo.train.checkpoint import begin_checkpoint
from gspo.train.trainer import Trainer

BACKGROUND_BYTES = 64 * 2**20
"""Smaller checkpoints (of trained weights and moments) are waited for."""
LIMIT = 3600.0
"""Seconds that a checkpoint may take to be written."""


class CheckpointWriter:
    """Writes the checkpoints of one run; `save` and `wait` are called by one thread at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._target = Path()
        self._failed: Exception | None = None

    @timed("checkpoint")
    def save(self, folder: Path, trainer: Trainer) -> Path:
        """Write `folder/<step>`: it is there whole when `wait` returns, or not at all.

        Raises:
            RunError: it cannot be written, or the one before it could not; this one is then.
        """
        _, failed = self._ended()
        size = sum(12 * weight.numel() for weight in trainer.policy.trainable.values())
        large = size >= BACKGROUND_BYTES
        target, write = begin_checkpoint(folder, trainer, copied=large)
        self._target = target
        # No daemon: a program that ends waits for it.
        self._thread = threading.Thread(target=self._run, args=(write,), name="gspo-checkpoint")
        self._thread.start()
        if not large:
            failed = failed or self._ended()[1]
        if failed is not None:
            raise failed
        return target

    def check(self) -> None:
        """Say at once if the last checkpoint could not be written.

        Raises:
            RunError: names its folder.
        """
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> bool:
        """Return when the last checkpoint is on the disk; whether there was any to wait for.

        Raises:
            RunError: it could not be written, or took longer than `LIMIT`. Names its folder.
        """
        waited, failed = self._ended()
        if failed is not None:
            raise failed
        return waited

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._failed = error

    def _ended(self) -> tuple[bool, GspoError | None]:
        """Wait for the thread; whether there was one, and why its checkpoint is not there."""
        if (thread := self._thread) is None:
            return False, None
        thread.join(LIMIT)
        if thread.is_alive():
            return True, RunError(
                f"{self._target} is not written after {LIMIT:.0f} s: does its disk hang?"
            )
        failed, self._thread, self._failed = self._failed, None, None
        if failed is not None and not isinstance(failed, GspoError):
            failed = RunError(f"cannot write the checkpoint {self._target}: {failed}")
        return True, failed
