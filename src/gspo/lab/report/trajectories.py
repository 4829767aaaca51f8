"""A few trajectories of a run, small enough to be embedded: text, tokens and what was made of them.

Steps and groups are taken at even distances, whatever they hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspo.core.errors import RunError
from gspo.lab.report.data import RunData

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STEPS, GROUPS, COMPLETIONS = 3, 3, 8
TOKENS = 60_000
"""Of all trajectories of a report together."""
LONGEST = 2_000
"""Tokens of a turn that are shown; of a message, four times as many characters."""
_FAINTEST = 1e-4
"""The scale of the tints never ends below this |d_t|."""
_COLUMNS = (
    "group",
    "trajectory",
    "reward",
    "advantage",
    "messages",
    "token_ids",
    "logprobs",
    "update",
    "sequence_log_ratios",
    "trained_tokens",
    "clipped_tokens",
    "token_log_ratios",
)


def sampled_trajectories(run: RunData, tokens: int = TOKENS) -> dict[str, Any] | None:
    """What the page's browser of trajectories reads; None where the run has none.

    `scale` is the |d_t| of the strongest tint: the 98 % quantile of the tokens shown.
    """
    files = _train_files(run.folder)
    if not files:
        return None
    tokenizer = _tokenizer(run.folder)
    share = tokens // (STEPS * GROUPS)
    chosen = [files[i] for i in spaced(len(files), STEPS)]
    steps = [{"step": int(p.stem), "groups": _groups(p, share, tokenizer)} for p in chosen]
    turns = (
        part["d"]
        for step in steps
        for group in step["groups"]
        for item in group["items"]
        for part in item["parts"]
        if part.get("d")
    )
    sizes = [abs(d) for turn in turns for d in turn if d is not None]
    scale = max(float(np.quantile(sizes, 0.98)), _FAINTEST) if sizes else None
    return {"label": run.label, "scale": scale, "steps": steps, "batches": len(files)}


def spaced(size: int, count: int) -> list[int]:
    """Up to `count` of the indices 0..size-1: the first, the last, and some evenly between.

    >>> spaced(10, 3), spaced(2, 3)
    ([0, 4, 9], [0, 1])
    """
    if size <= count:
        return list(range(size))
    return [i * (size - 1) // (count - 1) for i in range(count)]


def _train_files(folder: Path) -> list[Path]:
    found = (folder / "trajectories" / "train").glob("*.parquet")
    return sorted((p for p in found if p.stem.isdigit()), key=lambda path: int(path.stem))


def _tokenizer(folder: Path) -> Tokenizer | None:
    """That of a checkpoint; None where there is none, or one that only Python code can read."""
    from tokenizers import Tokenizer

    for path in sorted((folder / "checkpoints").glob("[0-9]*/tokenizer.json"), reverse=True):
        try:
            return Tokenizer.from_file(str(path))
        except Exception:  # tokenizers raises nothing narrower; checkpoints come and go meanwhile
            continue
    return None


def _groups(path: Path, share: int, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Of each chosen group, the first completions that fit `share` tokens, at least two."""
    import pyarrow.parquet as pq

    # Files from before this report lack its columns: they are null here.
    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in _COLUMNS if name in file.schema_arrow.names]
            table = file.read(columns=present)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        remedy = "delete it, and the page does without"
        raise RunError(f"{path} is damaged ({error}): {remedy}") from None
    numbers = table["group"].to_numpy()
    known = np.unique(numbers)
    out = []
    for group in known[spaced(len(known), GROUPS)].tolist():
        rows = table.take(np.flatnonzero(numbers == group)[:COMPLETIONS]).to_pylist()
        used, kept = 0, []
        for row in rows:
            used += sum(min(len(turn), LONGEST) for turn in row["token_ids"])
            if len(kept) >= 2 and used > share:
                break
            kept.append(row)
        out.append(_group(group, kept, int((numbers == group).sum()), tokenizer))
    return out


def _group(
    number: int, rows: Sequence[Mapping[str, Any]], size: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The messages that all completions begin with are stored once."""
    messages = [json.loads(row["messages"]) for row in rows]
    shared = 0
    while all(len(own) > shared and own[shared] == messages[0][shared] for own in messages):
        if messages[0][shared].get("sampled"):
            break
        shared += 1
    return {
        "group": number,
        "size": size,
        "prompt": [_message(message) for message in messages[0][:shared]],
        "items": [
            _item(row, own[shared:], tokenizer) for row, own in zip(rows, messages, strict=True)
        ],
    }


def _item(
    row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    log_ratios = row.get("token_log_ratios")
    parts, turn = [], 0
    for message in messages:
        if not message.get("sampled") or turn >= len(row["token_ids"]):
            parts.append(_message(message))
            continue
        ids, d = row["token_ids"][turn], log_ratios and log_ratios[turn]
        parts.append(
            {
                "role": str(message.get("role", "assistant")),
                "tokens": token_texts(ids[:LONGEST], tokenizer),
                "ids": ids[:LONGEST],
                "logprobs": [_short(value) for value in row["logprobs"][turn][:LONGEST]],
                "d": None if d is None else [_short(value) for value in d[:LONGEST]],
                "more": max(len(ids) - LONGEST, 0),
            }
        )
        turn += 1
    return {
        "trajectory": row["trajectory"],
        "reward": _short(row["reward"]),
        "advantage": _short(row["advantage"]),
        "update": row.get("update"),
        "log_ratios": row.get("sequence_log_ratios"),
        "trained": row.get("trained_tokens"),
        "clipped": row.get("clipped_tokens"),
        "parts": parts,
    }


def token_texts(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """The text that each token adds; '' where a character is still incomplete.

    Without a tokenizer, the ids:

    >>> token_texts([7, 8], None)
    ['⟨7⟩', '⟨8⟩']
    """
    if tokenizer is None:
        return [f"⟨{i}⟩" for i in ids]
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, i) or "" for i in ids]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "sampled") and v}
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    if rest:
        text += ("\n" if text else "") + json.dumps(rest, ensure_ascii=False)
    limit = 4 * LONGEST
    if len(text) > limit:
        text = f"{text[:limit]} … {len(text) - limit:,} more characters"
    return {"role": str(message.get("role", "")), "text": text}


def _short(value: float | None) -> float | None:
    """Four digits; None for what is not finite, which JSON doesn't know."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
