"""`gspo sample`, `gspo chat` and `gspo serve`."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gspo.core.errors import ConfigError, ModelError, RequestError
from gspo.experiment import talk
from gspo.experiment.run_file import flat
from gspo.experiment.saved_run import SavedRun
from gspo.experiment.spec import Spec
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.tasks.dataset import Data, DatasetTask


@pytest.fixture(scope="module")
def policy() -> Policy:
    loaded = load_policy("embedded:sort")
    choose_packing(loaded)
    return loaded


@pytest.fixture
def model(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(talk, "load_named", lambda name, step, path: (policy, None))
    return "embedded:sort"


async def sampled(model: str, *prompts: str, **options: Any) -> list[dict[str, Any]]:
    where: dict[str, Any] = {"step": None, "path": "", "system": "", "completions": 2}
    return await talk.sample(model, prompts, **where, options={"temperature": 0, **options})


async def test_prompts_are_answered(model: str, capsys: pytest.CaptureFixture[str]):
    found = await sampled(model, "3214", "12\x1b[2J", max_tokens=3)
    assert [row["prompt"] for row in found] == ["3214"] * 2 + ["12\x1b[2J"] * 2
    assert {row["finish_reason"] for row in found} == {"length"}
    told = capsys.readouterr().out
    assert told.startswith(f"3214\n  -> {found[0]['completion']}   (cut at the limit of tokens)\n")
    assert "\x1b" not in told


async def test_without_prompts_those_of_its_task_are_scored(model: str, capsys):
    found = await sampled(model)
    assert len({row["prompt"] for row in found}) == 3 and len(found) == 6
    assert {row["reward"] for row in found} <= {0.0, 1.0}
    for row in found:
        assert row["reward"] == float(row["completion"] == "".join(sorted(row["prompt"])))
    with pytest.raises(ConfigError, match="no task with prompts of its own: give a prompt"):
        await sampled("a/folder")


async def test_a_prompt_that_is_too_long_is_refused(model: str):
    with pytest.raises(RequestError, match="the engine refuses a prompt"):
        await sampled(model, "1" * 10_000)


async def test_a_model_without_a_template_is_sent_plain_text(
    model: str, policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(policy.tokenizer, "chat_template", None)
    found = await sampled(model, "3214", max_tokens=3)
    assert len(found) == 2 and len(found[0]["completion"]) == 3
    with pytest.raises(ConfigError, match="has no chat template"):
        await talk.chat(model, step=None, path="", system="", options={})


async def test_a_conversation_goes_on_until_it_is_begun_anew(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[list[str]] = []
    streamed = talk._streamed

    async def watched(client: Any, history: list[dict[str, Any]], options: Any) -> str:
        seen.append([message["content"] for message in history])
        return await streamed(client, history, options)

    monkeypatch.setattr(talk, "_streamed", watched)
    lines = ["12", "34", "9" * 1000, "", "56", "/new", "78", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    options = {"temperature": 0, "max_tokens": 2}
    await talk.chat(model, step=None, path="", system="s", options=options)
    out, err = capsys.readouterr()
    one, two, *rest = out.splitlines()
    assert seen[0] == ["s", "12"] and seen[1] == ["s", "12", one, "34"]
    assert seen[3] == ["s", "12", one, "34", two, "56"]  # the one that was refused is forgotten
    assert seen[4:] == [["s", "78"]] and len(rest) == 2
    assert err.count("refused: ") == 1


async def test_a_run_on_own_data_is_asked_its_held_out_rows(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    rows, code = tmp_path / "rows.jsonl", tmp_path / "lengths.py"
    lines = [json.dumps({"prompt": str(n), "answer": f"a{n}"}) for n in range(1000, 1020)]
    rows.write_text("\n".join(lines))
    code.write_text("def size(completion, row):\n    return len(row['answer'])")
    fields: dict[str, Any] = {"dataset": str(rows), "reward": [f"{code}:size"], "max_tokens": 3}

    def named(*_: Any) -> tuple[Policy, SavedRun]:
        return policy, SavedRun(tmp_path, {}, flat(spec.model_dump(mode="json")))

    monkeypatch.setattr(talk, "load_named", named)
    spec = Spec(**fields, model="embedded:sort")
    task = spec.make_task()
    assert isinstance(task, DatasetTask)
    found = await sampled("mine")
    held = {problem.prompt for problem in task.problems["heldout"]}
    assert {row["prompt"] for row in found} == held and len(held) == 2
    assert {row["reward"] for row in found} == {5.0}
    spec = Spec(**fields, model="embedded:sort", eval_prompts=0, data=Data(heldout=0))
    with pytest.raises(ConfigError, match="no task with prompts of its own"):
        await sampled("mine")
    rows.unlink()
    with pytest.raises(ConfigError, match=r"prompts of 'mine': .*rows.jsonl.*; or give a prompt"):
        await sampled("mine")


SERVER = """
import asyncio
from gspo.experiment import talk
from gspo.serve import server
from gspo.serve.fake_engine import FakeEngine

class Slow(FakeEngine):
    async def complete(self, request):
        print("sampling", flush=True)
        await asyncio.sleep(120)

server.STOP_SECONDS = 1
talk.load_named = lambda *_: (None, None)
talk.make_engine = lambda *_, **__: Slow()
talk.serve_model("x", "127.0.0.1", 0, "m", None)
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


# SIGINT ends an idle server in test_cli.py.
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, -15), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
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
    bound = talk.bind
    monkeypatch.setattr(talk, "bind", lambda *a: opened.append(bound(*a)) or opened[-1])
    with pytest.raises(ModelError, match="unknown model"):
        talk.serve_model("embedded:srt", "127.0.0.1", 0, "m", None)
    assert [listener.fileno() for listener in opened] == [-1]


def test_a_host_without_a_key_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match="Choose an API key"):
        talk.serve_model("embedded:sort", "0.0.0.0", 0, "m", None)
    assert "loading" not in capsys.readouterr().err
