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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from openai.types.chat.chat_completion import Choice

from gspo import dev
from gspo.config import TrainConfig
from gspo.core.errors import RunError
from gspo.core.files import explained, replacing, strict_json
from gspo.core.timing import span
from gspo.train.algorithms import BUILT_IN, find_algorithm
from gspo.train.observe import Trace
from gspo.train.settings import Settings, resolve
from gspo.trajectories import History, Trajectory, TrajectoryGroup

_KEY = b"gspo.update"
_OF_CHOICES = {
    "token_ids": ("token_ids", pa.list_(pa.int32())),
    "logprobs": ("token_logprobs", pa.list_(pa.float32())),
    "prompt_token_ids": ("prompt_token_ids", pa.list_(pa.int32())),
    "temperatures": ("temperature", pa.float64()),
    "policy_versions": ("policy_version", pa.int64()),
    "finish_reasons": ("finish_reason", pa.string()),
    "routes": (
        "routed_experts",
        pa.struct({"shape": pa.list_(pa.int32()), "dtype": pa.string(), "data": pa.binary()}),
    ),
}
"""Columns with one entry per Choice, as the field of a Choice and its type. A file without one of
them is of an older gspo, and cannot be trained on again."""
_RARE = {"token_policy_versions": "policy_versions", "altered_by": "altered_by"}
"""Columns that few batches have, as the field of a Choice."""
_SCHEMA = {
    "group": pa.int32(),
    "trajectory": pa.int32(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    # One per Choice, if the rollout gave any; and what training made of them. Older files have
    # neither.
    "turn_rewards": pa.list_(pa.float64()),
    "turn_advantages": pa.list_(pa.float64()),
    "messages": pa.string(),
    # JSON: what the model was offered, or null; and the conversations beside the first, if any.
    # Older files have neither.
    "tools": pa.string(),
    "additional_histories": pa.string(),
    "metrics": pa.string(),
    "metadata": pa.string(),
    **{name: pa.list_(kind) for name, (_, kind) in _OF_CHOICES.items()},
    # One per token of each Choice, if they differ; older files don't have it.
    "token_policy_versions": pa.list_(pa.list_(pa.int64())),
    # Of each Choice, if any has it; older files don't have it.
    "altered_by": pa.list_(pa.list_(pa.string())),
    # What training made of it: null if it was not trained on.
    "update": pa.int32(),
    "sequence_log_ratios": pa.list_(pa.float64()),
    "trained_tokens": pa.list_(pa.int32()),
    "clipped_tokens": pa.list_(pa.int32()),
    "token_log_ratios": pa.list_(pa.list_(pa.float32())),
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


class StoredBatch(NamedTuple):
    """A rollout batch as it was trained on: its samples equal those of the update, bit for bit."""

    groups: list[TrajectoryGroup]
    record: UpdateRecord


@span("checkpoint")
def write_batch(
    path: Path,
    groups: Sequence[TrajectoryGroup],
    advantages: Mapping[int, float] | None = None,
    traces: Mapping[int, Sequence[Trace]] | None = None,
    record: UpdateRecord | None = None,
    turn_advantages: Mapping[int, Sequence[float]] | None = None,
) -> None:
    """Write a rollout batch; the file is there whole or not at all.

    Args:
        path: of the file.
        groups: with plain values, see `plain_groups`.
        advantages, traces, turn_advantages: by the trajectory's number in the batch, counted
            through all groups.
        record: how the batch was trained on, if it was.

    Raises:
        RunError: the disk is full, or the file cannot be written.
    """
    rows: list[dict[str, Any]] = []
    for g, group in enumerate(groups):
        for t, trajectory in enumerate(group):
            number = len(rows)
            row = {"group": g, "trajectory": t, "advantage": (advantages or {}).get(number)}
            row["turn_advantages"] = (turn_advantages or {}).get(number) or None
            rows.append(row | _columns(trajectory, (traces or {}).get(number, ())))
    metadata = {_KEY: json.dumps(asdict(record)).encode()} if record else None
    table = pa.Table.from_pylist(rows, schema=pa.schema(_SCHEMA, metadata))
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as building:
            pq.write_table(table, building)


def _columns(trajectory: Trajectory, traces: Sequence[Trace]) -> dict[str, Any]:
    """Return the columns of a trajectory; `traces` has one entry, or one per turn."""
    first, *further = [
        {"messages": _messages(history), "tools": history.tools}
        for history in trajectory.histories()
    ]
    choices = trajectory.sampled_turns()
    columns = {
        "reward": float(trajectory.reward),
        "turn_rewards": trajectory.turn_rewards,
        "messages": strict_json(first["messages"], default=str),
        "tools": strict_json(first["tools"], default=str) if first["tools"] else None,
        "additional_histories": strict_json(further, default=str) if further else None,
        "metrics": strict_json(trajectory.metrics),
        "metadata": strict_json(trajectory.metadata),
        **{
            name: [getattr(choice, field, None) for choice in choices]
            for name, (field, _) in _OF_CHOICES.items()
        },
    }
    routes = [_routes(choice) for choice in choices]
    columns["routes"] = routes if any(routes) else None
    for name, field in _RARE.items():
        values = [getattr(choice, field, None) for choice in choices]
        columns[name] = values if any(values) else None
    if traces:
        log_ratios = np.concatenate([trace.token_log_ratios for trace in traces])
        ends = np.cumsum([len(tokens) for tokens in columns["token_ids"]])
        columns |= {
            "update": traces[0].update,
            "sequence_log_ratios": [trace.log_ratio for trace in traces],
            "trained_tokens": [trace.trained_tokens for trace in traces],
            "clipped_tokens": [trace.clipped_tokens for trace in traces],
            "token_log_ratios": np.split(log_ratios, ends[:-1]),
        }
    return columns


def _messages(history: Trajectory | History) -> list[Any]:
    """A conversation's messages; those that the model said are marked."""
    return [
        {**m.message.model_dump(exclude_none=True), "sampled": True} if isinstance(m, Choice) else m
        for m in history.turns()
    ]


def _routes(choice: Choice) -> dict[str, Any] | None:
    """A Choice's expert choices as bytes; None if there are none to train on."""
    try:
        value = getattr(choice, "routed_experts", {})
        data = base64.b64decode(value["data"], validate=True)
        return {"shape": list(value["shape"]), "dtype": str(value["dtype"]), "data": data}
    except (KeyError, TypeError, ValueError):
        return None


def read_record(path: Path) -> UpdateRecord | None:
    """How a stored batch was trained on, without reading its rows; None if the file doesn't say.

    Raises:
        RunError: no such file, or a damaged one.
    """
    try:
        stored = (pq.read_schema(path).metadata or {}).get(_KEY)
        return UpdateRecord(**json.loads(stored)) if stored else None
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        raise RunError(f"cannot read the rollout batch {path}: {error}") from None


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
    if record is None or not _OF_CHOICES.keys() <= set(table.column_names):
        raise RunError(
            f"{path} doesn't hold the prompts' tokens and the options that it was trained with: "
            "it is of an older gspo, or was only logged. Steps trained with this gspo have them"
        )
    groups: dict[int, list[Trajectory]] = {}
    for row in table.sort_by([("group", "ascending"), ("trajectory", "ascending")]).to_pylist():
        groups.setdefault(row["group"], []).append(_trajectory(row, path))
    # A group of a single trajectory had failures, which are counted, not stored.
    lost = [RuntimeError("a rollout that was not stored")]
    stored = [TrajectoryGroup(g, exceptions=lost if len(g) == 1 else []) for g in groups.values()]
    return StoredBatch(stored, UpdateRecord(**json.loads(record)))


def _trajectory(row: dict[str, Any], path: Path) -> Trajectory:
    messages = json.loads(row["messages"])
    further = json.loads(row.get("additional_histories") or "[]")
    sampled = [
        (conversation, number)
        for conversation in (messages, *(history["messages"] for history in further))
        for number, message in enumerate(conversation)
        if message.pop("sampled", False)
    ]
    if len(sampled) != len(row["token_ids"]):
        raise RunError(
            f"{path}: group {row['group']}, trajectory {row['trajectory']} has {len(sampled)} "
            f"sampled messages and the tokens of {len(row['token_ids'])}: the file is damaged"
        )
    for turn, (conversation, number) in enumerate(sampled):
        fields = {field: row[name] and row[name][turn] for name, (field, _) in _OF_CHOICES.items()}
        for name, field in _RARE.items():
            if values := row.get(name):
                fields[field] = values[turn]
        if routes := fields["routed_experts"]:
            routes["data"] = base64.b64encode(routes["data"]).decode()
        conversation[number] = {**fields, "index": 0, "message": conversation[number]}
    return Trajectory(
        messages_and_choices=messages,
        tools=json.loads(row.get("tools") or "null"),
        additional_histories=[
            History(messages_and_choices=history["messages"], tools=history["tools"])
            for history in further
        ],
        reward=row["reward"],
        turn_rewards=row.get("turn_rewards"),
        metrics={k: nan if v is None else v for k, v in json.loads(row["metrics"]).items()},
        metadata=json.loads(row["metadata"]),
    )
