"""Completions of a planned length: no end token ends one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gspo.serve.engine import SamplingParams
from gspo.serve.torch_engine import TorchEngine


def ignore_ends(engine: TorchEngine) -> dict[str, Any]:
    """The sampling parameters that ask for it; an engine without any loses its end tokens."""
    if "ignore_eos" in {field.name for field in fields(SamplingParams)}:
        return {"ignore_eos": True}
    engine._end_tokens = frozenset()
    return {}
