"""Servers that gspo starts end with it, whatever becomes of them or of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gspo.core.errors import ConfigError
from gspo.weights import vllm_process
from gspo.weights.vllm_process import VllmProcess, check_entries
from vllm_stub import entry, gone, lives, starts

SETTINGS = "--dtype", "float32", "--max-model-len", "512"
PARENT = """
import os, signal, sys, time
from pathlib import Path
from gspo.weights import vllm_process
vllm_process.END_SECONDS = 0.5
vllm_process.VllmProcess(sys.argv[1], Path(sys.argv[2])).start("m", *sys.argv[4:])
if sys.argv[3] == "at once":
    os.kill(os.getpid(), signal.SIGKILL)
print("started", flush=True)
time.sleep(300)
"""


def started(folder: Path, faults: str = "") -> VllmProcess:
    """A process whose start is noted: it has a child."""
    process = VllmProcess(entry(folder, faults), folder / "log")
    process.start("m", *SETTINGS)
    limit = time.monotonic() + 10
    while not starts(folder):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return process


def named(text: str) -> list[int]:
    """Numbers of other processes whose command or environment has this in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if text.encode() in told and process.name != str(os.getpid()):
                found.append(int(process.name))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for number in (n for numbers in starts(tmp_path) for n in numbers if lives(n)):
        os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize("fault", ["", "stubborn"])
def test_it_ends_with_all_that_it_has_started(
    fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_process, "END_SECONDS", 0.2)
    process = started(folder, fault)
    assert process.runs
    process.stop()
    assert not process.runs
    assert gone(starts(folder)[0])
    process.stop()


def test_a_server_knows_nothing_of_the_ranks_that_train(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """With torchrun's variables, torch in another process waits for a store that is not there."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    process = started(folder)
    known = Path(f"/proc/{starts(folder)[0][0]}/environ").read_text()
    assert "VLLM_SERVER_DEV_MODE=1" in known and "RANK=" not in known
    assert not {"WORLD_SIZE=7", "MASTER_PORT=7", "TORCHELASTIC_RUN_ID=7"} & {*known.split("\0")}
    process.stop()


def test_each_start_has_a_port_of_its_own(folder: Path):
    process = VllmProcess(entry(folder, "deaf"), folder / "log")
    ports = [process.start("m", *SETTINGS), (process.stop(), process.start("m", *SETTINGS))[1]]
    process.stop()
    assert len({*ports}) == 2 and all(port.startswith("http://127.0.0.1:") for port in ports)


def test_what_a_server_has_said_is_told(folder: Path):
    process = started(folder, "ends")
    assert gone(starts(folder)[0][:1])
    assert not process.runs
    assert "no model m, an-option" in process.last_words()
    assert f"{folder / 'python'} -m vllm.entrypoints" in process.last_words()
    process.stop()  # its child lives still
    assert gone(starts(folder)[0])


@pytest.mark.parametrize("fault", ["", "stubborn", "deaf", "deaf,stubborn"])
def test_a_killed_parent_leaves_no_server(fault: str, folder: Path):
    """And no child of it; a server that is still starting may not hear SIGTERM."""
    paths = entry(folder, fault), str(folder / "log")
    arguments = [sys.executable, "-c", PARENT, *paths, "", *SETTINGS]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        while not starts(folder):
            time.sleep(0.01)
        parent.kill()
    assert gone(starts(folder)[0])


def test_a_parent_that_is_killed_as_it_starts_a_server_leaves_none(folder: Path):
    paths = entry(folder, "stubborn"), str(folder / "log")
    subprocess.run([sys.executable, "-c", PARENT, *paths, "at once", *SETTINGS])
    limit = time.monotonic() + 10
    while named(str(folder)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not named(str(folder))


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "no-such-python",
        "ftp://host",
        "/nowhere/bin/python -x",
        5,
        "http://",
        "http://a:port",
        "python3 --port 8000",  # gspo would ask another one for 15 minutes
        "python3 --port=8000",
    ],
)
def test_what_is_no_server_is_refused(entry: Any):
    with pytest.raises(ConfigError, match=r"engines: .*give each server's URL"):
        check_entries([entry])
    with pytest.raises(ConfigError, match=r"engines: .*give each server's URL"):
        check_entries(entry)


@pytest.mark.parametrize("again", ["http://a:1", "http://a:1/", "http://a:1/v1"])
def test_a_server_is_named_once(again: str):
    with pytest.raises(ConfigError, match="URL once"):
        check_entries(["http://a:1", again])


def test_entries_may_be_one_text():
    assert check_entries("http://a:1") == ("http://a:1",)
    assert check_entries(["env A=1 python3 --x"] * 2) == ("env A=1 python3 --x",) * 2
