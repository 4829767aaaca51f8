"""`gspo audit`: is the clip range wider than the noise between engine and trainer?

On unchanged weights every log-ratio is noise. Sample with the engine, score with the trainer,
and compare l_i with the clip range. The path from engine to l_i is the one of training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from openai.types.chat.chat_completion import Choice
from pydantic import Field

from gspo.core.compute import ComputeThread
from gspo.core.errors import ConfigError
from gspo.core.metrics import Metrics
from gspo.core.options import Options
from gspo.data.sample import Sample, trajectory_samples
from gspo.dev import RolloutDtype, TrainConfig
from gspo.lab.audit_report import AuditReport, make_report
from gspo.objective import Segments, sequence_log_ratio
from gspo.policy.embedded import PREFIX, embedded_task
from gspo.policy.load import Policy, load_policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Completion, Engine, Request, SamplingParams
from gspo.serve.selfcheck import make_engine
from gspo.tasks import Task, load_task
from gspo.train.budget import token_budget
from gspo.train.expert_replay import ExpertReplay
from gspo.train.old_logprobs import with_trainer_logprobs
from gspo.train.settings import resolve
from gspo.trajectory import Trajectory
from gspo.weights.publisher import publisher_for


class AuditSpec(Options):
    """What is audited, on the held-out prompts of a task.

    >>> AuditSpec(model="embedded:sort").clip_range()
    (0.0003, 0.0004)
    """

    model: str
    """`embedded:<task>`, a folder, or a hub id."""
    rollout_dtype: RolloutDtype = "float32"
    """Precision of the engine. The trainer scores in float32."""
    task: str | None = None
    """Where the prompts come from. None: the task that an embedded model is made for."""
    prompts: int = Field(default=64, ge=1)
    completions: int = Field(default=8, ge=1)
    """Per prompt."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest completion. None: that of the task."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    epsilon_low: float | None = Field(default=None, gt=0, le=1)
    """None: GSPO's."""
    epsilon_high: float | None = Field(default=None, gt=0, le=1)
    """None: GSPO's."""
    seed: int = 0

    def clip_range(self) -> tuple[float, float]:
        """epsilon_low and epsilon_high that are audited."""
        gspo = resolve().objective
        return self.epsilon_low or gspo.epsilon_low, self.epsilon_high or gspo.epsilon_high

    def load_task(self) -> Task:
        """The task that the prompts come from.

        Raises:
            ConfigError: none was named, and the model is no embedded one.
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
        expert_agreement: share of the experts' slots that engine and trainer choose alike; None
            for a dense model.
    """

    d: tuple[np.ndarray, ...]
    log_ratios: np.ndarray
    expert_agreement: float | None = None


def run_audit(spec: AuditSpec) -> tuple[AuditReport, Noise]:
    """Sample, score and report.

    Raises:
        GspoError: a model, task or option that doesn't exist.
    """
    task = spec.load_task()
    policy = load_policy(spec.model)
    choose_packing(policy)
    sampling, _ = publisher_for(policy, spec.rollout_dtype)
    compute = ComputeThread()
    engine = make_engine(sampling, compute, seed=spec.seed)
    params = SamplingParams(
        n=spec.completions,
        max_tokens=spec.max_tokens or task.max_tokens,
        temperature=spec.temperature,
        expert_choices=bool(policy.routers.modules),
    )
    problems = (task.problem("heldout", index, spec.seed) for index in range(spec.prompts))
    requests = [Request(tuple(engine.encode_chat(task.messages(p))), params) for p in problems]
    try:
        answers = asyncio.run(_answers(engine, requests))
    finally:
        compute.close()
    noise = measure(policy, _samples(policy, requests, answers))
    asked = spec.model_dump(exclude={"epsilon_low", "epsilon_high", "max_tokens", "seed"})
    asked |= {"task": task.name, "routing_agreement": noise.expert_agreement}
    return make_report(noise.d, noise.log_ratios, spec.clip_range(), **asked), noise


async def _answers(engine: Engine, requests: Sequence[Request]) -> list[list[Completion]]:
    return await asyncio.gather(*(engine.complete(request) for request in requests))


def measure(policy: Policy, samples: Sequence[Sample]) -> Noise:
    """Score samples as the trainer does; each is one sequence."""
    policy.lm.eval()
    trajectories = [(sample,) for sample in samples]
    budget = token_budget(policy.lm.config.get_text_config(), policy.checkpointing)
    scored = with_trainer_logprobs(policy, trajectories, budget, None, share=policy.shares_prompts)
    d = [
        torch.from_numpy((new.old_logprobs - sample.old_logprobs)[sample.ratio_mask])
        for sample, (new,) in zip(samples, scored, strict=True)
    ]
    ids = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in d]))
    mask = torch.ones(len(ids), dtype=torch.bool)
    log_ratios = sequence_log_ratio(torch.cat(d), Segments(ids, len(d), mask, mask))
    metrics = Metrics()
    if policy.routers.modules:  # before a replay, training compares the trainer's choices too
        settings = resolve(options=TrainConfig(routing_replay="old_policy"))
        ExpertReplay(policy, settings, metrics, budget).start([trajectories])
    return Noise(
        tuple(tokens.double().numpy() for tokens in d),
        log_ratios.double().numpy(),
        metrics.compute().get("moe/routing_agreement"),
    )


def _samples(
    policy: Policy, requests: Sequence[Request], answers: Sequence[Sequence[Completion]]
) -> list[Sample]:
    """The completions as training gets them: choices of trajectories, then samples."""
    pairs = [(r, c) for r, answer in zip(requests, answers, strict=True) for c in answer]
    samples = []
    for number, (request, completion) in enumerate(pairs):
        choice = {
            "index": 0,
            "finish_reason": completion.finish_reason,
            "message": {"role": "assistant", "content": completion.text},
            "token_ids": list(completion.token_ids),
            "prompt_token_ids": list(request.prompt),
            "token_logprobs": list(completion.logprobs),
            "temperature": completion.temperature,
            "policy_version": completion.policy_versions[0],
        }
        trajectory = Trajectory(messages_and_choices=[Choice.model_validate(choice)])
        (sample,) = trajectory_samples(trajectory, trajectory_id=number, max_tokens=policy.context)
        samples.append(replace(sample, expert_choices=completion.expert_choices))
    return samples
