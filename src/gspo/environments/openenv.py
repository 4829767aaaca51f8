"""`openenv:http://host:port`: an environment that a server of OpenEnv holds."""

from __future__ import annotations

import json
from typing import Any

from gspo.core.byname import optional
from gspo.core.errors import ConfigError, RolloutError, shown
from gspo.environments.environment import Action, Environment, Step


class OpenEnv(Environment):
    """One session of the server, over its `/ws`: what it posts to `/reset` and `/step` forgets.

    Args:
        url: of the server, as a browser would have it.
        action: the field of an action that takes the model's text.
        observation: the field of an observation that the model is shown; None: all of it, as JSON.
        reset: further fields of a reset, such as a task's name.
    """

    def __init__(
        self,
        url: str,
        action: str = "message",
        observation: str | None = None,
        reset: dict[str, Any] | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"openenv:{url}: give the server's URL, openenv:http://host:port")
        self._connect = optional("websockets.sync.client", "websockets", "openenv", url).connect
        self._url, self._field, self._shown, self._reset = url, action, observation, reset or {}
        self._socket: Any = None

    def reset(self, seed: int) -> str:
        if self._socket is None:
            address = f"ws{self._url.removeprefix('http').rstrip('/')}/ws"
            try:
                self._socket = self._connect(address, max_size=None)
            except OSError as error:
                raise RolloutError(f"no OpenEnv server answers at {self._url}: {error}") from None
        return self._ask("reset", self._reset | {"seed": seed}).text  # pyright: ignore

    def step(self, action: Action) -> Step:
        return self._ask("step", {self._field: action.text})

    def instance(self, seed: int) -> None:
        """Only the server knows."""

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, kind: str, data: dict[str, Any]) -> Step:
        self._socket.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(self._socket.recv())
        if answer.get("type") != "observation":
            raise RolloutError(f"{self._url} answers a {kind} with {shown(answer)}")
        told = answer["data"]
        text = told["observation"]
        if self._shown is not None and self._shown not in text:
            raise RolloutError(f"{self._url}: no field {self._shown!r}; there are {[*text]}")
        text = json.dumps(text) if self._shown is None else str(text[self._shown])
        return Step(text, told.get("reward") or 0.0, bool(told.get("done")))
