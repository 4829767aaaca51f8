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

from gspo.experiment.stop import Stop
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

    with Stop() as stop:
        with pytest.raises(SystemExit) as raised:
            stop.run(work())
        assert (raised.value.code, stop.signal, ended) == (128 + number, number, [True])
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_outside_of_a_run_a_signal_ends_the_program():
    with Stop(), pytest.raises(SystemExit, match="143"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_without_a_signal_it_is_asyncio_run():
    async def answer() -> int:
        return 42

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with Stop() as stop:
        assert stop.run(answer()) == 42
        with pytest.raises(asyncio.CancelledError):
            stop.run(cancelled())


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


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
    assert f"stopped at {saved}/500" in plain
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
        "from gspo.experiment.stop import Stop\n"
        "async def work():\n"
        "    print('ready', flush=True)\n"
        "    try:\n"
        "        await asyncio.sleep(60)\n"
        "    finally:\n"
        "        print('ending', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "with Stop() as stop:\n"
        "    stop.run(work())\n"
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
