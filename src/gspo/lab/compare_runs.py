"""Run the cells of a comparison, several at a time, and keep comparison.json up to date.

Each cell is a process, forked from a server that has loaded the libraries once. Its steps are told
in the log of its worker, and how it ended over a pipe. `concurrent.futures.ProcessPoolExecutor`
does not fit: when one process dies it gives up all others, it does not say which cell was running
or how it ended, and it cannot be stopped.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.progress import Progress

from gspo.backend.run import locked
from gspo.core.compute import free_cores
from gspo.core.errors import GspoError
from gspo.core.files import explained
from gspo.experiment.loop import run_experiment
from gspo.experiment.spec import Spec
from gspo.experiment.watch import LiveWatch
from gspo.lab.compare import CompareSpec
from gspo.lab.compare_cells import CELLS, Cell
from gspo.lab.compare_result import measured, write_comparison
from gspo.policy.embedded import PREFIX, embedded_folder

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["gspo.experiment.loop"])


def default_workers(cells: Sequence[Cell]) -> int:
    """One for each core, or for as many cores as a cell has threads."""
    threads = max((cell.spec.load.threads or 1 for cell in cells if cell.spec), default=1)
    return max(1, free_cores() // threads)


def run_comparison(
    compare: CompareSpec, cells: Sequence[Cell], workers: int, *, quick: bool = False
) -> dict[str, Any]:
    """Run the pending cells; returns the content of comparison.json, which is kept up to date.

    A cell that fails doesn't stop the others. After an interrupt, the cells that were running are
    pending again, and continue from their last checkpoints the next time.

    Raises:
        RunError: another process compares at the same path.
    """
    write = partial(write_comparison, compare, cells, quick=quick)
    pending = [cell for cell in cells if cell.status == "pending"]
    if not pending:
        return write()
    folder = Path(compare.path) / CELLS
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder / ".lock")
    with lock:
        write()
        # Each cell would build the same embedded model.
        for model in sorted({cell.spec.model for cell in pending if cell.spec}):
            if model.startswith(PREFIX):
                embedded_folder(model)
        logs = [compare.folder / f"worker-{number}.log" for number in range(workers)]
        try:
            _run_all(pending, logs, write)
        finally:
            for cell in pending:
                if cell.status == "running":
                    cell.status = "pending"
            content = write()
    return content


def _run_all(pending: Sequence[Cell], logs: Sequence[Path], write: Callable[[], Any]) -> None:
    """Run the cells, one per log at a time."""
    waiting, free = deque(pending), deque(logs)
    busy: dict[Any, _Job] = {}  # by the process's end of the pipe
    console = Console(highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("cells", total=len(pending))
        try:
            while waiting or busy:
                while waiting and free:
                    job = _Job(waiting.popleft(), free.popleft())
                    busy[job.connection] = job
                for connection in wait(busy):
                    job = busy.pop(connection)
                    free.append(job.log)
                    progress.advance(bar)
                    done = f"{len(pending) - len(waiting) - len(busy)}/{len(pending)}"
                    console.print(f"{done}  {job.result()}", markup=False, soft_wrap=True)
                    write()
        finally:
            for job in busy.values():
                job.stop()


class _Job:
    """A process that runs a cell and prints to the end of `log`."""

    def __init__(self, cell: Cell, log: Path):
        assert cell.spec is not None
        cell.status = "running"
        self.cell, self.log, self._began = cell, log, time.perf_counter()
        self.connection, other_end = _SERVER.Pipe()
        self._process = _SERVER.Process(target=_run_cell, args=(cell.spec, other_end, log))
        # Only for the server: a model that this process loads later may use all cores.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
            self._process.start()
        other_end.close()  # so that the end of the process is the end of the pipe

    def result(self) -> str:
        """Read how the cell ended, and set its status; returns one line on it."""
        try:
            self.cell.status, self.cell.error = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            reason = f"{_ending(self._process.exitcode or 0)}; see {self.log}"
            self.cell.status, self.cell.error = "failed", reason
        text = f"failed: {self.cell.error}"
        if self.cell.status == "done":
            rewards = measured(self.cell.folder)
            text = "held-out {reward_before:.2f} to {reward_after:.2f}".format(**rewards)
        return f"{self.cell.id}  {text}  {time.perf_counter() - self._began:.0f} s"

    def stop(self) -> None:
        """End the process. The next time, the run continues from its last checkpoint."""
        self._process.kill()
        self._process.join()


def _ending(code: int) -> str:
    if code >= 0:
        return f"the worker process ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"the worker process was ended by {signal.Signals(-code).name}{hint}"


def _run_cell(spec: Spec, connection: Connection, log: Path) -> None:
    """What a cell's process does."""
    # Ctrl-C on the terminal is for the parent only, which ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with LiveWatch() as watch:  # to the log
            asyncio.run(run_experiment(spec, watch))
    except Exception as error:  # one cell's failure is not the others'
        traceback.print_exc()
        name = "" if isinstance(error, GspoError) else f"{type(error).__name__}: "
        connection.send(("failed", f"{name}{error}"[:2000]))
    else:
        connection.send(("done", None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
