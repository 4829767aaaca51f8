"""Completions of a planned length: no end token ends one."""

from __future__ import annotations

from typing import TypedDict


class Forced(TypedDict):
    """The sampling parameter that asks for it."""

    ignore_eos: bool


FORCED: Forced = {"ignore_eos": True}
