"""`gspo sample`, `gspo chat` and `gspo serve`: any checkpoint of a run, or any model, answers."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

from openai import APIStatusError

from gspo.core.compute import ComputeThread, leave
from gspo.core.errors import ConfigError, GspoError
from gspo.experiment.rollout import ask, plain_prompt
from gspo.experiment.saved_run import SavedRun, load_named
from gspo.experiment.watch import visible
from gspo.policy.embedded import PREFIX
from gspo.policy.policy import Policy
from gspo.serve.app import create_app, one_engine
from gspo.serve.local_client import LocalClient
from gspo.serve.selfcheck import make_engine
from gspo.serve.server import Serving, address, bind, serve
from gspo.tasks import Problem, Task, load_task
from gspo.tasks.task import conversation

MODEL = "model"


async def sample(
    name: str,
    prompts: Sequence[str],
    *,
    step: str | None,
    path: str,
    completions: int,
    system: str,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Print answers to prompts; without any, to held-out prompts of the model's own task.

    Args:
        name, step, path: see `load_named`.
        prompts: user turns, a conversation each.
        completions: of each prompt.
        system: the system turn before each prompt; "": none.
        options: of the request, such as `temperature`.

    Returns:
        One object a completion: prompt, completion, finish_reason, and the task's reward.

    Raises:
        ConfigError: no prompt, and no task that has some.
        RequestError: the engine refuses a prompt.
    """
    # Conversations to answer, and the task's problem that each is of, if it is one.
    asked: list[tuple[list[dict[str, Any]], Problem | None]] = []
    asked += [(conversation(system, prompt), None) for prompt in prompts]
    found: list[dict[str, Any]] = []
    request: dict[str, Any] = {"model": MODEL, "n": completions, **options}
    policy, run = load_named(name, step, path)
    chats = policy.tokenizer.chat_template is not None
    async with client_of(policy) as client:
        task = None if asked else _task_of(name, run)
        if task is not None:
            count = min(3, (task.sizes or {}).get("heldout", 3))
            problems = [task.problem("heldout", index) for index in range(count)]
            asked = [(task.messages(problem), problem) for problem in problems]
            limit = (run and run.spec and run.spec.max_tokens) or task.max_tokens
            request = {"max_tokens": limit, **request}
        variables = task and task.template_kwargs
        for messages, problem in asked:
            print(f"{visible(plain_prompt(messages)).rstrip()}")
            for choice in await ask(client, messages, chats, variables, **request):
                text = choice.message.content or ""
                row = {"prompt": messages[-1]["content"], "completion": text}
                row["finish_reason"] = choice.finish_reason
                told = "" if choice.finish_reason != "length" else "   (cut at the limit of tokens)"
                if task is not None and problem is not None:
                    row["reward"] = (await task.grade(problem, [text]))[0][0]
                    told += f"   (reward {row['reward']:.3f})"
                found.append(row)
                print(f"  -> {visible(text)}{told}")
    return found


async def chat(
    name: str, *, step: str | None, path: str, system: str, options: Mapping[str, Any]
) -> None:
    """Talk on the terminal until the input ends or says /quit; /new begins anew.

    A message that the engine refuses, since the context is full, is told and forgotten.

    Raises:
        ConfigError: a model without a chat template.
    """
    policy, _ = load_named(name, step, path)
    if policy.tokenizer.chat_template is None:
        raise ConfigError(f"{name!r} has no chat template: use gspo sample, with whole prompts")
    async with client_of(policy) as client:
        print("/new begins a new conversation, /quit or Ctrl-D ends", file=sys.stderr)
        history = conversation(system)
        while (text := _read_line()) != "/quit":
            if text == "/new":
                history = conversation(system)
            elif text:
                history.append({"role": "user", "content": text})
                try:
                    answer = await _streamed(client, history, options)
                    history.append({"role": "assistant", "content": answer})
                except APIStatusError as error:
                    history.pop()
                    print(f"refused: {error.message} (/new begins anew)", file=sys.stderr)


async def _streamed(
    client: LocalClient, history: list[dict[str, Any]], options: Mapping[str, Any]
) -> str:
    """Print an answer as it comes, and return it."""
    parts: list[str] = []
    messages: Any = history
    stream: Any = await client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, **options
    )
    async for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            parts.append(text)
            print(visible(text), end="", flush=True)
    print(flush=True)
    return "".join(parts)


def _read_line() -> str:
    """The next message; /quit at the end of the input. A terminal is shown where to write."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/quit"


@asynccontextmanager
async def client_of(policy: Policy) -> AsyncIterator[LocalClient]:
    """A client of a loaded model, which requests call `MODEL`."""
    compute = ComputeThread()
    serving = Serving(make_engine(policy, compute), lambda: [MODEL])
    try:
        await serving.start()
        yield serving.client
    finally:
        await serving.stop()
        compute.close()


def _task_of(name: str, run: SavedRun | None) -> Task:
    """The task or the dataset of a run's file, or the task of an embedded model."""
    if run is not None and run.spec is not None and (run.spec.task or run.spec.reward):
        try:
            task = run.spec.make_task()
        except GspoError as error:
            raise ConfigError(f"the prompts of {name!r}: {error}; or give a prompt") from None
        if task is not None and (task.sizes is None or task.sizes["heldout"]):
            return task
    if run is None and name.startswith(PREFIX):
        return load_task(name.removeprefix(PREFIX))
    raise ConfigError(f"{name!r} has no task with prompts of its own: give a prompt")


def serve_model(
    model: str,
    host: str,
    port: int,
    name: str,
    api_key: str | None,
    step: str | None = None,
    path: str = ".gspo",
) -> None:
    """Load `model` and answer requests until SIGINT or SIGTERM; then end the process.

    Args:
        model, step, path: what to load, see `load_named`.
        host, port: where to listen.
        name: of the model in requests.
        api_key: what requests must bring.

    Raises:
        ConfigError: a host that others can reach, and no key.
        ServeError: the port is in use; nothing was loaded then.
        ModelError: the model cannot be loaded.
        RunError: no such run, or step of it.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    status = 0
    with bind(host, port, api_key) as listener, closing(ComputeThread()) as compute:
        print(f"loading {model} ...", file=sys.stderr, flush=True)
        policy, _ = load_named(model, step, path)
        engine = make_engine(policy, compute, sockets=True)
        app = create_app(one_engine(engine, lambda: [name]), lambda: [name])
        print(f"serving {name} on {address(listener)}", flush=True)
        try:
            serve(app, listener, api_key)
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
    leave(status)  # a batch that is still sampled has nobody left who wants it
