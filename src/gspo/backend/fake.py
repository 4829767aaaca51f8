"""`FakeBackend`: a backend for users' tests. No model, no torch, no files; deterministic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openai import AsyncOpenAI

from gspo import dev
from gspo.backend.base import Backend, ModelLike, TrainResult, train_options, user_metrics
from gspo.config import TrainConfig
from gspo.data.check import check_groups, listed, plain_groups
from gspo.data.sample import trajectory_samples
from gspo.serve.episodes import Episode
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.server import Serving, bind
from gspo.trajectories import TrajectoryGroup


class FakeBackend(Backend):
    """Checks groups and options as the real backend does, and counts steps instead of training.

    Args:
        reply: see `FakeEngine`: the text of completion `index` of a prompt.
        port: as of `LocalBackend`: for tests of programs that make their own client.

    Attributes:
        trained: the groups of each `train` call.
        logged: (split, groups) of each `log` call.
    """

    def __init__(self, reply: Callable[[str, int], str] | None = None, *, port: int | None = None):
        listener = None if port is None else bind("127.0.0.1", port)
        self.engine = FakeEngine(reply)
        self.trained: list[list[TrajectoryGroup]] = []
        self.logged: list[tuple[str, list[TrajectoryGroup]]] = []
        self._names: list[str] = []
        self._serving = Serving(self.engine, lambda: self._names, listener)

    async def register(self, model: ModelLike) -> None:
        if not self._names:
            await self._serving.start()
        if model.name not in self._names:
            self._names.append(model.name)

    def client(self, model: ModelLike) -> AsyncOpenAI:
        return self._serving.client

    def base_url(self, model: ModelLike) -> str:
        return self._serving.url

    def episode_url(self, model: ModelLike, episode: Episode) -> str:
        return self._serving.episode_url(episode)

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
        train_options(config, _config, options)
        groups = listed(trajectory_groups)
        check_groups(plain_groups(groups))
        for g, group in enumerate(groups):
            for t, trajectory in enumerate(group):
                trajectory_samples(trajectory, trajectory_id=t, group_id=g)
        self.trained.append(groups)
        self.engine.policy_version += 1
        rewards = [float(trajectory.reward) for group in groups for trajectory in group]
        return TrainResult(len(self.trained), {"train/reward": sum(rewards) / len(rewards)})

    async def get_step(self, model: ModelLike) -> int:
        return len(self.trained)

    async def log(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        split: str,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        groups = listed(trajectory_groups)
        plain_groups(groups)
        user_metrics(metrics, split, {})
        self.logged.append((split, groups))

    async def close(self) -> None:
        await self._serving.stop()
