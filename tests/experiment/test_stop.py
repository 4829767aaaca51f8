"""Signals: in this process where one is enough, and on a terminal of its own where it ends."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gspo.core.errors import RolloutError
from gspo.experiment.stop import run_until_signal
from gspo.train.checkpoint import steps_saved

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cancels_what_runs_and_waits_for_its_end(number: signal.Signals):
    before = [signal.getsignal(n) for n in SIGNALS]
    ended = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    with pytest.raises(SystemExit) as raised:
        run_until_signal(work())
    assert (raised.value.code, ended) == (128 + number, [True])
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_signal_at_the_very_end_is_not_lost():
    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        run_until_signal(work())


def test_without_a_signal_it_is_asyncio_run():
    async def answer() -> int:
        return 42

    async def cancelled() -> None:
        raise asyncio.CancelledError

    assert run_until_signal(answer()) == 42
    with pytest.raises(asyncio.CancelledError):
        run_until_signal(cancelled())


def test_signals_that_are_ignored_stay_ignored():
    async def work() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.01)
        return 42

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_until_signal(work()) == 42
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("status", [0, 3])
def test_an_exit_inside_of_what_runs_is_an_error(status: int):
    async def leaves() -> None:
        sys.exit(status)

    async def work() -> None:
        task = asyncio.create_task(leaves())
        await asyncio.sleep(60)
        await task

    with pytest.raises(RolloutError, match=rf"sys.exit\({status}\) was called"):
        run_until_signal(work())


class Terminal:
    """`gspo train` on a terminal of its own."""

    def __init__(self, path: Path, *overrides: str):
        spec = path / "run.toml"
        spec.write_text(
            f'task = "sort"\npath = "{path}"\nsteps = 500\nprompts = 2\ncompletions = 4\n'
            "eval_prompts = 0\n"
        )
        self.run = path / "gspo" / "run"
        self._fd, child = pty.openpty()
        command = [sys.executable, "-m", "gspo.cli", "train", str(spec)]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
        )
        os.close(child)
        self.shown = ""

    def read(self, seconds: float = 0.05) -> bool:
        """Whether there may be more."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return True
        try:
            self.shown += os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            return False
        return True

    def until_saved(self, step: int) -> None:
        deadline = time.monotonic() + 200
        while max(steps_saved(self.run / "checkpoints"), default=0) < step:
            assert self.read() and time.monotonic() < deadline, self.shown

    def wait(self) -> int:
        deadline = time.monotonic() + 100
        while self.read() and time.monotonic() < deadline:
            pass
        os.close(self._fd)
        return self.process.wait(timeout=10)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_on_a_terminal_ends_in_order(tmp_path: Path, number: signal.Signals):
    terminal = Terminal(tmp_path)
    terminal.until_saved(2)
    terminal.process.send_signal(number)
    assert terminal.wait() == 128 + number
    shown = terminal.shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "Traceback" not in shown
    saved = max(steps_saved(terminal.run / "checkpoints"))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "/500 " in plain
    assert plain.splitlines()[-1] == (
        f"stopped by {number.name}: {saved} of 500 steps are saved in {terminal.run}; "
        "the same command goes on from there"
    )
    hidden = {path.name for path in terminal.run.rglob(".*")}
    assert hidden == {".lock"}
    assert not list(terminal.run.rglob("*.tmp"))


def test_a_second_signal_ends_at_once(tmp_path: Path):
    code = (
        "import asyncio, time\n"
        "from gspo.experiment.stop import run_until_signal\n"
        "async def work():\n"
        "    print('ready', flush=True)\n"
        "    try:\n"
        "        await asyncio.sleep(60)\n"
        "    finally:\n"
        "        print('ending', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "run_until_signal(work())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for word in ("ready", "ending"):
            assert process.stdout.readline().strip() == word
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stderr.read() == (
            "ended at once; the same command goes on from the last step that was saved\n"
        )
