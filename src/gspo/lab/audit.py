"""`gspo audit`: is the clip range wider than the noise between engine and trainer?

On unchanged weights every log-ratio is noise. Sample with the engine, score with the trainer,
and compare l_i with the clip range. The path from engine to l_i is the one of training.

`--exact` tells instead which parts of a model give a row the same bits whatever is beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openai.types.chat.chat_completion import Choice

from gspo.backend.loading import load_step
from gspo.core.compute import ComputeThread
from gspo.core.errors import ConfigError
from gspo.core.metrics import Metrics
from gspo.core.tables import as_text, cells, table
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import read_turn
from gspo.dev import InternalModelConfig, RolloutDtype, TrainConfig
from gspo.experiment.rollout import ask
from gspo.experiment.run_file import read_spec
from gspo.experiment.spec import Spec
from gspo.experiment.talk import MODEL, client_of
from gspo.lab.audit_report import make_report
from gspo.objective import PRESETS, Segments, sequence_log_ratio
from gspo.policy.embedded import PREFIX, embedded_task
from gspo.policy.policy import Policy
from gspo.serve.selfcheck import make_engine, measure_exactness
from gspo.tasks import Task, load_task
from gspo.train.expert_replay import ExpertReplay
from gspo.train.old_logprobs import with_trainer_logprobs
from gspo.train.settings import resolve
from gspo.weights.publisher import publisher_for

_GSPO = PRESETS["gspo"].objective


def run_audit(
    model: str,
    *,
    rollout_dtype: RolloutDtype = "float32",
    task: str | None = None,
    prompts: int = 64,
    completions: int = 8,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    epsilon_low: float | None = None,
    epsilon_high: float | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Sample, score and report, on the held-out prompts of a task.

    Args:
        model: `embedded:<task>`, a folder, or a hub id.
        rollout_dtype: precision of the engine. The trainer scores in float32.
        task: where the prompts come from, or the file of a run with a task or a dataset; None: the
            task that an embedded model is made for.
        prompts, completions: how many prompts, and of each.
        max_tokens: longest completion; None: that of the task.
        temperature: of the engine.
        epsilon_low, epsilon_high: the clip range that noise is compared with; None: GSPO's.

    Returns:
        What `make_report` says, and [S] l_i of the sequences.

    Raises:
        GspoError: a model, task or option that doesn't exist.
    """
    if task is None and not model.startswith(PREFIX):
        raise ConfigError(
            f"{model!r} has no task of its own: name one with --task, "
            "such as 'sort' or 'reasoning-gym:products'"
        )
    # The options of training, which are checked as such.
    clip = {"epsilon": epsilon_low, "epsilon_high": epsilon_high or _GSPO.epsilon_high}
    options = {"model": model, "task": task or embedded_task(model), "temperature": temperature}
    spec = Spec.model_validate(options | {"load": {"rollout_dtype": rollout_dtype}, "train": clip})
    objective, source = resolve(options=spec.train).objective, _task(str(spec.task))
    policy = load_step(model, InternalModelConfig(), None)
    prompts = min(prompts, source.sizes["heldout"] if source.sizes else prompts)
    messages = [source.messages(source.problem("heldout", i, 0)) for i in range(prompts)]
    request: dict[str, Any] = {"n": completions, "temperature": temperature}
    request["max_tokens"] = max_tokens or source.max_tokens
    samples = sample_all(policy, rollout_dtype, messages, source.template_kwargs, **request)
    d, log_ratios, agreement = measure(policy, samples)
    asked = options | {
        **{"rollout_dtype": rollout_dtype, "prompts": prompts, "completions": completions},
        **{"epsilon_low": objective.epsilon_low, "epsilon_high": objective.epsilon_high},
        "task": source.name,
        "routing_agreement": agreement,
    }
    return make_report(d, log_ratios, asked), log_ratios


def _task(name: str) -> Task:
    """The task of this name; of a run's file, such as run.toml, its task or its dataset."""
    if not name.endswith(".toml"):
        return load_task(name)
    run = read_spec(Path(name))
    task = run.make_task()
    if task is None:
        raise ConfigError(f"--task {name}: it has no prompts beside its rollout: name a task")
    task.max_tokens = run.max_tokens or task.max_tokens
    return task


def sample_all(
    policy: Policy,
    rollout_dtype: RolloutDtype,
    conversations: Sequence[list[dict[str, Any]]],
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Sample]:
    """Sample in this precision, with the weights of `policy`; each completion is a sample.

    `options` are those of the requests, such as `n`.
    """
    sampling, _ = publisher_for(policy, rollout_dtype)
    chats = policy.tokenizer.chat_template is not None
    options |= {"model": MODEL, "extra_body": {"return_routes": bool(policy.routers.modules)}}

    async def answers() -> list[list[Choice]]:
        async with client_of(sampling) as client:
            requests = (ask(client, c, chats, template_kwargs, **options) for c in conversations)
            return await asyncio.gather(*requests)

    choices = enumerate(choice for answer in asyncio.run(answers()) for choice in answer)
    turns = ((number, read_turn(choice, f"completion {number}")) for number, choice in choices)
    return [sample_of([turn], trajectory_id=number) for number, turn in turns]


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
    metrics, scored = Metrics(), with_trainer_logprobs(policy, trajectories, resolve())
    d = [
        torch.from_numpy((new.old_logprobs - sample.old_logprobs)[sample.ratio_mask])
        for sample, (new,) in zip(samples, scored, strict=True)
    ]
    ids = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in d]))
    mask = torch.ones(len(ids), dtype=torch.bool)
    log_ratios = sequence_log_ratio(torch.cat(d), Segments(ids, len(d), mask, mask))
    if policy.routers.modules:  # before a replay, training compares the trainer's choices too
        settings = resolve(options=TrainConfig(routing_replay="old_policy"))
        ExpertReplay(policy, settings, metrics).start([trajectories])
    agreement = metrics.compute().get("moe/routing_agreement")
    return [tokens.double().numpy() for tokens in d], log_ratios.double().numpy(), agreement


_DTYPES = ("float32", "bfloat16")
_COLUMNS = ("name", "kind", "multiple", "how")


def audit_exact(model: str, dtype: str = "float32") -> dict[str, Any]:
    """Measure a model as `exact=True` does when it is loaded.

    Args:
        model: `embedded:<task>`, a folder, or a hub id.
        dtype: that engine and trainer compute in: float32 or bfloat16.

    Returns:
        A JSON object: `exact`, the `reason` if it is not, the `multiple` of tokens that passes are
        padded to, and the `parts`, each with its first module's name, its kind, the multiple of
        rows that it needs (None: none helps), and how it is computed instead of as usual.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: another dtype.
    """
    if dtype not in _DTYPES:
        raise ConfigError(
            f"--rollout-dtype {dtype}: with --exact, engine and trainer compute in the same "
            f"precision: {' or '.join(_DTYPES)}"
        )
    policy = load_step(model, InternalModelConfig.model_validate({"dtype": dtype}), None)
    parts, reason = measure_exactness(make_engine(policy, ComputeThread()))
    return {
        "model": model,
        "dtype": dtype,
        "exact": policy.exact,
        "reason": reason,
        "multiple": policy.multiple,
        "parts": [asdict(part) for part in parts],
    }


def render_exact(report: dict[str, Any], width: int = 100) -> str:
    """Draw the parts as a table, and the verdict below."""
    if report["exact"]:
        verdict = (
            f"exact: engine and trainer have the same bits in {report['dtype']}, on this machine "
            "and with as many threads. Passes are padded to a multiple of "
            f"{report['multiple']} tokens."
        )
    else:
        verdict = f"not exact: {report['reason']}."
    parts = [table(cells(_COLUMNS, report["parts"]))] if report["parts"] else []
    return as_text([*parts, verdict], width)
