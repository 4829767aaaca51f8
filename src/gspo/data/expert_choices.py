"""Which experts of an MoE model computed each token, as it travels with a Choice and is packed.

The expert choices of R tokens are an array [R, N, K]: K expert numbers in each of N MoE layers.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from gspo.core.errors import DataError

_DTYPES = ("uint8", "int16")


def encode_expert_choices(chosen: np.ndarray) -> dict[str, Any]:
    """[R, N, K] -> what `decode_expert_choices` reads, in JSON.

    >>> encode_expert_choices(np.zeros((1, 1, 2), np.uint8))
    {'shape': [1, 1, 2], 'dtype': 'uint8', 'data': 'AAA='}
    """
    data = base64.b64encode(np.ascontiguousarray(chosen).tobytes()).decode()
    return {"shape": list(chosen.shape), "dtype": str(chosen.dtype), "data": data}


def decode_expert_choices(value: Any, tokens: int, where: str) -> np.ndarray | None:
    """[R, N, K] of a Choice, or None if it has none.

    Args:
        value: what `encode_expert_choices` returned.
        tokens: R, for how many tokens there must be choices.
        where: names the Choice in errors.

    Raises:
        DataError: a value that is damaged, or of another number of tokens.
    """
    if value is None:
        return None
    try:
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}, not a dict")
        if value["dtype"] not in _DTYPES:
            raise ValueError(f"dtype {value['dtype']!r} is not one of {_DTYPES}")
        data = base64.b64decode(value["data"], validate=True)
        chosen = np.frombuffer(data, dtype=value["dtype"]).reshape(tuple(value["shape"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: routed_experts is damaged ({error})") from None
    if chosen.ndim != 3 or len(chosen) != tokens:
        raise DataError(
            f"{where}: routed_experts has shape {list(chosen.shape)}; it must be "
            f"[{tokens}, layers, k], one row for each token but the last"
        )
    return chosen


def joined_expert_choices(
    earlier: np.ndarray | None, later: np.ndarray | None
) -> np.ndarray | None:
    """Expert choices of a sample after one more turn.

    A token keeps the experts that it was sampled with: the later turn's prefill fills in the rest.
    """
    if earlier is None or later is None:
        return later if earlier is None else earlier
    if earlier.shape[1:] != later.shape[1:]:
        raise DataError(
            f"turns with expert choices of shape {earlier.shape[1:]} and {later.shape[1:]}"
        )
    return np.concatenate([earlier, later[len(earlier) :]])


def padded_expert_choices(
    chosen: Sequence[np.ndarray | None], lengths: Sequence[int]
) -> list[np.ndarray] | None:
    """int16 [L, N, K] of each sample of L tokens, -1 where a token has none; None if no sample has.

    Raises:
        DataError: samples of different (N, K).

    >>> first, second = padded_expert_choices([np.array([[[3]]], np.uint8), None], [2, 1])
    >>> first.tolist(), second.tolist()
    ([[[3]], [[-1]]], [[[-1]]])
    """
    shapes = {array.shape[1:] for array in chosen if array is not None}
    if len(shapes) > 1:
        raise DataError(f"samples with expert choices of different shapes: {sorted(shapes)}")
    if not shapes:
        return None
    padded = [np.full((length, *next(iter(shapes))), -1, dtype=np.int16) for length in lengths]
    for array, values in zip(padded, chosen, strict=True):
        if values is not None:
            array[: len(values)] = values
    return padded
