"""Columns of a trajectory's row that say what training made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gspo.train.observe import Trace


def trace_columns(traces: Sequence[Trace], turns: Sequence[int]) -> dict[str, Any]:
    """The columns of one trajectory, null where it was not trained on.

    Args:
        traces: its sequences, one or one for each turn.
        turns: sampled tokens of each turn.
    """
    if not traces:
        return dict.fromkeys(name for name, _ in trace_schema())
    d = np.concatenate([trace.token_log_ratios for trace in traces])
    return {
        "update": traces[0].update,
        "sequence_log_ratios": [trace.log_ratio for trace in traces],
        "trained_tokens": [trace.trained_tokens for trace in traces],
        "clipped_tokens": [trace.clipped_tokens for trace in traces],
        "token_log_ratios": np.split(d, np.cumsum(turns)[:-1]),
    }


def trace_schema() -> list[tuple[str, Any]]:
    """Names and arrow types."""
    import pyarrow as pa

    return [
        ("update", pa.int32()),
        ("sequence_log_ratios", pa.list_(pa.float64())),
        ("trained_tokens", pa.list_(pa.int32())),
        ("clipped_tokens", pa.list_(pa.int32())),
        ("token_log_ratios", pa.list_(pa.list_(pa.float32()))),
    ]
