"""`bfcl:simple_python`: a question, functions, and the Berkeley leaderboard's own checker."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from gspo.core.errors import ConfigError, suggestion
from gspo.environments.environment import Action, Environment, Step, optional

KINDS = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
_NAMED = "gspo"


class BFCL(Environment):
    """A row of the public data, as an episode of one turn: 1 for the right calls, else 0.

    `irrelevance` has no answers: right is to call nothing. A dot in a function's name becomes `_`.
    """

    max_turns = 1
    max_tokens = 256

    def __init__(self, kind: str):
        if kind not in (known := [*KINDS, *(f"live_{k.removesuffix('_python')}" for k in KINDS)]):
            near = suggestion(kind, known)
            raise ConfigError(f"bfcl has no {kind!r}.{near} Known: {', '.join(known)}.")
        self._kind, (self._rows, self._answers) = kind, _rows(kind)

    def instance(self, seed: int) -> str:
        return self._rows[seed % len(self._rows)]["id"]

    def reset(self, seed: int) -> str:
        self._row = self._rows[seed % len(self._rows)]
        told = {message["role"]: message["content"] for message in self._row["question"][0]}
        self.system_prompt = told.get("system")
        self.tools = [{"type": "function", "function": _openai(f)} for f in self._row["function"]]
        return told["user"]

    def step(self, action: Action) -> Step:
        if "irrelevance" in self._kind:
            return Step(reward=float(not action.calls), done=True)
        calls = [{call.name: dict(call.arguments)} for call in action.calls]
        answer = self._answers[self._row["id"]]
        python = optional("bfcl_eval.constants.enums", "bfcl-eval", "bfcl").Language.PYTHON
        found = _checker()(self._row["function"], calls, answer, python, self._kind, _NAMED)
        return Step(reward=float(found["valid"]), done=True, metrics={"calls": len(calls)})


@functools.cache
def _rows(kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder = Path(optional("bfcl_eval", "bfcl-eval", "bfcl").__file__).parent / "data"
    rows, answers = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if (path := folder / sub / f"BFCL_v4_{kind}.json").exists()
        else []
        for sub in ("", "possible_answer")
    )
    return rows, {row["id"]: row["ground_truth"] for row in answers}


@functools.cache
def _checker() -> Any:
    """The package's checker. It asks one module how models spell names, which imports the clients
    of 15 companies: a stand-in answers for it where these are not installed."""
    name = "bfcl_eval.constants.model_config"
    stand_in: Any = ModuleType(name)
    stand_in.MODEL_CONFIG_MAPPING = {_NAMED: SimpleNamespace(underscore_to_dot=True)}
    before, sys.modules[name] = sys.modules.get(name), stand_in
    try:
        return optional(
            "bfcl_eval.eval_checker.ast_eval.ast_checker", "bfcl-eval", "bfcl"
        ).ast_checker
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def _openai(function: dict[str, Any]) -> dict[str, Any]:
    """A function of the data in OpenAI's form: names without dots, JSON's types."""
    types = optional("bfcl_eval.constants.type_mappings", "bfcl-eval", "bfcl").GORILLA_TO_OPENAPI

    def schema(part: Any) -> Any:
        if isinstance(part, list):
            return [schema(item) for item in part]
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        named = {"type": types.get(kind, kind)} if isinstance(kind, str) else {}
        return {key: schema(value) for key, value in part.items()} | named

    return {**schema(function), "name": function["name"].replace(".", "_")}
