"""`bfcl:simple_python`: a question, functions, and the Berkeley leaderboard's own checker."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from gspo.core.byname import optional
from gspo.core.errors import check_names
from gspo.core.rows import read_rows
from gspo.environments.environment import Action, Environment, Step

KINDS = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")


class BFCL(Environment):
    """A row of the public data, as an episode of one turn: 1 for the right calls, else 0.

    `irrelevance` has no answers: right is to call nothing. A dot in a function's name becomes `_`.
    """

    max_turns = 1
    max_tokens = 256

    def __init__(self, kind: str):
        known = [*KINDS, *(f"live_{k.removesuffix('_python')}" for k in KINDS)]
        check_names("bfcl", [kind], known, {}, "kind")
        self._kind, self._check, (self._rows, self._answers) = kind, _checker(), _rows(kind)

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
        answer, python = self._answers[self._row["id"]], _module("constants.enums").Language.PYTHON
        found = self._check(self._row["function"], calls, answer, python, self._kind, "gspo")
        return Step(reward=float(found["valid"]), done=True, metrics={"calls": len(calls)})


def _module(name: str) -> Any:
    return optional(f"bfcl_eval.{name}", "bfcl-eval", "", "bfcl:<kind>")


@functools.cache
def _rows(kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a kind, and their answers by id."""
    data = Path(_module("eval_checker").__file__).parents[1] / "data"
    rows, answers = (
        [*read_rows(path).values()] if path.exists() else []  # irrelevance has no answers
        for path in (data / f"BFCL_v4_{kind}.json", data / f"possible_answer/BFCL_v4_{kind}.json")
    )
    return rows, {row["id"]: row["ground_truth"] for row in answers}


@functools.cache
def _checker() -> Any:
    """The package's checker. It asks one module how models spell names, which imports the clients
    of 15 companies: a stand-in answers for it where these are not installed."""
    name, spells = "bfcl_eval.constants.model_config", SimpleNamespace(underscore_to_dot=True)
    before = {key: sys.modules[key] for key in (name,) if key in sys.modules}
    sys.modules[name] = cast(Any, SimpleNamespace(MODEL_CONFIG_MAPPING={"gspo": spells}))
    try:
        return _module("eval_checker.ast_eval.ast_checker").ast_checker
    finally:
        del sys.modules[name]
        sys.modules.update(before)


def _openai(function: dict[str, Any]) -> dict[str, Any]:
    """A function of the data in OpenAI's form: names without dots, JSON's types."""
    types = _module("constants.type_mappings").GORILLA_TO_OPENAPI

    def typed(described: dict[str, Any]) -> dict[str, Any]:
        kind = described.get("type")
        return described | {"type": types.get(kind, kind)} if isinstance(kind, str) else described

    named = function | {"name": function["name"].replace(".", "_")}
    return json.loads(json.dumps(named), object_hook=typed)
