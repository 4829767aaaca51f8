"""A few trajectories of a run, for its page: text, tokens, and how they were trained on.

Steps and groups are taken at even distances, whatever they hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from gspo.core.errors import RunError
from gspo.experiment.saved_run import SavedRun
from gspo.experiment.watch import message_text, spaced

STEPS, GROUPS, COMPLETIONS = 3, 3, 6
LONGEST = 600
"""Tokens of a trajectory that are shown; of a message, four times as many characters."""
_FAINTEST = 1e-4
"""The scale of the tints never ends below this |d_t|."""
_COLUMNS = [
    *("group", "trajectory", "reward", "advantage", "messages", "token_ids", "logprobs", "update"),
    *("sequence_log_ratios", "trained_tokens", "clipped_tokens", "token_log_ratios"),
    *("additional_histories", "turn_rewards", "turn_advantages"),
]

Row = Mapping[str, Any]
Part = tuple[str, str, Sequence[tuple[int, str, float, float | None]]]
"""Role and text of a message; before the text, the tokens that were sampled: id, text, log-prob and
d_t of each, None if it was not trained on."""


def sampled_groups(run: SavedRun) -> list[dict[str, Any]]:
    """Some groups of some steps, as run.html shows them.

    Each has a `title`, the `scale` of its tints, the `prompt` that its trajectories begin with
    (role and text of each message), and the `trajectories`: rows of the file with their `turns`
    and `parts`.

    Raises:
        RunError: a file of trajectories is damaged.
    """
    tokenizer, files = _tokenizer(run.folder), [*run.batches.values()]
    return [group for path in spaced(files, STEPS) for group in _groups(run, path, tokenizer)]


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of the last checkpoint; None without one, or if only Python code reads it."""
    paths = sorted((folder / "checkpoints").glob("[0-9]*/tokenizer.json"))
    try:
        return Tokenizer.from_file(str(paths[-1])) if paths else None
    except Exception:  # tokenizers raises nothing narrower; checkpoints come and go meanwhile
        return None


def _groups(run: SavedRun, path: Path, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=_COLUMNS)  # without those that an older version lacks
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        remedy = "delete it, and the page does without"
        raise RunError(f"{path} is damaged ({error}): {remedy}") from None
    numbers, scale = table["group"].to_numpy(), _scale(table)
    for number in spaced(np.unique(numbers).tolist(), GROUPS):
        members = np.flatnonzero(numbers == number)
        rows = table.take(members[:COMPLETIONS]).to_pylist()
        messages = [json.loads(row["messages"]) for row in rows]
        shared = _shared(messages)
        yield {
            "title": f"{run.label}, step {int(path.stem)}, group {number}: "
            f"{len(rows)} of {len(members)} trajectories",
            "scale": scale,
            "prompt": [_message(message) for message in messages[0][:shared]],
            "trajectories": [
                row | {"turns": _turns(row), "parts": list(_parts(row, rest[shared:], tokenizer))}
                for row, rest in zip(rows, messages, strict=True)
            ],
        }


def _scale(table: pa.Table) -> float:
    """The |d_t| of the strongest tint: the 98 % quantile of the step; 0 without any d_t."""
    if "token_log_ratios" not in table.column_names:
        return 0.0
    turns = pc.call_function("list_flatten", [table["token_log_ratios"]])
    sizes = np.abs(pc.call_function("list_flatten", [turns]).to_numpy())
    sizes = sizes[np.isfinite(sizes)]
    return max(float(np.quantile(sizes, 0.98)), _FAINTEST) if len(sizes) else 0.0


def _shared(messages: Sequence[Sequence[Row]]) -> int:
    """How many messages all trajectories begin with, up to what the model says."""
    columns = zip(*messages, strict=False)
    same = takewhile(lambda c: not c[0].get("sampled") and all(m == c[0] for m in c), columns)
    return len(list(same))


def _turns(row: Row) -> list[tuple[float, int, int]]:
    """Per sequence: its log-ratio, its clipped tokens and its trained tokens."""
    columns = ("sequence_log_ratios", "clipped_tokens", "trained_tokens")
    return list(zip(*(row.get(column) or () for column in columns), strict=True))


def _parts(row: Row, messages: Sequence[Row], tokenizer: Tokenizer | None) -> Iterator[Part]:
    turns, left = iter(range(len(row["token_ids"]))), LONGEST
    further = json.loads(row.get("additional_histories") or "[]")
    for message in (*messages, *_headed(further)):
        turn = next(turns, None) if message.get("sampled") else None
        if turn is None:
            yield *_message(message), ()
            continue
        ids, logprobs = row["token_ids"][turn], row["logprobs"][turn]
        d = row["token_log_ratios"][turn] if row.get("token_log_ratios") else [None] * len(ids)
        columns = (ids[:left], token_texts(ids[:left], tokenizer), logprobs[:left], d[:left])
        rest = f" … {len(ids) - left} more tokens" if len(ids) > left else ""
        left = max(left - len(ids), 0)
        role = str(message.get("role", "assistant")) + _earned(row, turn)
        yield role, rest, list(zip(*columns, strict=True))


def _earned(row: Row, turn: int) -> str:
    """What a turn earned and its advantage, behind its role; nothing if turns have no rewards."""
    rewards, values = row.get("turn_rewards"), row.get("turn_advantages")
    text = f", reward {rewards[turn]:.3g}" if rewards else ""
    return text + (f", A {values[turn]:.3g}" if values else "")


def _headed(further: Sequence[Row]) -> Iterator[Row]:
    """The messages of a trajectory's additional histories, each behind a heading."""
    for number, history in enumerate(further, 2):
        yield {"role": f"conversation {number} of {len(further) + 1}"}
        yield from history["messages"]


def token_texts(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """The text that each token adds; '' as long as a character is incomplete.

    Without a tokenizer, the ids:

    >>> token_texts([7, 8], None)
    ['⟨7⟩', '⟨8⟩']
    """
    if tokenizer is None:
        return [f"⟨{i}⟩" for i in ids]
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, i) or "" for i in ids]


def _message(message: Row) -> tuple[str, str]:
    """Role and text of a message."""
    text = message_text(message)
    if len(text) > 4 * LONGEST:
        text = f"{text[: 4 * LONGEST]} … {len(text) - 4 * LONGEST:,} more characters"
    return str(message.get("role", "")), text
