"""Run the cells of a comparison, as many at once as there are cores."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from gspo.backend.metrics_file import read_metrics
from gspo.core.compute import free_cores
from gspo.core.errors import RunError
from gspo.lab.compare.grid import CELLS, Cell
from gspo.lab.compare.spec import CompareSpec

Status = Literal["pending", "running", "done", "failed", "refused"]
_PATIENCE = 15.0
"""Seconds that workers of a killed comparison may take to notice."""


@dataclass
class State:
    """Where a cell stands."""

    status: Status
    error: str | None = None


class GridWatch(Protocol):
    """Sees the comparison while it runs."""

    def began(self, cell: Cell) -> None: ...
    def stepped(self, cell: Cell, step: int) -> None: ...
    def evaluated(self, cell: Cell, reward: float) -> None: ...
    def ended(self, cell: Cell, state: State) -> None: ...


def default_workers(cells: list[Cell]) -> int:
    """One for each core, or for as many cores as a cell has threads."""
    threads = max((c.spec.load.threads or 1 for c in cells if c.spec), default=1)
    return max(1, free_cores() // threads)


def cell_folder(cell: Cell) -> Path:
    """The run of a cell."""
    assert cell.spec is not None
    return Path(cell.spec.path) / cell.spec.project / cell.spec.name


def is_finished(cell: Cell) -> bool:
    """Whether the run has made its last step and evaluated it."""
    assert cell.spec is not None
    records = read_metrics(cell_folder(cell) / "metrics.jsonl")
    if not records:
        return False
    return records[-1]["step"] == cell.spec.steps and "val/reward" in records[-1]


def first_states(cells: list[Cell]) -> dict[str, State]:
    """What is known before anything runs."""
    return {cell.id: _first_state(cell) for cell in cells}


def _first_state(cell: Cell) -> State:
    if cell.spec is None:
        return State("refused", cell.refused)
    return State("done" if is_finished(cell) else "pending")


async def run_cells(
    compare: CompareSpec,
    cells: list[Cell],
    states: dict[str, State],
    workers: int,
    watch: GridWatch,
) -> None:
    """Run what is pending; `states` follows. A cell that fails doesn't stop the others.

    Raises:
        RunError: another process compares at the same path.
    """
    waiting = deque(cell for cell in cells if states[cell.id].status == "pending")
    count = min(workers, len(waiting))
    if count == 0:
        return
    compare.folder.mkdir(parents=True, exist_ok=True)
    with _locked(Path(compare.path) / CELLS) as lock:
        crew = [_Worker(compare.folder / f"worker-{i}.log", lock.fileno()) for i in range(count)]
        try:
            async with asyncio.TaskGroup() as group:
                for worker in crew:
                    group.create_task(_work(worker, waiting, states, watch))
        finally:
            for worker in crew:
                await worker.stop()


async def _work(
    worker: _Worker, waiting: deque[Cell], states: dict[str, State], watch: GridWatch
) -> None:
    while waiting:
        cell = waiting.popleft()
        state = states[cell.id]
        state.status = "running"
        watch.began(cell)
        error = await worker.run(cell, watch)
        state.status, state.error = ("failed", error) if error else ("done", None)
        watch.ended(cell, state)


class _Worker:
    """A process that runs cells; started when needed, and again after it has died."""

    def __init__(self, log: Path, lock: int):
        self._log = log
        self._lock = lock
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, cell: Cell, watch: GridWatch) -> str | None:
        """Run a cell to its end; what went wrong, or None."""
        assert cell.spec is not None
        process = self._process or await self._start()
        assert process.stdin is not None and process.stdout is not None
        line = json.dumps(cell.spec.model_dump(mode="json", exclude_unset=True)) + "\n"
        with contextlib.suppress(ConnectionError):  # its death shows in the answer
            process.stdin.write(line.encode())
            await process.stdin.drain()
        while answer := await process.stdout.readline():
            event = json.loads(answer)
            if event["event"] == "step":
                watch.stepped(cell, event["step"])
            elif event["event"] == "evaluated":
                watch.evaluated(cell, event["reward"])
            else:
                return event.get("error")
        self._process = None
        return f"{_ending(await process.wait())}; see {self._log}"

    async def _start(self) -> asyncio.subprocess.Process:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gspo.lab.compare.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                # Held until the last worker has gone, also where this process is killed.
                pass_fds=(self._lock,),
                # An interrupt of the terminal reaches this process alone, which ends its workers.
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
        return self._process

    async def stop(self) -> None:
        """End the process; a run in progress goes on from its last checkpoint another time."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"the worker process ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the worker process was ended by {name}{hint}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """Hold the cells, waiting a little for the workers of a comparison that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise RunError(
                        f"the cells in {folder} are in use by process {file.read() or '?'}: "
                        "wait for it, or give this comparison another path"
                    ) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file
