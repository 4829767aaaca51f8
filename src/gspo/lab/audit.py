"""`gspo audit`: is the clip range wider than the noise between engine and trainer?

On unchanged weights every log-ratio is noise. Sample with the engine, score with the trainer,
and compare l_i with the clip range. The path from engine to l_i is the one of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from gspo.core.errors import ConfigError
from gspo.core.metrics import Metrics
from gspo.core.options import Options
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.dev import RolloutDtype, TrainConfig
from gspo.lab.audit_report import make_report
from gspo.lab.gradients import experts_of
from gspo.objective import PRESETS, Segments, sequence_log_ratio
from gspo.policy.embedded import PREFIX, embedded_task
from gspo.policy.load import Policy, load_policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import make_engine
from gspo.tasks import load_task
from gspo.train.old_logprobs import with_trainer_logprobs
from gspo.train.settings import resolve
from gspo.weights.publisher import publisher_for

_GSPO = PRESETS["gspo"].objective


class AuditSpec(Options):
    """What is audited, on the held-out prompts of a task.

    >>> AuditSpec(model="embedded:sort").task
    'sort'
    """

    model: str
    """`embedded:<task>`, a folder, or a hub id."""
    rollout_dtype: RolloutDtype = "float32"
    """Precision of the engine. The trainer scores in float32."""
    task: str = ""
    """Where the prompts come from. Default: the task that an embedded model is made for."""
    prompts: int = Field(default=64, ge=1)
    completions: int = Field(default=8, ge=1)
    """Per prompt."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest completion. None: that of the task."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    epsilon_low: float = Field(default=_GSPO.epsilon_low, gt=0, le=1)
    epsilon_high: float = Field(default=_GSPO.epsilon_high, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _model_names_the_task(cls, data: dict[str, Any]) -> dict[str, Any]:
        model = str(data.get("model"))
        if data.get("task"):
            return data
        if not model.startswith(PREFIX):
            raise ConfigError(
                f"{model!r} has no task of its own: name one with --task, "
                "such as 'sort' or 'reasoning-gym:products'"
            )
        return data | {"task": embedded_task(model)}


def run_audit(spec: AuditSpec) -> tuple[dict[str, Any], np.ndarray]:
    """Sample, score and report.

    Returns:
        What `make_report` says, and [S] l_i of the sequences.

    Raises:
        GspoError: a model, task or option that doesn't exist.
    """
    task, policy = load_task(spec.task), load_policy(spec.model)
    choose_packing(policy)
    sampling, _ = publisher_for(policy, spec.rollout_dtype)
    engine = make_engine(sampling)
    params = SamplingParams(
        n=spec.completions,
        max_tokens=spec.max_tokens or task.max_tokens,
        temperature=spec.temperature,
        expert_choices=bool(policy.routers.modules),
    )
    problems = (task.problem("heldout", index, 0) for index in range(spec.prompts))
    requests = [Request(tuple(engine.encode_chat(task.messages(p))), params) for p in problems]
    turns = [
        Turn(
            list(request.prompt),
            list(completion.token_ids),
            list(completion.logprobs),
            completion.temperature,
            completion.policy_version,
            completion.expert_choices,
        )
        for request, answer in zip(requests, engine.generate(requests), strict=True)
        for completion in answer
    ]
    samples = [sample_of([turn], trajectory_id=number) for number, turn in enumerate(turns)]
    d, log_ratios, agreement = measure(policy, samples)
    asked = spec.model_dump(exclude={"max_tokens"}) | {"routing_agreement": agreement}
    return make_report(d, log_ratios, asked), log_ratios


def measure(
    policy: Policy, samples: Sequence[Sample]
) -> tuple[list[np.ndarray], np.ndarray, float | None]:
    """Score S samples as the trainer does; each is one sequence.

    Returns:
        Of each sequence, d_t of its sampled tokens, float64 of float32 values; [S] l_i; and the
        share of the experts' slots that engine and trainer choose alike, None for a dense model.
    """
    policy.lm.eval()
    trajectories = [(sample,) for sample in samples]
    metrics, settings = Metrics(), resolve(options=TrainConfig(routing_replay="old_policy"))
    experts = experts_of(policy, settings, metrics)
    share = policy.shares_prompts
    scored = with_trainer_logprobs(policy, trajectories, experts.budget, None, share=share)
    d = [
        torch.from_numpy((new.old_logprobs - sample.old_logprobs)[sample.ratio_mask])
        for sample, (new,) in zip(samples, scored, strict=True)
    ]
    ids = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in d]))
    mask = torch.ones(len(ids), dtype=torch.bool)
    log_ratios = sequence_log_ratio(torch.cat(d), Segments(ids, len(d), mask, mask))
    if policy.routers.modules:  # before a replay, training compares the trainer's choices too
        experts.start([trajectories])
    agreement = metrics.compute().get("moe/routing_agreement")
    return [tokens.double().numpy() for tokens in d], log_ratios.double().numpy(), agreement
