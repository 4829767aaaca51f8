"""Routes of an MoE engine: which experts computed each token, as they travel with a Choice."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gspo.core.errors import DataError

_DTYPES = ("uint8", "int16")


def encode_routes(routes: np.ndarray) -> dict[str, Any]:
    """[R, layers, k] -> what `decode_routes` reads, in JSON.

    >>> encode_routes(np.zeros((1, 1, 2), np.uint8))
    {'shape': [1, 1, 2], 'dtype': 'uint8', 'data': 'AAA='}
    """
    data = base64.b64encode(np.ascontiguousarray(routes).tobytes()).decode()
    return {"shape": list(routes.shape), "dtype": str(routes.dtype), "data": data}


def decode_routes(value: Any, tokens: int, where: str) -> np.ndarray | None:
    """The routes of a Choice, or None where it has none.

    Args:
        value: what `encode_routes` returned.
        tokens: how many tokens they must be of.
        where: names the Choice in errors.

    Raises:
        DataError: a value that is damaged, or of another number of tokens.
    """
    if value is None:
        return None
    try:
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}, not a dict")
        shape, dtype = tuple(value["shape"]), value["dtype"]
        data = base64.b64decode(value["data"], validate=True)
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {_DTYPES}")
        routes = np.frombuffer(data, dtype=dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as error:
        raise DataError(f"{where}: routed_experts is damaged ({error})") from None
    if routes.ndim != 3 or len(routes) != tokens:
        raise DataError(
            f"{where}: routed_experts has shape {list(shape)}; it must be [{tokens}, layers, k], "
            "one row for each token but the last"
        )
    return routes


def joined(earlier: np.ndarray | None, later: np.ndarray | None) -> np.ndarray | None:
    """Routes of a sample after one more turn.

    A token keeps the route that it was sampled with: the later turn's prefill fills in the rest.
    """
    if earlier is None or later is None:
        return later if earlier is None else earlier
    if earlier.shape[1:] != later.shape[1:]:
        raise DataError(f"turns with routes of {earlier.shape[1:]} and {later.shape[1:]} experts")
    return np.concatenate([earlier, later[len(earlier) :]])


def route_shape(routes: Iterable[np.ndarray | None]) -> tuple[int, int] | None:
    """(layers, k) of all routes that there are, or None without any.

    Raises:
        DataError: they are not all alike.
    """
    shapes = {own.shape[1:] for own in routes if own is not None}
    if len(shapes) > 1:
        raise DataError(f"samples with routes of different shapes: {sorted(shapes)}")
    return shapes.pop() if shapes else None


def padded_routes(routes: np.ndarray | None, length: int, shape: tuple[int, int]) -> np.ndarray:
    """[length, layers, k], int16: a sample's routes, -1 where it has none.

    >>> padded_routes(np.array([[[3]]], np.uint8), 2, (1, 1)).tolist()
    [[[3]], [[-1]]]
    """
    out = np.full((length, *shape), -1, dtype=np.int16)
    if routes is not None:
        out[: len(routes)] = routes
    return out


def pack_routes(
    routes: Sequence[np.ndarray | None], lengths: Sequence[int]
) -> Int[Tensor, "U N K"] | None:
    """The routes of samples one after the other, int16; -1 where a token has none.

    None where no sample has any.

    >>> pack_routes([np.array([[[3]]], np.uint8), None], [2, 1]).tolist()
    [[[3]], [[-1]], [[-1]]]
    """
    shape = route_shape(routes)
    if shape is None:
        return None
    parts = [padded_routes(own, n, shape) for own, n in zip(routes, lengths, strict=True)]
    return torch.from_numpy(np.concatenate(parts))
