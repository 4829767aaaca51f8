"""`gspo audit`: is the clip range wider than the noise between engine and trainer?

On unchanged weights every log-ratio is noise. Sample with the engine, score with the trainer,
and compare l_i with the clip range. The path from engine to l_i is the one of training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from openai.types.chat.chat_completion import Choice
from pydantic import Field

from gspo.core.errors import ConfigError
from gspo.core.metrics import Metrics
from gspo.core.options import Options
from gspo.data.packing import PackedBatch, pack
from gspo.data.sample import Sample, trajectory_samples
from gspo.dev import RolloutDtype
from gspo.lab.audit_report import AuditReport, make_report
from gspo.objective import Segments, sequence_log_ratio, token_log_ratio
from gspo.policy.embedded import PREFIX, embedded_task
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.tasks import Task, load_task
from gspo.train.budget import row_budget
from gspo.train.expert_replay import record_agreement
from gspo.train.settings import resolve
from gspo.trajectory import Trajectory
from gspo.weights.rollout_copy import rollout_copy


class AuditSpec(Options):
    """What is audited. Prompts are the task's held-out ones.

    >>> AuditSpec(model="embedded:sort").clip_range()
    (0.0003, 0.0004)
    """

    model: str
    """`embedded:<task>`, a folder, or a hub id."""
    rollout_dtype: RolloutDtype = "float32"
    """Precision of the engine. The trainer scores in float32."""
    task: str | None = None
    """Where the prompts come from. None: the embedded model's own task."""
    prompts: int = Field(default=64, ge=1)
    completions: int = Field(default=8, ge=1)
    """Per prompt."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest completion. None: the task's own."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    epsilon_low: float | None = Field(default=None, gt=0, le=1)
    """None: GSPO's."""
    epsilon_high: float | None = Field(default=None, gt=0, le=1)
    """None: GSPO's."""
    seed: int = 0

    def clip_range(self) -> tuple[float, float]:
        """epsilon_low and epsilon_high that are audited."""
        default = resolve().objective
        low = default.epsilon_low if self.epsilon_low is None else self.epsilon_low
        high = default.epsilon_high if self.epsilon_high is None else self.epsilon_high
        return low, high

    def load_task(self) -> Task:
        """The task that the prompts come from.

        Raises:
            ConfigError: none was named and the model has none of its own.
        """
        if self.task is not None:
            return load_task(self.task)
        if not self.model.startswith(PREFIX):
            raise ConfigError(
                f"{self.model!r} has no task of its own: name one with --task, "
                "such as 'sort' or 'reasoning-gym:products'"
            )
        return load_task(embedded_task(self.model))


@dataclass(frozen=True)
class Noise:
    """Log-ratios of S sequences on unchanged weights.

    Attributes:
        d: of each sequence, d_t of its sampled tokens; float64 of float32 values.
        log_ratios: [S] l_i as the trainer computes it.
        routing_agreement: share of the experts' slots that engine and trainer choose alike; None
            for a dense model.
    """

    d: tuple[np.ndarray, ...]
    log_ratios: np.ndarray
    routing_agreement: float | None = None

    @property
    def lengths(self) -> np.ndarray:
        """L_i."""
        return np.array([len(own) for own in self.d])


def run_audit(spec: AuditSpec) -> tuple[AuditReport, Noise]:
    """Sample, score and report.

    Raises:
        GspoError: a model, task or option that doesn't exist.
    """
    task = spec.load_task()
    policy = load_policy(spec.model)
    choose_packing(policy)
    engine = TorchEngine(rollout_copy(policy, spec.rollout_dtype), seed=spec.seed)
    requests = _requests(spec, task, engine)
    noise = measure(policy, _samples(policy, requests, engine.generate(requests)))
    setting = spec.model_dump(exclude={"epsilon_low", "epsilon_high", "max_tokens", "seed"})
    report = make_report(
        noise.d,
        noise.log_ratios,
        spec.clip_range(),
        routing_agreement=noise.routing_agreement,
        **setting | {"task": task.name},
    )
    return report, noise


@torch.no_grad()
def measure(policy: Policy, samples: list[Sample]) -> Noise:
    """Score samples, one a sequence, with the trainer's forward pass."""
    policy.lm.eval()
    d: dict[int, np.ndarray] = {}
    log_ratios: dict[int, float] = {}
    budget = row_budget(policy.lm.config.get_text_config(), policy.checkpointing)
    metrics = Metrics()
    for batch in pack(samples, budget, share=policy.shares_prompts):
        with policy.routing.observe(strict=False) as tape:
            ratios, means = _log_ratios(policy, batch)
        if tape.seen and batch.routes is not None:
            record_agreement(metrics, batch.routes, tape.own().cpu()[batch.index])
        for row, number in enumerate(batch.trajectory_ids):
            d[number] = ratios[batch.sequence_ids == row].double().numpy()
            log_ratios[number] = means[row].item()
    order = sorted(d)
    return Noise(
        tuple(d[i] for i in order),
        np.array([log_ratios[i] for i in order]),
        metrics.compute().get("moe/routing_agreement"),
    )


def _log_ratios(policy: Policy, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """d_t [M] and l_i [S] of a row, by the objective's own functions."""
    every = torch.ones_like(batch.loss_mask)
    d = token_log_ratio(policy.logprobs(batch).logprobs.cpu(), batch.old_logprobs, every)
    count = len(batch.trajectory_ids)
    return d, sequence_log_ratio(d, Segments(batch.sequence_ids, count, every, batch.loss_mask))


def _requests(spec: AuditSpec, task: Task, engine: TorchEngine) -> list[Request]:
    params = SamplingParams(
        n=spec.completions,
        max_tokens=spec.max_tokens or task.max_tokens,
        temperature=spec.temperature,
        routes=bool(engine.policy.routing.routers),
    )
    problems = (task.problem("heldout", index, spec.seed) for index in range(spec.prompts))
    return [Request(tuple(engine.encode_chat(task.messages(p))), params) for p in problems]


def _samples(policy: Policy, requests: list[Request], done: list[list[Completion]]) -> list[Sample]:
    """The completions as training gets them: choices of trajectories, then samples."""
    out: list[Sample] = []
    for request, completions in zip(requests, done, strict=True):
        for own in completions:
            trajectory = Trajectory(messages_and_choices=[_choice(request, own)])
            sample = trajectory_samples(
                trajectory, trajectory_id=len(out), max_tokens=policy.context
            )[0]
            out.append(replace(sample, routes=own.routes))
    return out


def _choice(request: Request, completion: Completion) -> Choice:
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": completion.finish_reason,
            "message": {"role": "assistant", "content": completion.text},
            "token_ids": list(completion.token_ids),
            "prompt_token_ids": list(request.prompt),
            "token_logprobs": list(completion.logprobs),
            "temperature": completion.temperature,
            "policy_version": completion.policy_version,
        }
    )
