"""Supervised fine-tuning from a file, as ART spells it: `art.utils.sft.train_sft_from_file`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gspo.absent import refusing
from gspo.config import TrainSFTConfig
from gspo.core.errors import DataError
from gspo.core.rows import check_messages, read_rows
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
    check_conversation(messages := row["messages"], where)
    try:
        return Trajectory(
            messages_and_choices=messages, tools=row.get("tools") or None, metadata={"row": where}
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def check_conversation(messages: Any, where: str) -> None:
    """Refuse what no model has to be loaded for: a message without role or text, or no answer.

    Raises:
        DataError: it names `where`, which is the row.
    """
    check_messages(messages, where)
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
    verbose: bool = False,
) -> Any:
    """Call `model.train_sft` once on all rows of a file, in another order each epoch.

    Other options: `model.train_sft(read_trajectories(path), TrainSFTConfig(...))`.

    Args:
        model: a registered `TrainableModel`.
        file_path: see `read_trajectories`.
        epochs, batch_size: see `TrainSFTConfig`.
        peak_lr: None: by the model's size.
        schedule_type: `linear` has a warmup.
        verbose: print the call's metrics.

    Returns:
        The `TrainResult`.

    Raises:
        GspoError: as `read_trajectories` and `LocalBackend.train_sft`.
    """
    rate = {"learning_rate": peak_lr, "lr_schedule": schedule_type}
    config = TrainSFTConfig(epochs=epochs, batch_size=batch_size, seed=0, **rate)
    return await model.train_sft(read_trajectories(file_path), config, verbose=verbose)
