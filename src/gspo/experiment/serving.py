"""`gspo serve`: a model behind OpenAI's API, on a port."""

from __future__ import annotations

import logging
import signal
from contextlib import closing

from gspo.core.compute import ComputeThread
from gspo.experiment.stop import leave
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.serve.app import create_app, one_engine
from gspo.serve.selfcheck import make_engine
from gspo.serve.server import address, bind, serve


def serve_model(model: str, host: str, port: int, name: str, api_key: str | None) -> None:
    """Load `model` and answer requests until SIGINT or SIGTERM; then end the process.

    Args:
        model: what to load.
        host, port: where to listen.
        name: of the model in requests.
        api_key: what requests must bring.

    Raises:
        ConfigError: a host that others can reach, and no key.
        ServeError: the port is in use; nothing was loaded then.
        ModelError: the model cannot be loaded.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    status = 0
    with bind(host, port, api_key) as listener, closing(ComputeThread()) as compute:
        policy = load_policy(model)
        choose_packing(policy)
        engine = make_engine(policy, compute, sockets=True)
        app = create_app(one_engine(engine, lambda: [name]), lambda: [name])
        print(f"serving {name} on {address(listener)}", flush=True)
        try:
            serve(app, listener, api_key)
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
    leave(status)  # a batch that is still sampled has nobody left who wants it
