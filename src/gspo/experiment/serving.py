"""`gspo serve`: a model behind OpenAI's API, on a port."""

from __future__ import annotations

import logging
import signal
import sys

from gspo.core.compute import ComputeThread
from gspo.experiment.saved_run import load_named
from gspo.experiment.stop import leave
from gspo.serve.app import create_app, one_engine
from gspo.serve.selfcheck import make_engine
from gspo.serve.server import address, bind, serve


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
    with bind(host, port, api_key) as listener:
        print(f"loading {model} ...", file=sys.stderr, flush=True)
        policy, _ = load_named(model, step, path)
        compute = ComputeThread()
        engine = make_engine(policy, compute, sockets=True)
        app = create_app(one_engine(engine, lambda: [name]), lambda: [name])
        print(f"serving {name} on {address(listener)}", flush=True)
        try:
            serve(app, listener, api_key)
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        finally:
            compute.close()
    leave(status)  # a batch that is still sampled has nobody left who wants it
