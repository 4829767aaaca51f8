"""Supervised fine-tuning from a file, as ART spells it: `art.utils.sft.train_sft_from_file`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gspo.absent import refusing
from gspo.config import TrainSFTConfig
from gspo.core.errors import DataError, shown
from gspo.core.rows import read_rows
from gspo.trajectories import Trajectory

__all__ = ["read_trajectories", "train_sft_from_file"]


def read_trajectories(file_path: str | Path) -> list[Trajectory]:
    """The conversations of a dataset: a row is `{"messages": [...], "tools": [...]}`.

    `tools` may be left out, other columns are not read, and blank lines are skipped. The
    trajectory's metadata has its row, which later errors name.

    Args:
        file_path: JSONL or parquet, or else as `gspo.core.rows.read_rows` takes it.

    Raises:
        DataError: no such file, an empty one, a row that is no JSON or has no messages or answer.
    """
    return [_trajectory(where, row) for where, row in read_rows(file_path).items()]


def _trajectory(where: str, row: dict[str, Any]) -> Trajectory:
    if "messages" not in row:
        raise DataError(f'{where} has no column "messages"; it has: {", ".join(row)}')
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{where}: messages are {shown(messages)}; give a list of messages")
    check_conversation(messages, where)
    try:
        return Trajectory(
            messages_and_choices=messages, tools=row.get("tools") or None, metadata={"row": where}
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def check_conversation(messages: list[Any], where: str) -> None:
    """Refuse what no model has to be loaded for: a message without role or text, or no answer.

    Raises:
        DataError: it names `where`, which is the row.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}, message {number} is {shown(message)}; it needs a role")
        content = message.get("content")
        if not isinstance(content, str | None) or (content is None and "tool_calls" not in message):
            raise DataError(f"{where}, message {number}: content is {shown(content)}; give a text")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no assistant turn: there is nothing to train on")


@refusing
async def train_sft_from_file(
    model: Any,
    file_path: str | Path,
    epochs: int = 1,
    batch_size: int = 8,
    peak_lr: float | None = None,
    schedule_type: Literal["constant", "linear"] = "linear",
    seed: int = 0,
    assistant_turns: Literal["all", "last"] = "all",
    verbose: bool = False,
) -> Any:
    """Call `model.train_sft` once on all rows of a file, in another order each epoch.

    Args:
        model: a registered `TrainableModel`.
        file_path: see `read_trajectories`.
        epochs, batch_size, seed, assistant_turns: see `TrainSFTConfig`.
        peak_lr: None: by the model's size.
        schedule_type: `linear` has a warmup.
        verbose: print the call's metrics.

    Returns:
        The `TrainResult`.

    Raises:
        GspoError: as `read_trajectories` and `LocalBackend.train_sft`.
    """
    config = TrainSFTConfig(
        learning_rate=peak_lr,
        lr_schedule=schedule_type,
        batch_size=batch_size,
        assistant_turns=assistant_turns,
        epochs=epochs,
        seed=seed,
    )
    return await model.train_sft(read_trajectories(file_path), config, verbose=verbose)
