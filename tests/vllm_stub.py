"""A process with vLLM's routes and no model: what it scores stands in the folder of its weights.

It takes the arguments of `vllm.entrypoints.openai.api_server` that gspo gives, and starts in a
moment. STUB_FAULTS names what is wrong with it: `ends`, `deaf` (it listens to nothing), `stubborn`
(SIGTERM does nothing), `stale` (a reload does nothing), `trickles` (its answers never end). Where
the folder of new weights has a file `die`, it dies of reading them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PROGRAM = '#!/bin/sh\nshift 2\nexec {python} -I -S {stub} "$@"\n'


def entry(folder: Path, faults: str = "") -> str:
    """What to give as an engine: a `python` that starts this, with its faults."""
    python = folder / "python"
    python.write_text(PROGRAM.format(python=sys.executable, stub=__file__))
    python.chmod(0o755)
    return f"env STUB_FAULTS={faults} STUB_STARTS={folder / 'starts'} {python} --with an-option"


def starts(folder: Path) -> list[list[int]]:
    """Numbers of the processes of each start: the server's, and that of a child of its."""
    written = folder / "starts"
    lines = written.read_text().splitlines() if written.exists() else []
    return [[*map(int, line.split())] for line in lines]


def lives(number: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def gone(numbers: list[int], seconds: float = 10.0) -> bool:
    """Whether these processes end in time."""
    limit = time.monotonic() + seconds
    while any(map(lives, numbers)) and time.monotonic() < limit:
        time.sleep(0.01)
    return not any(map(lives, numbers))


class Stub(BaseHTTPRequestHandler):
    folder, label = "", "default"
    faults: frozenset[str] = frozenset()
    config: dict[str, object] = {}  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        models = {"data": [{"id": "base", "parent": None}]}
        known = {"/health": None, "/v1/models": models}
        self.answer(known.get(self.path, {"vllm_config": {"model_config": self.config}}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc":
            if Path(body["kwargs"]["weights_path"], "die").exists():
                os._exit(1)
            if "stale" not in self.faults:
                Stub.folder = body["kwargs"]["weights_path"]
        elif self.path == "/update_weight_version":
            Stub.label = body["new_version"]
        elif self.path == "/inference/v1/generate":
            return self.answer(self.generated(body["token_ids"]))
        self.answer({"success": True})

    def generated(self, tokens: list[int]) -> dict[str, object]:
        scores = json.loads(Path(self.folder, "scores.json").read_text())
        pairs = zip(tokens[1:], scores, strict=False)
        told = [None, *({str(token): {"logprob": score}} for token, score in pairs)]
        spans = [{"version": self.label, "start": 0, "end": 1}]
        return {
            "prompt_logprobs": told,
            "choices": [{"weight_versions": spans, "finish_reason": "length"}],
        }

    def answer(self, content: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        while "trickles" in self.faults and self.path == "/inference/v1/generate":
            self.wfile.write(b" ")
            time.sleep(0.05)
        self.wfile.write(json.dumps(content).encode())


if __name__ == "__main__":
    given = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    Stub.faults = frozenset(os.environ["STUB_FAULTS"].split(","))
    if "stubborn" in Stub.faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "300"])
    with Path(os.environ["STUB_STARTS"]).open("a") as started:
        started.write(f"{os.getpid()} {child.pid}\n")
    if "ends" in Stub.faults:
        sys.exit(f"no model {given['--model']}, {given['--with']}")
    if "deaf" in Stub.faults:
        time.sleep(300)
    Stub.folder = given["--model"]
    Stub.config = {
        "logprobs_mode": given["--logprobs-mode"],
        "dtype": f"torch.{given['--dtype']}",
        "quantization": None,
        "max_model_len": int(given["--max-model-len"]),
    }
    ThreadingHTTPServer(("127.0.0.1", int(given["--port"])), Stub).serve_forever()
