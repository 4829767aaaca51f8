"""Stored rollout batches: what training read of them, written and read back exactly.

The tokens, log-probs and rewards of a trajectory are columns of its row; how the batch was trained
on is JSON in the file's own metadata.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any

from openai.types.chat.chat_completion import Choice

from gspo.config import TrainConfig
from gspo.core.errors import RunError
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.train.algorithms import BUILT_IN
from gspo.train.settings import Settings, resolve
from gspo.trajectory import Trajectory, TrajectoryGroup

_KEY = b"gspo.update"


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
        options = settings.model_dump(mode="json", exclude_unset=True, exclude={"learning_rate"})
        if settings.algorithm not in BUILT_IN and options.get("algorithm") is not None:
            # As its fields: it is read back where nobody has registered it.
            options["algorithm"] = asdict(settings.preset)
        kl = settings.objective.kl_coef
        return cls(version, context, dtype, settings.learning_rate, kl, options)

    def settings(self, **changes: Any) -> Settings:
        """The resolved call, with other options where `changes` names them; None drops one.

        Raises:
            ConfigError: options that contradict one another.
        """
        # A stored None stays: it is a choice where the default is a number, as of max_grad_norm.
        dropped = {name for name, value in changes.items() if value is None}
        options = {k: v for k, v in (self.options | changes).items() if k not in dropped}
        config = TrainConfig(learning_rate=self.learning_rate, kl_penalty_coef=self.kl_penalty_coef)
        return resolve(config, DevTrainConfig(**options))

    def metadata(self) -> dict[bytes, bytes]:
        """What the file's schema carries."""
        return {_KEY: json.dumps(asdict(self)).encode()}


@dataclass(frozen=True)
class StoredBatch:
    """A rollout batch as it was trained on: its samples equal those of the update, bit for bit."""

    groups: list[TrajectoryGroup]
    record: UpdateRecord


def replay_columns(choices: Sequence[Choice]) -> dict[str, Any]:
    """The columns of a trajectory's row that rebuild its choices, beside its tokens."""
    expert_choices = [_packed(getattr(c, "routed_experts", None)) for c in choices]
    return {
        "prompt_token_ids": [list(getattr(c, "prompt_token_ids", None) or []) for c in choices],
        "temperatures": [getattr(c, "temperature", None) for c in choices],
        "policy_versions": [getattr(c, "policy_version", None) for c in choices],
        "finish_reasons": [c.finish_reason for c in choices],
        "routes": expert_choices if any(expert_choices) else None,
    }


def replay_schema() -> list[tuple[str, Any]]:
    """The types of `replay_columns`."""
    import pyarrow as pa

    routes = pa.struct(
        [("shape", pa.list_(pa.int32())), ("dtype", pa.string()), ("data", pa.binary())]
    )
    return [
        ("prompt_token_ids", pa.list_(pa.list_(pa.int32()))),
        ("temperatures", pa.list_(pa.float64())),
        ("policy_versions", pa.list_(pa.int64())),
        ("finish_reasons", pa.list_(pa.string())),
        ("routes", pa.list_(routes)),
    ]


def read_batch(path: Path) -> StoredBatch:
    """A batch that a call of `train` has stored.

    Raises:
        RunError: no such file, a damaged one, or one without what training read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"cannot read the rollout batch {path}: {error}") from None
    found = (table.schema.metadata or {}).get(_KEY)
    if found is None or not {name for name, _ in replay_schema()} <= set(table.column_names):
        raise RunError(
            f"{path} doesn't hold the prompts' tokens and the options that it was trained with: "
            "it is of an older gspo, or was only logged. Steps trained with this gspo have them"
        )
    rows = sorted(table.to_pylist(), key=lambda row: (row["group"], row["trajectory"]))
    groups: dict[int, list[Trajectory]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(_trajectory(row, path))
    record = UpdateRecord(**json.loads(found))
    return StoredBatch([_group(own) for own in groups.values()], record)


def _group(trajectories: list[Trajectory]) -> TrajectoryGroup:
    """A stored group. One of a single trajectory had failures, which are counted, not stored."""
    failed = [RuntimeError("a rollout that was not stored")] if len(trajectories) == 1 else []
    return TrajectoryGroup(trajectories, exceptions=failed)


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
    routes = row["routes"] and row["routes"][turn]
    if routes:
        data = base64.b64encode(routes["data"]).decode()
        fields["routed_experts"] = {**routes, "data": data}
    return Choice.model_validate(fields)


def _packed(routes: Any) -> dict[str, Any] | None:
    """A Choice's expert choices as bytes; None where it has none that could be trained on."""
    try:
        data = base64.b64decode(routes["data"], validate=True)
        return {"shape": list(routes["shape"]), "dtype": str(routes["dtype"]), "data": data}
    except (KeyError, TypeError, ValueError):
        return None
