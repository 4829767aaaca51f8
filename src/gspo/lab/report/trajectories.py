"""A few trajectories of a run, small enough to be embedded: text, tokens and what was made of them.

Steps and groups are taken at even distances, whatever they hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from gspo.core.errors import RunError
from gspo.lab.report.run_data import RunData, stored_batches

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

STEPS, GROUPS, COMPLETIONS = 3, 3, 6
LONGEST = 600
"""Tokens of a trajectory that are shown; of a message, four times as many characters."""
_FAINTEST = 1e-4
"""The scale of the tints never ends below this |d_t|."""
_COLUMNS = [
    *("group", "trajectory", "reward", "advantage", "messages", "token_ids", "logprobs", "update"),
    *("sequence_log_ratios", "trained_tokens", "clipped_tokens", "token_log_ratios"),
]
_TOKEN = Markup('<i class="{}" style="--tint:{:.2f}" title="{}">{}</i>')

Row = Mapping[str, Any]
Part = tuple[str, str]
"""Role and text of a message; the text of what was sampled is `Markup`, tinted by d_t."""


def sampled_groups(run: RunData) -> list[dict[str, Any]]:
    """Some groups of some steps, as page.html shows them.

    Each has a `title`, the `prompt` that its trajectories begin with (parts), and the
    `trajectories`: facts and parts of each.

    Raises:
        RunError: a file of trajectories is damaged.
    """
    files = list(stored_batches(run.folder).values())
    tokenizer = _tokenizer(run.folder)
    return [group for path in spaced(files, STEPS) for group in _groups(run, path, tokenizer)]


def spaced(values: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of the values: the first, the last, and some evenly between.

    >>> spaced(range(10), 3), spaced("ab", 3)
    ([0, 4, 9], ['a', 'b'])
    """
    places = np.linspace(0, len(values) - 1, min(count, len(values)))
    return [values[int(place)] for place in places]


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of the last checkpoint; None without one, or if only Python code reads it."""
    from tokenizers import Tokenizer

    paths = sorted((folder / "checkpoints").glob("[0-9]*/tokenizer.json"))
    try:
        return Tokenizer.from_file(str(paths[-1])) if paths else None
    except Exception:  # tokenizers raises nothing narrower; checkpoints come and go meanwhile
        return None


def _groups(run: RunData, path: Path, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

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
            f"{len(rows)} of {len(members)} trajectories"
            + (f", strongest tint at |d_t| = {scale:.2g}" if scale else ""),
            "prompt": [_message(message) for message in messages[0][:shared]],
            "trajectories": [
                (_facts(row), list(_parts(row, rest[shared:], tokenizer, scale)))
                for row, rest in zip(rows, messages, strict=True)
            ],
        }


def _scale(table: pa.Table) -> float:
    """The |d_t| of the strongest tint: the 98 % quantile of the step; 0 without any d_t."""
    import pyarrow.compute as pc

    if "token_log_ratios" not in table.column_names:
        return 0.0
    turns = pc.call_function("list_flatten", [table["token_log_ratios"]])
    sizes = np.abs(pc.call_function("list_flatten", [turns]).to_numpy())
    sizes = sizes[np.isfinite(sizes)]
    return max(float(np.quantile(sizes, 0.98)), _FAINTEST) if len(sizes) else 0.0


def _shared(messages: Sequence[Sequence[Row]]) -> int:
    """How many messages all trajectories begin with, up to what the model says."""
    count = 0
    for column in zip(*messages, strict=False):
        if column[0].get("sampled") or any(message != column[0] for message in column):
            break
        count += 1
    return count


def _facts(row: Row) -> list[str]:
    """Reward, advantage and update; per sequence its ratio and what of it was clipped."""
    advantage, log_ratios = row["advantage"], row.get("sequence_log_ratios")
    facts = [f"reward {row['reward']:.4g}"]
    if advantage is not None:
        facts.append(f"A = {advantage:+.3g}")
    if log_ratios is None:
        return [*facts, "no gradient: A = 0" if advantage == 0 else "no record of its update"]
    turns = zip(log_ratios, row["clipped_tokens"], row["trained_tokens"], strict=True)
    for number, (log_ratio, clipped, trained) in enumerate(turns, start=1):
        name = f"turn {number}: " if len(log_ratios) > 1 else ""
        facts.append(f"{name}s = {np.exp(log_ratio):.6g} (l = {log_ratio:+.3g})")
        share = "clipped" if clipped == trained else f"{clipped} of {trained} tokens clipped"
        facts.append(name + (share if clipped else "not clipped"))
    return [*facts, f"update {row['update'] + 1} of the step"]


def _parts(
    row: Row, messages: Sequence[Row], tokenizer: Tokenizer | None, scale: float
) -> Iterator[Part]:
    turns, left = iter(range(len(row["token_ids"]))), LONGEST
    log_ratios = row.get("token_log_ratios")
    for message in messages:
        turn = next(turns, None) if message.get("sampled") else None
        if turn is None:
            yield _message(message)
            continue
        ids = row["token_ids"][turn]
        d = log_ratios[turn] if log_ratios else [None] * len(ids)
        texts = token_texts(ids[:left], tokenizer)
        tokens = zip(ids[:left], texts, row["logprobs"][turn][:left], d[:left], strict=True)
        text = Markup("").join(_token(*token, scale) for token in tokens)
        if len(ids) > left:
            text += f" … {len(ids) - left} more tokens"
        left = max(left - len(ids), 0)
        yield str(message.get("role", "assistant")), text


def _token(token: int, text: str, logprob: float, d: float | None, scale: float) -> Markup:
    about = f"id {token}, log-prob when sampled {logprob:.4g} ({np.exp(logprob):.3g})"
    about += ", not trained on" if d is None else f", d_t = {d:+.3g}"
    tint = 0.75 * min(1.0, abs(d) / scale) if d and scale else 0.0
    shown = text.replace("\n", "↵\n") or "▫"
    return _TOKEN.format("down" if d and d < 0 else "up", tint, about, shown)


def token_texts(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """The text that each token adds; '' as long as a character is incomplete.

    Without a tokenizer, the ids:

    >>> token_texts([7, 8], None)
    ['⟨7⟩', '⟨8⟩']
    """
    if tokenizer is None:
        return [f"⟨{i}⟩" for i in ids]
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, i) or "" for i in ids]


def _message(message: Row) -> Part:
    """Role and text; what else a message holds, such as tool calls, is shown as JSON."""
    content = message.get("content")
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "sampled") and v}
    texts = [content if isinstance(content, str) else json.dumps(content)] if content else []
    text = "\n".join([*texts, *([json.dumps(rest, ensure_ascii=False)] if rest else [])])
    if len(text) > 4 * LONGEST:
        text = f"{text[: 4 * LONGEST]} … {len(text) - 4 * LONGEST:,} more characters"
    return str(message.get("role", "")), text
