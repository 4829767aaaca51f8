"""What a backend does for a model, what it returns, and how it checks what it is given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

from openai import AsyncOpenAI

from gspo import absent, dev
from gspo.config import TrainConfig, TrainSFTConfig
from gspo.core.errors import ConfigError, check_names, shown
from gspo.core.files import names_a_folder
from gspo.core.metrics import is_ours, user_metric
from gspo.core.options import Options, title_of
from gspo.core.plain import plain_values
from gspo.serve.episodes import Episode
from gspo.trajectories import Trajectory, TrajectoryGroup

Kind = TypeVar("Kind", bound=Options)


class ModelLike(Protocol):
    """What a backend needs to know of a model. `gspo.model` stands above it, and has the class."""

    trainable: ClassVar[bool]
    name: str
    project: str
    config: Any

    @property
    def source(self) -> str | None: ...
    @property
    def internal_config(self) -> dev.InternalModelConfig: ...


@dataclass(frozen=True)
class TrainResult:
    """What one call of `train` did.

    Attributes:
        step: the model's step after the call.
        metrics: name -> value, as in metrics.jsonl.
        checkpoint_path: folder of the step's weights, in Hugging Face layout; None if the
            backend keeps none.
        skipped: why no update was made, or None.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint_path: Path | None = None
    skipped: str | None = None


class Backend(Protocol):
    """Where a model is sampled, trained and logged. It is closed when an `async with` ends."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def register(self, model: ModelLike) -> None:
        """Make the model ready; if it has a run already, go on with it."""
        ...

    def client(self, model: ModelLike) -> AsyncOpenAI:
        """A client that samples from the model."""
        ...

    def episode_url(self, model: ModelLike, episode: Episode) -> str:
        """The base URL at which requests to the model belong to this episode.

        Raises:
            ConfigError: the model is not served on a port of this process.
        """
        raise ConfigError(f"{type(self).__name__} gives episodes no base URL: use LocalBackend")

    async def train(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        config: TrainConfig | None = None,
        _config: dev.TrainConfig | None = None,
        *,
        save_checkpoint: bool = True,
        **options: Any,
    ) -> TrainResult:
        """Train on one rollout batch."""
        ...

    async def train_sft(
        self,
        model: ModelLike,
        trajectories: Sequence[Trajectory],
        config: TrainSFTConfig | None = None,
    ) -> TrainResult:
        """Train on the assistant's turns of given conversations: one step.

        Raises:
            ConfigError: the backend trains no model.
        """
        raise ConfigError(f"{type(self).__name__} has no train_sft: use LocalBackend")

    async def get_step(self, model: ModelLike) -> int:
        """Calls of `train` so far, over the run's life."""
        ...

    async def log(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        split: str,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        """Write trajectories and their mean metrics to the run."""
        ...

    async def delete_checkpoints(
        self, model: ModelLike, best_checkpoint_metric: str = "val/reward"
    ) -> None:
        """Delete all checkpoints but the latest and the best, if the backend keeps any."""

    async def close(self) -> None:
        """Release what the backend holds."""
        ...


def train_options(
    config: TrainConfig | None, _config: dev.TrainConfig | None, options: Mapping[str, Any]
) -> tuple[TrainConfig, dev.TrainConfig]:
    """Spread keyword options over the two configurations.

    Raises:
        ConfigError: an option that neither has, or a configuration that is none.
    """
    refused = absent.REASONS["train"]
    check_names("train", options.keys() & refused, [], refused)
    public = {k: v for k, v in options.items() if k in TrainConfig.model_fields}
    private = {k: v for k, v in options.items() if k not in public}
    return (
        merged(TrainConfig, "config", config, public),
        merged(dev.TrainConfig, "_config", _config, private),
    )


def merged(kind: type[Kind], title: str, given: Any, options: Mapping[str, Any]) -> Kind:
    """The configuration that was given for `title`, ART's dict too, with more options."""
    if isinstance(given, kind):
        given = given.model_dump(exclude_unset=True)
    if not isinstance(given, dict | None):
        raise ConfigError(f"{title} is {shown(given)}; give a {title_of(kind)}")
    return kind(**{**(given or {}), **options})


def user_metrics(metrics: Any, split: str, line: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a user logs, under names that replace none of gspo's.

    Args:
        metrics: name -> number, or None. A name without `/` belongs to the split.
        split: such as `val`.
        line: what the step's line has already. A metric that stands there with the same value is
            left out: it is the result of `train`, handed back.

    Raises:
        DataError: not a dict of numbers.
        ConfigError: a split that cannot name a folder too, as `..` and `a/b`.
    """
    if not names_a_folder(split):
        raise ConfigError(f"split = {shown(split)}: give a plain name, such as 'val'")
    values = {}
    for name, value in plain_values({} if metrics is None else metrics, "metrics").items():
        logged = line.get(name if "/" in name else f"{split}/{name}")
        # The file has null for any number that is not finite.
        if logged is None or (logged != value and (math.isfinite(logged) or math.isfinite(value))):
            values[user_metric(name, split)] = value
    return values


def group_means(groups: Sequence[TrajectoryGroup], split: str) -> dict[str, float]:
    """Return mean reward, the means of the rollouts' metrics, and how many failed, by full name.

    A metric of a rollout that is named as one of gspo's stands at `<split>/user/<name>`, and one of
    a group at `<split>/group_<name>`.
    """
    values: dict[str, list[float]] = {}
    for group in groups:
        for name, value in group.metrics.items():
            values.setdefault(f"{split}/group_{name}", []).append(float(value))
        for trajectory in group:
            values.setdefault(f"{split}/reward", []).append(float(trajectory.reward))
            for name, value in trajectory.metrics.items():
                full = f"{split}/user/{name}" if is_ours(name) else f"{split}/{name}"
                values.setdefault(full, []).append(float(value))
    means = {name: sum(items) / len(items) for name, items in values.items()}
    if groups:
        means[f"{split}/exceptions"] = float(sum(len(group.exceptions) for group in groups))
    return means


def completion_lengths(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """The fewest and most sampled tokens of a trajectory, and the share of the trajectories with
    an answer that the limit of tokens cut; {} without any."""
    lengths: list[int] = []
    cut = 0
    for trajectory in (t for group in groups for t in group):
        choices = trajectory.sampled_turns()
        lengths.append(sum(len(getattr(choice, "token_ids", None) or ()) for choice in choices))
        cut += any(choice.finish_reason == "length" for choice in choices)
    if not lengths:
        return {}
    ends = {"min": float(min(lengths)), "max": float(max(lengths))}
    told = {f"tokens/completion_{name}": value for name, value in ends.items()}
    return told | {"tokens/truncated_share": cut / len(lengths)}


def described(model: ModelLike) -> dict[str, Any]:
    """What trackers are told of a model: its names, how it is loaded, and the user's config."""
    config: dict[str, Any] = {"project": model.project, "name": model.name}
    if model.trainable:
        load = model.internal_config.model_dump(mode="json")
        config |= {"base_model": model.source, "load": load}
    if model.config is not None:
        users = model.config if isinstance(model.config, dict) else model.config.model_dump()
        config["config"] = json.loads(json.dumps(users, default=str))
    return config
