"""Completions as people read them: those of a training step, and any that are printed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 10
_LONGEST = 300
"""Characters of a prompt or completion that a line of a log shows."""


class Sample(NamedTuple):
    """One trajectory. `advantage` is None where it was left out of training."""

    prompt: str
    completion: str
    reward: float
    advantage: float | None


def print_samples(console: Console, batch: Path, step: int, count: int) -> None:
    """Print completions of a stored rollout batch, from the lowest to the highest reward.

    A terminal gets a table, anything else a line each. Below stands how many trajectories have
    which reward.

    Args:
        console: where to.
        batch: the step's file of trajectories.
        step: its number.
        count: how many completions to show.
    """
    rewards, samples = read_samples(batch, count)
    if console.is_terminal and not console.is_dumb_terminal:
        table = Table(title=f"step {step}", title_justify="left", show_lines=True, expand=True)
        for name in ("prompt", "completion"):
            table.add_column(name, ratio=1, overflow="fold")
        for name in ("reward", "advantage"):
            table.add_column(name, justify="right", no_wrap=True)
        for sample in samples:
            table.add_row(*map(Text, (sample.prompt, sample.completion, *_numbers(sample))))
        console.print(table)
    else:
        for sample in samples:
            reward, advantage = _numbers(sample)
            prompt, completion = _line(sample.prompt), _line(sample.completion)
            told = f"reward {reward}  advantage {advantage}  {prompt} -> {completion}"
            console.print(Text(f"sample of step {step}: {told}"), soft_wrap=True)
    console.print(Text(f"rewards of step {step}: {histogram(rewards)}"), soft_wrap=True)


def read_samples(batch: Path, count: int) -> tuple[list[float], list[Sample]]:
    """All rewards of a stored rollout batch, and `count` trajectories spread evenly over them."""
    rows = pq.read_table(batch, columns=["reward", "advantage", "messages"]).to_pylist()
    rows.sort(key=lambda row: row["reward"])
    last, shown = len(rows) - 1, min(count, len(rows))
    chosen = [rows[round(at * last / max(1, shown - 1))] for at in range(shown)]
    return [row["reward"] for row in rows], [_sample(row) for row in chosen]


def histogram(values: Sequence[float]) -> str:
    """Where numbers lie: the bar of each tenth of their range, its ends, and the mean.

    >>> histogram([0, 0, 0, 1])
    '0 [█        ▃] 1, mean 0.250'
    """
    if not values:
        return "none"
    low, high = min(values), max(values)
    mean = f"mean {sum(values) / len(values):.3f}"
    if low == high:
        return f"all {low:.3g}, {mean}"
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / (high - low) * _BINS))] += 1
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // max(counts))] for count in counts)
    return f"{low:.3g} [{bars}] {high:.3g}, {mean}"


def visible(text: str) -> str:
    """The text with its control characters spelt out, but for new lines and tabs.

    A completion may hold the codes that move a terminal's cursor or change its title.

    >>> visible("a\\x1b[2Jb\\n")
    'a\\\\x1b[2Jb\\n'
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else _spelt(c)
        for c in text
    )


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _sample(row: dict[str, Any]) -> Sample:
    """What stands before the first sampled message, and what was sampled; turns by new lines."""
    messages = json.loads(row["messages"])
    first = next((i for i, m in enumerate(messages) if m.get("sampled")), len(messages))
    prompt = _content(messages[first - 1]) if first else ""
    said = [_content(message) for message in messages if message.get("sampled")]
    return Sample(prompt, "\n".join(said), row["reward"], row["advantage"])


def _content(message: dict[str, Any]) -> str:
    """A message's text; of one that has none, such as a call of a tool, its JSON."""
    content = message.get("content")
    if isinstance(content, str) and content:
        return visible(content)
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "sampled") and v}
    return visible(json.dumps(rest or content, ensure_ascii=False))


def _numbers(sample: Sample) -> tuple[str, str]:
    advantage = "none" if sample.advantage is None else f"{sample.advantage:+.3f}"
    return f"{sample.reward:.3f}", advantage


def _line(text: str) -> str:
    """A text as one line of JSON, which says where it was cut."""
    cut = f" ... ({len(text):,} characters)" if len(text) > _LONGEST else ""
    return json.dumps(text[:_LONGEST], ensure_ascii=False) + cut
