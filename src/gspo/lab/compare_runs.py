"""Run the cells of a comparison, as many at once as there are cores, and write what comes of it.

Each cell is a process of its own, forked from a server that has loaded the libraries once; it tells
over a pipe how it goes. `concurrent.futures.ProcessPoolExecutor` would not do: when one process
dies it gives up all the others, it doesn't say which cell was at work nor how it ended, and it
can't be stopped.
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
from rich.markup import escape
from rich.progress import Progress

from gspo.backend.run import locked
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
    """Run the cells, one per log at a time, with a bar for each of them on a terminal."""
    waiting, free = deque(pending), deque(logs)
    busy: dict[Any, _Job] = {}  # by the process's end of the pipe
    console = Console(highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        whole = progress.add_task("cells", total=len(pending))
        try:
            while waiting or busy:
                while waiting and free:
                    job = _Job(waiting.popleft(), free.popleft(), progress)
                    busy[job.connection] = job
                for connection in wait(busy):
                    job = busy[connection]
                    job.follow(progress)
                    if job.cell.status != "running":
                        free.append(busy.pop(connection).log)
                        progress.advance(whole)
                        done = f"{len(pending) - len(waiting) - len(busy)}/{len(pending)}"
                        console.print(f"{done}  {job.outcome()}", markup=False, soft_wrap=True)
                        write()
        finally:
            for job in busy.values():
                job.stop()


class _Job:
    """A process that runs a cell and prints to the end of `log`."""

    def __init__(self, cell: Cell, log: Path, progress: Progress):
        assert cell.spec is not None
        cell.status = "running"
        self.cell, self.log, self._began = cell, log, time.perf_counter()
        self._bar = progress.add_task(escape(cell.id), total=cell.spec.steps)
        self.connection, other_end = _SERVER.Pipe()
        self._process = _SERVER.Process(target=_run_cell, args=(cell.spec, other_end, log))
        # Only for the server: a model that this process loads later may use all cores.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
            self._process.start()
        other_end.close()  # so that the end of the process is the end of the pipe

    def follow(self, progress: Progress) -> None:
        """Read the next message of the process, and set the status of the cell by it."""
        try:
            status, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            status, value = "failed", f"{_ending(self._process.exitcode or 0)}; see {self.log}"
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
            rewards = measured(self.cell.folder)
            text = "held-out {reward_before:.2f} to {reward_after:.2f}".format(**rewards)
        return f"{self.cell.id}  {text}  {time.perf_counter() - self._began:.0f} s"

    def stop(self) -> None:
        """End the process. The run goes on from its last checkpoint another time."""
        self._process.kill()
        self._process.join()


def _ending(code: int) -> str:
    if code >= 0:
        return f"the worker process ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"the worker process was ended by {signal.Signals(-code).name}{hint}"


def _run_cell(spec: Spec, connection: Connection, log: Path) -> None:
    """The life of a cell's process."""
    # Ctrl-C on the terminal is for the parent only, which ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
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

    def started(self, spec: Spec, step: int, notes: list[str]) -> None:
        self._connection.send(("running", step))

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self._connection.send(("running", step))

    def evaluated(self, step: int, estimate: Estimate) -> None:
        pass
