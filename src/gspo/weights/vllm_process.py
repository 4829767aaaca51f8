"""What an entry of `engines` names: a server's URL, or a process that gspo starts and ends."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch

from gspo.core.errors import ConfigError, shown

END_SECONDS = 20.0
"""How long a server may take to end when it is told to. Then it is killed."""
ENV = "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
FLAGS = "-m vllm.entrypoints.openai.api_server --enable-scale-out"
FLAGS += " --logprobs-mode processed_logprobs"
_OF_RANKS = re.compile("TORCHELASTIC_|MASTER_|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)$")
"""Variables that torchrun sets: vLLM's own processes would look for our ranks."""
_BOUND = """
exec 3<&0 </dev/null
(trap "" TERM; cat <&3; kill -TERM 0; sleep "$0"; kill -KILL 0) >/dev/null &
exec "$@" 3<&-"""
"""The shell becomes the server; its watcher ends the group once nobody holds the pipe any more."""


def server_url(entry: str) -> str:
    """The address of a server, as its requests begin; what is no URL stays as it is.

    >>> server_url("http://gpu1:8000/v1/")
    'http://gpu1:8000'
    """
    return entry.rstrip("/").removesuffix("/v1") if entry.startswith("http") else entry


def check_entries(engines: Any) -> tuple[str, ...]:
    """Refuse what is neither a URL nor a command.

    Raises:
        ConfigError: it names the value.
    """
    entries = tuple(engines) if isinstance(engines, list | tuple) else (engines,)
    urls = [server_url(entry) for entry in entries if isinstance(entry, str)]
    for entry in entries:
        try:
            if entry.startswith(("http://", "https://")):
                fine = httpx.URL(entry).host and urls.count(server_url(entry)) == 1
            else:
                fine = shutil.which(shlex.split(entry)[0]) and "--port" not in entry
        except (AttributeError, IndexError, ValueError, httpx.InvalidURL):
            fine = False
        if not fine:
            raise ConfigError(
                f"engines: {shown(entry)}: give each server's URL once, http://host:port, or the "
                "path of a Python that is there and has vLLM, /path/to/venv/bin/python, without "
                "--port: gspo takes a free one"
            )
    return entries


class VllmProcess:
    """One server after another, each a process group: vLLM's engine is a child of its server.

    It ends with this process, even if that is killed: a watcher in its group waits for the end of a
    pipe that only this process holds open.

    Args:
        entry: the Python of an environment that has vLLM, with `env` and variables before it, and
            vLLM's options after it.
        log: where the servers write.
    """

    def __init__(self, entry: str, log: Path):
        words = shlex.split(entry)
        at = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        self._python, self._options, self._log = words[:at], words[at:], log
        self._command: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, model: str, *settings: str) -> str:
        """Start a server of a model with these arguments of vLLM; returns its address."""
        # A new port each time: meanwhile somebody else may listen on the former one.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ours = [*FLAGS.split(), "--host", "127.0.0.1", "--port", f"{port}", *settings]
        if not torch.cuda.is_available():
            # vLLM 0.32's engine dies of a seeded request whose prompt it reads in pieces: torch's
            # generator of a CPU has no offset.
            ours.append("--no-enable-chunked-prefill")
        variables = "env", *ENV.split(), "PYTHONPATH="
        self._command = [*variables, *self._python, *ours, "--model", model, *self._options]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", _BOUND, f"{END_SECONDS:g}", *self._command],
                env={n: value for n, value in os.environ.items() if not _OF_RANKS.match(n)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        """End the server, if one runs, and whatever it has started; in 2 x END_SECONDS at most."""
        if (process := self._process) is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(END_SECONDS)
        if process.stdin is not None:
            process.stdin.close()
        if self._process is process:  # its number may be another's from now on
            self._process = None

    def last_words(self) -> str:
        """The command, and the end of what the server has written."""
        end = self._log.read_bytes()[-1500:].decode(errors="replace")
        return f"{shlex.join(self._command)}. The end of {self._log}: {end}"
