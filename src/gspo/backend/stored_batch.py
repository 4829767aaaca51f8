"""Stored rollout batches: trajectories/<split>/<step>.parquet, one row per trajectory.

What training read of a batch is written and read back exactly: the tokens, log-probs and rewards
are columns; how the batch was trained on is JSON in the file's metadata. Other columns say what
training made of a trajectory.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from openai.types.chat.chat_completion import Choice

from gspo import dev
from gspo.config import TrainConfig
from gspo.core.errors import RunError
from gspo.core.files import explained, replacing, strict_json
from gspo.data.turn import sampled_logprobs
from gspo.train.algorithms import BUILT_IN, find_algorithm
from gspo.train.observe import Trace
from gspo.train.settings import Settings, resolve
from gspo.trajectory import Trajectory, TrajectoryGroup

_KEY = b"gspo.update"
_PER_TURN = pa.list_(pa.list_(pa.int32()))
_ROUTES = pa.struct({"shape": pa.list_(pa.int32()), "dtype": pa.string(), "data": pa.binary()})
_REPLAYED = {
    "prompt_token_ids": _PER_TURN,
    "temperatures": pa.list_(pa.float64()),
    "policy_versions": pa.list_(pa.int64()),
    "finish_reasons": pa.list_(pa.string()),
    "routes": pa.list_(_ROUTES),
}
"""Columns that rebuild a trajectory's choices, beside its tokens; older files don't have them."""
_SCHEMA = {
    "group": pa.int32(),
    "trajectory": pa.int32(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "messages": pa.string(),
    "metrics": pa.string(),
    "metadata": pa.string(),
    "token_ids": _PER_TURN,
    "logprobs": pa.list_(pa.list_(pa.float32())),
    # What training made of it: null if it was not trained on.
    "update": pa.int32(),
    "sequence_log_ratios": pa.list_(pa.float64()),
    "trained_tokens": pa.list_(pa.int32()),
    "clipped_tokens": pa.list_(pa.int32()),
    "token_log_ratios": pa.list_(pa.list_(pa.float32())),
    # Of each token of a turn, if they differ: null if none of the turns has them.
    "token_policy_versions": pa.list_(pa.list_(pa.int64())),
    **_REPLAYED,
}


@dataclass(frozen=True)
class UpdateRecord:
    """How a stored batch was trained on.

    Attributes:
        policy_version: of the weights before the update.
        context: longest sample in tokens.
        dtype: compute type of the trainer, `float32` or `bfloat16`.
        learning_rate, kl_penalty_coef: of `TrainConfig`.
        options: the fields of `dev.TrainConfig` that were set.
    """

    policy_version: int
    context: int
    dtype: str
    learning_rate: float | None
    kl_penalty_coef: float
    options: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings, *, version: int, context: int, dtype: str) -> UpdateRecord:
        """The record of one call of `train`."""
        options = settings.given.model_dump(mode="json", exclude_unset=True)
        algorithm = settings.given.algorithm
        if algorithm is not None and not (isinstance(algorithm, str) and algorithm in BUILT_IN):
            # Stored as its fields: nobody may have registered it in the process that reads it back.
            options["algorithm"] = asdict(find_algorithm(algorithm))
        if settings.lr_warmup_steps is not None:
            options["lr_warmup_steps"] = settings.lr_warmup_steps
        kl = settings.objective.kl_coef
        return cls(version, context, dtype, settings.learning_rate, kl, options)

    def settings(self, **changes: Any) -> Settings:
        """Resolve the call again, with `changes` to its options; a None there drops an option.

        Raises:
            ConfigError: options that contradict one another.
        """
        # A stored None stays: it is a choice if the default is a number, as of max_grad_norm.
        dropped = {name for name, value in changes.items() if value is None}
        options = {k: v for k, v in (self.options | changes).items() if k not in dropped}
        config = TrainConfig(learning_rate=self.learning_rate, kl_penalty_coef=self.kl_penalty_coef)
        return resolve(config, dev.TrainConfig(**options))


@dataclass(frozen=True)
class StoredBatch:
    """A rollout batch as it was trained on: its samples equal those of the update, bit for bit."""

    groups: list[TrajectoryGroup]
    record: UpdateRecord


def write_batch(
    path: Path,
    groups: Sequence[TrajectoryGroup],
    advantages: Mapping[int, float] | None = None,
    traces: Mapping[int, Sequence[Trace]] | None = None,
    record: UpdateRecord | None = None,
) -> None:
    """Write a rollout batch; the file is there whole or not at all.

    Args:
        path: of the file.
        groups: with plain values, see `plain_groups`.
        advantages, traces: by the trajectory's number in the batch, counted through all groups.
        record: how the batch was trained on, if it was.

    Raises:
        RunError: the disk is full, or the file cannot be written.
    """
    rows: list[dict[str, Any]] = []
    for g, group in enumerate(groups):
        for t, trajectory in enumerate(group):
            number = len(rows)
            row = {"group": g, "trajectory": t, "advantage": (advantages or {}).get(number)}
            rows.append(row | _columns(trajectory, (traces or {}).get(number, ())))
    metadata = {_KEY: json.dumps(asdict(record)).encode()} if record else None
    table = pa.Table.from_pylist(rows, schema=pa.schema(_SCHEMA, metadata))
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as building:
            pq.write_table(table, building)


def _columns(trajectory: Trajectory, traces: Sequence[Trace]) -> dict[str, Any]:
    """Return the columns of a trajectory; `traces` has one entry, or one per turn."""
    choices = trajectory.choices()
    messages = [
        {**m.message.model_dump(exclude_none=True), "sampled": True} if isinstance(m, Choice) else m
        for m in trajectory.turns()
    ]
    token_ids = [list(getattr(c, "token_ids", None) or []) for c in choices]
    changing = [list(getattr(c, "policy_versions", None) or []) for c in choices]
    experts = [_packed(getattr(c, "routed_experts", None)) for c in choices]
    columns = {
        "reward": float(trajectory.reward),
        "messages": strict_json(messages, default=str),
        "metrics": strict_json(trajectory.metrics),
        "metadata": strict_json(trajectory.metadata),
        "token_ids": token_ids,
        "logprobs": [list(sampled_logprobs(c) or []) for c in choices],
        "prompt_token_ids": [list(getattr(c, "prompt_token_ids", None) or []) for c in choices],
        "temperatures": [getattr(c, "temperature", None) for c in choices],
        "policy_versions": [getattr(c, "policy_version", None) for c in choices],
        "token_policy_versions": changing if any(changing) else None,
        "finish_reasons": [c.finish_reason for c in choices],
        "routes": experts if any(experts) else None,
    }
    if traces:
        log_ratios = np.concatenate([trace.token_log_ratios for trace in traces])
        ends = np.cumsum([len(tokens) for tokens in token_ids])
        columns |= {
            "update": traces[0].update,
            "sequence_log_ratios": [trace.log_ratio for trace in traces],
            "trained_tokens": [trace.trained_tokens for trace in traces],
            "clipped_tokens": [trace.clipped_tokens for trace in traces],
            "token_log_ratios": np.split(log_ratios, ends[:-1]),
        }
    return columns


def read_batch(path: Path) -> StoredBatch:
    """Read a batch that a call of `train` has stored.

    Raises:
        RunError: no such file, a damaged one, or one without what training read.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"cannot read the rollout batch {path}: {error}") from None
    record = (table.schema.metadata or {}).get(_KEY)
    if record is None or not _REPLAYED.keys() <= set(table.column_names):
        raise RunError(
            f"{path} doesn't hold the prompts' tokens and the options that it was trained with: "
            "it is of an older gspo, or was only logged. Steps trained with this gspo have them"
        )
    rows = sorted(table.to_pylist(), key=lambda row: (row["group"], row["trajectory"]))
    groups: dict[int, list[Trajectory]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(_trajectory(row, path))
    # A group of a single trajectory had failures, which are counted, not stored.
    lost = [RuntimeError("a rollout that was not stored")]
    stored = [TrajectoryGroup(g, exceptions=lost if len(g) == 1 else []) for g in groups.values()]
    return StoredBatch(stored, UpdateRecord(**json.loads(record)))


def _trajectory(row: dict[str, Any], path: Path) -> Trajectory:
    items: list[Any] = []
    turn = 0
    for message in json.loads(row["messages"]):
        if message.pop("sampled", False):
            items.append(_choice(row, turn, message))
            turn += 1
        else:
            items.append(message)
    if turn != len(row["token_ids"]):
        raise RunError(
            f"{path}: group {row['group']}, trajectory {row['trajectory']} has {turn} sampled "
            f"messages and the tokens of {len(row['token_ids'])}: the file is damaged"
        )
    return Trajectory(
        messages_and_choices=items,
        reward=row["reward"],
        metrics={k: nan if v is None else v for k, v in json.loads(row["metrics"]).items()},
        metadata=json.loads(row["metadata"]),
    )


def _choice(row: dict[str, Any], turn: int, message: dict[str, Any]) -> Choice:
    fields = {
        "index": 0,
        "finish_reason": row["finish_reasons"][turn],
        "message": message,
        "token_ids": row["token_ids"][turn],
        "prompt_token_ids": row["prompt_token_ids"][turn],
        "token_logprobs": row["logprobs"][turn],
        "temperature": row["temperatures"][turn],
        "policy_version": row["policy_versions"][turn],
    }
    if changing := row.get("token_policy_versions"):  # an older file has no such column
        fields["policy_versions"] = changing[turn] or None
    routes = row["routes"] and row["routes"][turn]
    if routes:
        data = base64.b64encode(routes["data"]).decode()
        fields["routed_experts"] = {**routes, "data": data}
    return Choice.model_validate(fields)


def _packed(experts: Any) -> dict[str, Any] | None:
    """Return a Choice's expert choices as bytes; None if there are none to train on."""
    try:
        data = base64.b64decode(experts["data"], validate=True)
        return {"shape": list(experts["shape"]), "dtype": str(experts["dtype"]), "data": data}
    except (KeyError, TypeError, ValueError):
        return None
