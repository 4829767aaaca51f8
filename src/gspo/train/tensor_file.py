"""A safetensors file, hashed in the same pass that writes it.

The file is the length of a JSON header, the header, and the bytes of the tensors one after another
(https://huggingface.co/docs/safetensors). The library writes it, but a digest takes a second pass
over gigabytes then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = "float64 F64 float32 F32 bfloat16 BF16 float16 F16 int64 I64 int32 I32 uint8 U8 bool BOOL"
_NAMES = {getattr(torch, own): name for own, name in zip(*[iter(_TYPES.split())] * 2, strict=True)}

Proof = dict[str, int | str]
"""What a manifest says of a file: its `bytes` and `sha256`."""


def proof_of(path: Path) -> Proof:
    """Read a file, and return its size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Proof:
    """Write tensors of the host by name, and return the file's size and SHA-256.

    Raises:
        OSError: it cannot be written.
        KeyError: a type that the format lacks.
    """
    # The widest types first, so that each tensor lies at a multiple of its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        kind, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *(t for _, t in ordered)):
            if isinstance(part, Tensor):
                flat = part.contiguous().reshape(-1).view(torch.uint8)
                part = memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]
            file.write(part)
            digest.update(part)
            size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}
