"""Run the cells of a comparison, as many at once as there are cores, and write what comes of it.

Each worker is a process that runs one cell after another: it is sent specs over its pipe, and tells
how they go. `concurrent.futures.ProcessPoolExecutor` would not do: when one process dies it gives
up all the others, it doesn't say which cell was at work nor how it ended, and it can't be stopped.
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
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from gspo.backend.run import _locked
from gspo.core.compute import free_cores
from gspo.core.errors import GspoError
from gspo.core.files import explained
from gspo.experiment.heldout import Estimate
from gspo.experiment.loop import run_experiment
from gspo.experiment.spec import Spec
from gspo.lab.compare import CompareSpec
from gspo.lab.compare_cells import CELLS, Cell
from gspo.lab.compare_result import measured, write_comparison
from gspo.policy.embedded import PREFIX, embedded_folder

_SPAWN = multiprocessing.get_context("spawn")


def default_workers(cells: Sequence[Cell]) -> int:
    """One for each core, or for as many cores as a cell has threads."""
    threads = max((cell.spec.load.threads or 1 for cell in cells if cell.spec), default=1)
    return max(1, free_cores() // threads)


def run_comparison(
    compare: CompareSpec, cells: Sequence[Cell], workers: int, *, quick: bool = False
) -> dict[str, Any]:
    """Run the pending cells; returns the content of comparison.json, which is kept up to date.

    A cell that fails doesn't stop the others. If it is interrupted, the cells that were at work are
    pending again, and go on from their last checkpoints the next time.

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
        lock = _locked(folder / ".lock")
    with lock:
        write()
        # Workers would each build the same embedded model.
        for model in sorted({cell.spec.model for cell in pending if cell.spec}):
            if model.startswith(PREFIX):
                embedded_folder(model)
        count = min(workers, len(pending))
        crew = [_Worker(compare.folder / f"worker-{number}.log") for number in range(count)]
        try:
            _run_all(pending, crew, write)
        finally:
            for worker in crew:
                worker.stop()
            for cell in pending:
                if cell.status == "running":
                    cell.status = "pending"
            content = write()
    return content


def _run_all(pending: Sequence[Cell], crew: Sequence[_Worker], write: Callable[[], Any]) -> None:
    """Run the cells, with a bar for each of those at work if there is a terminal."""
    waiting, idle = deque(pending), deque(crew)
    busy: dict[Any, _Worker] = {}  # by the worker's end of the pipe
    console = Console(highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        whole = progress.add_task("cells", total=len(pending))
        while waiting or busy:
            while waiting and idle:
                worker = idle.popleft()
                worker.begin(waiting.popleft(), progress)
                busy[worker.connection] = worker
            for connection in wait(busy):
                worker = busy[connection]
                worker.follow(progress)
                if worker.cell.status != "running":
                    idle.append(busy.pop(connection))
                    progress.advance(whole)
                    done = f"{len(pending) - len(waiting) - len(busy)}/{len(pending)}"
                    console.print(f"{done}  {worker.outcome()}", markup=False, soft_wrap=True)
                    write()


class _Worker:
    """A process that runs cells; started for the first of them, and again after it has died."""

    def __init__(self, log: Path):
        self._log = log
        self._process: Any = None
        self.connection: Connection
        self.cell: Cell

    def begin(self, cell: Cell, progress: Progress) -> None:
        """Start to run a cell."""
        assert cell.spec is not None
        if self._process is None or not self._process.is_alive():
            self._start()
        cell.status = "running"
        self.cell, self._began = cell, time.perf_counter()
        self._bar = progress.add_task(escape(cell.id), total=cell.spec.steps)
        with suppress(ConnectionError):  # the process has died, which `follow` sees
            self.connection.send(cell.spec)

    def follow(self, progress: Progress) -> None:
        """Read the next message of the process, and set the status of the cell by it."""
        try:
            status, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            status, value = "failed", f"{_ending(self._process.exitcode)}; see {self._log}"
        self.cell.status = status
        if status == "running":
            progress.update(self._bar, completed=int(value))
        else:
            self.cell.error = value
            progress.remove_task(self._bar)

    def outcome(self) -> str:
        """One line on the cell that has ended."""
        text = f"failed: {self.cell.error}"
        if self.cell.status == "done":
            text = "held-out {reward_before:.2f} to {reward_after:.2f}".format(
                **measured(self.cell.folder)
            )
        return f"{self.cell.id}  {text}  {time.perf_counter() - self._began:.0f} s"

    def stop(self) -> None:
        """End the process. A run in progress goes on from its last checkpoint another time."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        self.connection, other_end = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_run_cells, args=(other_end, self._log))
        # Ctrl-C on the terminal is for this process only, which ends the others.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            # Only for the worker: a model that this process loads later may use all cores.
            with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        other_end.close()  # so that the end of the process is the end of the pipe


def _ending(code: int) -> str:
    if code >= 0:
        return f"the worker process ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"the worker process was ended by {signal.Signals(-code).name}{hint}"


def _run_cells(connection: Connection, log: Path) -> None:
    """The life of a worker's process."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        spec: Spec = connection.recv()
        try:
            asyncio.run(run_experiment(spec, _Reporter(connection)))
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


class _Reporter:
    """Tells the parent at which step a run is."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def started(self, spec: Spec, step: int, changed: list[str]) -> None:
        self._connection.send(("running", step))

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self._connection.send(("running", step))

    def evaluated(self, step: int, estimate: Estimate) -> None:
        pass
