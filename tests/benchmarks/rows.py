"""A benchmark row for tests."""

from __future__ import annotations

from typing import Any

from harness import Result


def row(ratio: float = 2.0, half: float = 0.1, **changes: Any) -> Result:
    """A result whose spread is `ratio` +- `half`."""
    fields: dict[str, Any] = {
        "name": "speed",
        "what": "a case",
        "shape": "2 x 3",
        "ours_s": 1.0,
        "other_s": ratio,
        "other": "the peer",
        "ratio": ratio,
        "spread": (ratio - half, ratio + half),
        "repeats": 5,
    }
    return Result.of(fields | changes)
