"""`gspo serve`: a signal ends it in time, whatever is being sampled."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

from gspo.core.errors import ConfigError, ModelError
from gspo.experiment import serving

SERVER = """
import asyncio
from gspo.experiment import serving
from gspo.serve import server
from gspo.serve.fake_engine import FakeEngine

class Slow(FakeEngine):
    async def complete(self, request):
        print("sampling", flush=True)
        await asyncio.sleep(120)

server.STOP_SECONDS = 1
serving.load_named = lambda *_: (None, None)
serving.make_engine = lambda *_, **__: Slow()
serving.serve_model("x", "127.0.0.1", 0, "m", None)
"""
REQUEST = b'{"model": "m", "prompt": "hello"}'


def answer_to(host: str, port: int) -> bytes:
    """What a server that stops answers to a new request."""
    while True:  # it hears of the signal a moment later
        with socket.create_connection((host, port)) as late:
            late.settimeout(10)
            late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not (answer := late.recv(10_000)).startswith(b"HTTP/1.1 200"):
                return answer


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_signal_ends_a_server_that_is_sampling(number: signal.Signals, status: int):
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split(" on ")[1].strip()
            host, port = address.split("/")[2].split(":")
            with socket.create_connection((host, int(port))) as asking:
                asking.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(REQUEST), REQUEST)
                )
                assert process.stdout.readline() == "sampling\n"
                began = time.monotonic()
                process.send_signal(number)
                assert answer_to(host, int(port)).startswith(b"HTTP/1.1 503")  # a new request
                asking.settimeout(20)
                answer = asking.makefile("rb").read()  # of the one that runs
                assert b" 503 " in answer and b"server_stopping" in answer
                assert time.monotonic() - began > 0.9
                assert process.wait(timeout=30) == status
            assert time.monotonic() - began < 10
        finally:
            process.kill()


def test_a_model_that_cannot_be_loaded_frees_the_port(monkeypatch: pytest.MonkeyPatch):
    opened: list[socket.socket] = []
    bound = serving.bind
    monkeypatch.setattr(serving, "bind", lambda *a: opened.append(bound(*a)) or opened[-1])
    with pytest.raises(ModelError, match="unknown base_model"):
        serving.serve_model("embedded:srt", "127.0.0.1", 0, "m", None)
    assert [listener.fileno() for listener in opened] == [-1]


def test_a_host_without_a_key_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match="Choose an API key"):
        serving.serve_model("embedded:sort", "0.0.0.0", 0, "m", None)
    assert "loading" not in capsys.readouterr().err
