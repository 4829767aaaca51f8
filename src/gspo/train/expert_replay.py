"""The routers' part of training an MoE model: replay, load balance, and what routing did.

Replay is one mechanism with two sources: the routes of a sample are the engine's (R3, arXiv
2510.11370), or are overwritten before the first update by those of the trainer's own forward pass
(R2, arXiv 2512.01374). From there on nothing knows the difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from gspo.core.errors import ConfigError, DataError
from gspo.core.metrics import Metrics
from gspo.data.packing import PackedBatch
from gspo.data.sample import Sample
from gspo.dev import TrainConfig
from gspo.policy.expert_tape import Tape, as_array, changed_slots
from gspo.policy.policy import Policy
from gspo.train.rows import rows_of

Trajectory = tuple[Sample, ...]
Routes = list[np.ndarray]


def check_routing(policy: Policy, trajectories: Sequence[Trajectory], options: TrainConfig) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        ConfigError: an option of MoE models on a dense one, or a replay of rollouts without routes.
        DataError: routes that are not of this model.
    """
    if options.routing_replay != "none":
        policy.routing.require(f"routing_replay={options.routing_replay!r}")
    if options.router_aux_loss_coef > 0:
        policy.routing.require(f"router_aux_loss_coef={options.router_aux_loss_coef}")
    if options.measure_routing:
        policy.routing.require("measure_routing=True")
    layers = len(policy.routing.routers)
    for sample in (s for own in trajectories for s in own):
        where = f"group {sample.group_id}, trajectory {sample.trajectory_id}"
        routes = sample.routes
        if routes is None or len(routes) < len(sample) - 1:
            if options.routing_replay == "rollout":
                raise ConfigError(
                    f"routing_replay='rollout', but {where} carries no routes of the engine for "
                    f"{'all' if routes is None else len(sample) - 1 - len(routes)} of its tokens: "
                    "roll out with extra_body={'return_routes': True}, or use 'old_policy'"
                )
        elif len(routes) > len(sample) or (layers and routes.shape[1] != layers):
            raise DataError(
                f"{where}: routes of shape {list(routes.shape)} for {len(sample)} tokens and a "
                f"model of {layers} MoE layers"
            )


class BatchRouting:
    """What one call of `train` does with the routers.

    Args:
        policy: its weights are those before the first update until `start` has returned.
        options: which of it is wanted.
        metrics: of the call.
        budget: tokens of a packed row.
    """

    def __init__(self, policy: Policy, options: TrainConfig, metrics: Metrics, budget: int):
        self.policy = policy
        self.options = options
        self.metrics = metrics
        self.budget = budget
        self._share = shares(policy, options)
        self._parts: list[list[Trajectory]] = []
        self._before: list[Routes] = []

    def start(self, parts: Sequence[Sequence[Trajectory]]) -> dict[tuple[int, int], np.ndarray]:
        """Record where that is asked: routes by (trajectory, sample of it), to be replayed.

        Args:
            parts: of each minibatch of one epoch, the trajectories that it will train on. Recorded
                in the same rows as they are trained, so that replay is exact to the bit.
        """
        replay = self.options.routing_replay == "old_policy"
        if not (replay or self.options.measure_routing):
            return {}
        self._parts = [list(part) for part in parts]
        self._before = [self._recorded(part) for part in self._parts]
        if not replay:
            return {}
        found = {}
        for part, routes in zip(self._parts, self._before, strict=True):
            places = [(own[0].trajectory_id, i) for own in part for i in range(len(own))]
            found |= dict(zip(places, routes, strict=True))
            self._agreement(part, routes)
        return found

    def step(self, *, on_policy: bool) -> StepRouting | None:
        """Of one optimizer step; None in a dense model."""
        if not self.policy.routing.routers:
            return None
        return StepRouting(self.policy, self.options, self.metrics, on_policy)

    def end(self) -> None:
        """After the last update: how many experts are others than before the first."""
        if not self.options.measure_routing:
            return
        for part, before in zip(self._parts, self._before, strict=True):
            after = self._recorded(part)
            for a, b in zip(before, after, strict=True):
                self._changed(torch.from_numpy(a), torch.from_numpy(b))

    def _recorded(self, part: Sequence[Trajectory]) -> Routes:
        return recorded_routes(self.policy, part, self.budget, share=self._share)

    def _changed(self, before: Tensor, after: Tensor) -> None:
        tokens, layers, k = before.shape
        changed = changed_slots(before, after)
        name, mean = "moe/experts_changed", self.metrics.mean
        mean(name, int(changed.sum()), tokens * layers * k)
        for layer, count in enumerate(changed.sum(0).tolist()):
            mean(f"{name}_layer_{layer}", count, tokens * k)
        mean("moe/tokens_changed", int((changed > 0).any(-1).sum()), tokens)

    def _agreement(self, part: Sequence[Trajectory], own: Routes) -> None:
        for sample, routes in zip((s for t in part for s in t), own, strict=True):
            fresh = (sample.policy_versions[sample.ratio_mask] == self.policy.version).all()
            if sample.routes is not None and fresh:
                engine = torch.from_numpy(sample.routes.astype(np.int16))
                record_agreement(self.metrics, engine, torch.from_numpy(routes[: len(engine)]))


@dataclasses.dataclass
class Watched:
    """A row's forward pass: its tape, and its part of the load-balancing loss."""

    tape: Tape | None = None
    balance: Tensor | float = 0.0


class StepRouting:
    """What one optimizer step does with the routers: `begin`, each row, its record, then `end`."""

    def __init__(self, policy: Policy, options: TrainConfig, metrics: Metrics, on_policy: bool):
        self.policy = policy
        self.metrics = metrics
        self.coefficient = options.router_aux_loss_coef
        self.replays = options.routing_replay != "none"
        self._compare = on_policy and options.routing_replay != "old_policy"
        self._strict = self.replays or self.coefficient > 0 or options.measure_routing
        self._weights: Tensor | None = None
        self._loads: Tensor | None = None

    def begin(self, rows: Sequence[PackedBatch]) -> None:
        """Count the loads of the whole step, which the load-balancing loss needs beforehand.

        E * sum_e f_e * P_e is not linear in f and P together. With f known, which has no gradient,
        the rest is a sum over tokens: the same however the step is split into rows.
        """
        if self.coefficient == 0:
            return
        loads = torch.zeros(0)
        with torch.no_grad():
            for row in rows:
                routing = self.policy.routing
                with routing.observe(self._routes(row), copies=row.copies) as tape:
                    self.policy.logprobs(row)
                loads = tape.loads() + (loads if len(loads) else 0)
        tokens = sum(row.sample_tokens for row in rows)
        share = loads.float() / loads.sum(-1, keepdim=True)
        self._weights = share * (self.policy.routing.experts / tokens / len(share))

    @contextmanager
    def observe(self, row: PackedBatch) -> Iterator[Watched]:
        """Around the forward pass of a row, which replays the row's routes where that is asked."""
        routing, watched = self.policy.routing, Watched()
        with routing.observe(
            self._routes(row), balance=self._weights, copies=row.copies, strict=self._strict
        ) as watched.tape:
            yield watched
        watched.balance = watched.tape.balance

    def record(self, row: PackedBatch, watched: Watched) -> None:
        """Metrics of an observed row."""
        if isinstance(watched.balance, Tensor):
            self.metrics.mean("loss/router_aux", watched.balance.item(), 0)
        tape = watched.tape
        if tape is None or not tape.seen:
            return
        loads = tape.loads()
        self._loads = loads if self._loads is None else self._loads + loads
        if self._compare and row.routes is not None:
            record_agreement(self.metrics, row.routes, tape.own().cpu()[row.index])

    def _routes(self, row: PackedBatch) -> Tensor | None:
        if not self.replays:
            return None
        if (routes := row.row_routes()) is None:
            raise DataError("a packed row without routes in a step that replays them")
        return routes

    def end(self) -> None:
        """Metrics of the whole step, which don't add up over its rows."""
        if self._loads is not None:
            loads = self._loads.double()
            spread = loads.std(-1, correction=0) / loads.mean(-1)
            self.metrics.mean("moe/load_cv", spread.mean().item(), 1)
        if self.coefficient > 0:
            self.metrics.mean("loss/router_aux", 0.0, 1)


def shares(policy: Policy, options: TrainConfig) -> bool:
    """Whether prefixes that samples have in common are computed once."""
    return options.share_prefixes and policy.shares_prompts


def recorded_routes(
    policy: Policy, trajectories: Sequence[Trajectory], budget: int, *, share: bool = False
) -> Routes:
    """The router's own choice for every token: of each sample in order, [L, layers, k]."""
    by_trajectory = {own[0].trajectory_id: own for own in trajectories}
    found: dict[int, Routes] = {}
    rows = rows_of(policy, [s for own in trajectories for s in own], budget, share=share)

    def record(row: PackedBatch) -> np.ndarray:
        with torch.no_grad(), policy.routing.observe() as tape:
            policy.logprobs(row)
        return as_array(tape.own(), policy.routing.experts)[row.index.numpy()]

    for row, whole in zip(rows, policy.workers.map(record, rows), strict=True):
        parts = np.split(whole, np.cumsum(row.lengths)[:-1])
        for trajectory in row.trajectory_ids:
            size = len(by_trajectory[trajectory])
            found[trajectory], parts = parts[:size], parts[size:]
    return [routes for own in trajectories for routes in found[own[0].trajectory_id]]


def with_routes(own: Trajectory, routes: dict[tuple[int, int], np.ndarray]) -> Trajectory:
    """A trajectory whose samples carry these routes; itself where there are none of it."""
    return tuple(
        dataclasses.replace(s, routes=routes[key]) if (key := (s.trajectory_id, i)) in routes else s
        for i, s in enumerate(own)
    )


def record_agreement(metrics: Metrics, engine: Tensor, own: Tensor) -> None:
    """Slots in which the engine took an expert that the trainer takes too; -1 is unknown."""
    known = (engine >= 0).all(-1).all(-1)
    engine, own = engine[known], own[known].to(engine.dtype)
    if engine.shape[2:] != own.shape[2:]:
        raise DataError(f"the engine routed to {engine.shape[2]} experts, not {own.shape[2]}")
    changed = int(changed_slots(engine, own).sum())
    metrics.mean("moe/routing_agreement", engine.numel() - changed, engine.numel())
