"""What a rollout returns: `Trajectory`, and the `TrajectoryGroup` of one prompt's rollouts."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Generator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeAlias, cast

from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from gspo.core.choices import as_choice
from gspo.core.errors import DataError, RolloutTimeoutError, shown, suggestion
from gspo.core.plain import NUMBER, plain_number, plain_turn_rewards, plain_values
from gspo.core.progress import all_or_cancel, current_gather, within_limits

Message: TypeAlias = dict[str, Any]
Messages: TypeAlias = list[Message]
MessagesAndChoices: TypeAlias = list[Message | Choice]
Tools: TypeAlias = list[dict[str, Any]]
MetadataValue: TypeAlias = float | int | str | bool | None
Metrics: TypeAlias = dict[str, float | int | bool]


class _Record(BaseModel):
    """Mutable, as in ART; a misspelt field is an error."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            first, fields = error.errors()[0], type(self).model_fields
            name = ".".join(map(str, first["loc"]))
            why = f"{first['msg']} (got {type(first.get('input')).__name__})"
            if name in set(data) - set(fields):
                names = ", ".join(fields)
                why = f"there is no such field.{suggestion(name, fields)} Known fields: {names}."
            raise DataError(f"{type(self).__name__}: {name}: {why}") from None


class _Conversation(_Record):
    """Messages as dicts, and the model's own turns as the `Choice` it returned."""

    messages_and_choices: MessagesAndChoices = Field(default_factory=list)
    tools: Tools | None = None

    @field_validator("messages_and_choices", mode="before")
    @classmethod
    def _in_one_form(cls, items: Any) -> Any:
        return [as_choice(item) or item for item in items] if isinstance(items, list) else items

    def turns(self) -> MessagesAndChoices:
        """All turns in order, each choice as a `Choice`: one that was appended later too."""
        return [as_choice(item) or item for item in self.messages_and_choices]

    def choices(self) -> list[Choice]:
        """The model's own turns, in order."""
        return [item for item in self.turns() if isinstance(item, Choice)]

    def messages(self) -> list[ChatCompletionMessageParam]:
        """All turns as plain messages, ready for the next `chat.completions.create`."""
        plain = [
            item.message.model_dump(exclude_none=True) if isinstance(item, Choice) else item
            for item in self.turns()
        ]
        return cast(list[ChatCompletionMessageParam], plain)


class History(_Conversation):
    """A further conversation of a rollout: a sub-agent's, or one after the context was rewritten.

    >>> History(messages_and_choices=[{"role": "user", "content": "hi"}]).choices()
    []
    """


class Trajectory(_Conversation):
    """One rollout: messages as dicts, and the model's own turns as the `Choice` it returned.

    Choices carry the sampled token ids and their log-probs; they are what is trained on. What other
    clients call a choice (a `CompletionChoice`, litellm's `Choices`) is taken too, as a `Choice`. A
    plain assistant dict is context, as a user or tool message is.

    An agent that holds several conversations has the others in `additional_histories`. All of them
    are one rollout: they share its reward and advantage, and its sequence ratio is over the sampled
    tokens of all (`sequence_unit="trajectory"`).

    `turn_rewards` says what single turns earned, beside `reward`, which stays the trajectory's: one
    number for each of `sampled_turns()`. Methods with an advantage for each turn read them
    (docs/objective.md, "Turns with advantages of their own").

    >>> t = Trajectory(messages_and_choices=[{"role": "user", "content": "hi"}], reward=1.0)
    >>> t.messages()
    [{'role': 'user', 'content': 'hi'}]
    """

    reward: float = 0.0
    turn_rewards: list[float] | None = None
    metrics: Metrics = Field(default_factory=dict)
    metadata: dict[str, MetadataValue] = Field(default_factory=dict)
    logs: list[str] = Field(default_factory=list)
    additional_histories: list[History] = Field(default_factory=list)

    def model_post_init(self, context: Any, /) -> None:
        self.start_time  # noqa: B018  # it begins here

    @cached_property  # and no field: two trajectories of equal content are equal
    def start_time(self) -> datetime:
        """When it was made."""
        return datetime.now(UTC)

    @field_validator("metrics", "metadata", mode="before")
    @classmethod
    def _plain(cls, values: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        return plain_values(values, name, texts=name == "metadata")

    def histories(self) -> list[Trajectory | History]:
        """All conversations: its own, then the additional ones."""
        return [self, *self.additional_histories]

    def sampled_turns(self) -> list[Choice]:
        """The model's own turns in all histories, in order: what `turn_rewards` counts."""
        return [choice for history in self.histories() for choice in history.choices()]

    def log(self, message: str) -> None:
        """Add a line to `logs`."""
        self.logs.append(message)

    @asynccontextmanager
    async def track_duration(self, name: str) -> AsyncIterator[None]:
        """Add the block's seconds to the metric `<name>_duration`."""
        began, metric = time.monotonic(), f"{name}_duration"
        try:
            yield
        finally:
            self.metrics[metric] = self.metrics.get(metric, 0.0) + time.monotonic() - began

    def finish(self) -> Trajectory:
        """Set the metric `duration`, the seconds since it was made; returns itself."""
        self.metrics["duration"] = (datetime.now(UTC) - self.start_time).total_seconds()
        return self

    def for_logging(self) -> dict[str, Any]:
        """What a console shows. Each message says whether it is `trainable`: the model's own."""
        own = [isinstance(turn, Choice) for turn in self.turns()]
        return {
            "reward": self.reward,
            "metrics": self.metrics,
            "metadata": self.metadata,
            "messages": [
                {**message, "trainable": trainable}
                for message, trainable in zip(self.messages(), own, strict=True)
            ],
            "tools": self.tools,
            "logs": self.logs,
        }

    def __str__(self) -> str:
        return f"Trajectory(reward={self.reward}, metrics={self.metrics})"


Rolled: TypeAlias = Trajectory | list[Trajectory]
"""What a rollout may return."""


class ExceptionRecord(_Record):
    """A rollout that failed."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> ExceptionRecord:
        """The record of `error`."""
        trace = "".join(traceback.format_exception(error))
        return cls(type=type(error).__name__, message=str(error), traceback=trace)


class TrajectoryGroup(_Record):
    """The rollouts of one prompt, whose rewards are compared with each other.

    Given trajectories (and exceptions, which are kept apart), it is a group at once. Given
    coroutines, it is awaitable and runs them concurrently:

        group = await TrajectoryGroup(rollout(model, task) for _ in range(16))

    A rollout that raises becomes an entry of `exceptions`; how many may fail is decided by
    `gather_trajectory_groups(max_exceptions=)`. If it is awaited by itself, the first one raises.
    `metrics` are of the group: they are logged once for it, not once for each trajectory.
    """

    trajectories: list[Trajectory] = Field(default_factory=list)
    exceptions: list[ExceptionRecord] = Field(default_factory=list)
    metadata: dict[str, MetadataValue] = Field(default_factory=dict)
    metrics: Metrics = Field(default_factory=dict)

    _pending: list[Awaitable[Rolled]] = []

    def __init__(
        self,
        trajectories: Iterable[Trajectory | BaseException | Awaitable[Rolled]] = (),
        *,
        metadata: dict[str, MetadataValue] | None = None,
        metrics: Metrics | None = None,
        exceptions: Iterable[BaseException | ExceptionRecord] = (),
    ) -> None:
        super().__init__(
            metadata=plain_values(metadata or {}, "metadata", texts=True),
            metrics=plain_values(metrics or {}, "metrics"),
        )
        for item in (*trajectories, *exceptions):
            self._add(item)

    def _add(self, item: Any) -> None:
        if isinstance(item, Trajectory):
            self.trajectories.append(item)
        elif isinstance(item, BaseException | ExceptionRecord):
            failed = item if isinstance(item, ExceptionRecord) else ExceptionRecord.of(item)
            self.exceptions.append(failed)
        elif isinstance(item, Awaitable):
            self._pending.append(item)
        else:
            raise DataError(
                f"TrajectoryGroup got {shown(item)}; "
                "it takes trajectories, exceptions and coroutines that return a Trajectory"
            )

    @property
    def size(self) -> int:
        """Rollouts that are done, failed or still to run."""
        return len(self.trajectories) + len(self.exceptions) + len(self._pending)

    def __await__(self) -> Generator[Any, None, TrajectoryGroup]:
        return self._run().__await__()

    async def _run(self) -> TrajectoryGroup:
        pending, self._pending = self._pending, []

        # In the order given, not in the order of completion: runs repeat exactly.
        for results in await all_or_cancel([settled(rollout) for rollout in pending]):
            for result in results:
                self._add(result)
        return self

    def close(self) -> None:
        """Give up rollouts that have not begun."""
        for rollout in self._pending:
            if inspect.iscoroutine(rollout):
                rollout.close()
        self._pending = []

    def __iter__(self) -> Iterator[Trajectory]:  # type: ignore[override]  # as in ART
        return iter(self.trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)


async def settled(rollout: Awaitable[Rolled]) -> list[Trajectory | BaseException]:
    """The rollout's trajectories, or what it failed with if the gather around it tolerates that.

    Raises:
        DataError: it returned something else, a reward is no number, turn rewards are not one
            number for each turn, or it raised CancelledError by itself beyond the gather's budget.
        Exception: its failure, beyond the gather's budget.
    """
    gather, name = current_gather(), getattr(rollout, "__qualname__", shown(rollout))
    try:
        returned = await within_limits(rollout, gather, name)
    except RolloutTimeoutError as error:
        gather.gave_up(error)
        return [error]
    except Exception as error:
        gather.failed(error)
        return [error]
    trajectories = list(returned) if isinstance(returned, list | tuple) else [returned]
    for trajectory in trajectories:
        if not isinstance(trajectory, Trajectory):
            raise DataError(
                f"the rollout {name!r} returned {shown(trajectory)}; it must return a Trajectory, "
                "or a list of them"
            )
        reward = plain_number(trajectory.reward)
        if reward is None:
            raise DataError(
                f"the rollout {name!r} returned a Trajectory whose reward is "
                f"{shown(trajectory.reward)}; it must be {NUMBER}"
            )
        turns = len(trajectory.sampled_turns())
        plain_turn_rewards(trajectory.turn_rewards, turns, f"the rollout {name!r}")
        tokens = [getattr(choice, "token_ids", None) or () for choice in trajectory.choices()]
        gather.finished(float(reward), trajectory.metrics, sum(map(len, tokens)))
    return list(trajectories)
