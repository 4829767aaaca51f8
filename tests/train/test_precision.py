"""l_i keeps float32's precision over every hop, from the engine's logits to the objective.

GSPO clips l_i at 3e-4. Half-precision log-probs alone are off by as much on short sequences.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from openai.types.chat.chat_completion import Choice

import gspo as art
from gspo.backend.run import Run
from gspo.backend.stored_batch import write_batch
from gspo.core.errors import MissingLogprobsError
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import trajectory_samples
from gspo.kernels.logprob import Head, TokenLogprobs, token_logprobs
from gspo.objective import Segments, sequence_log_ratio, token_log_ratio
from gspo.serve.params import SamplingParams
from gspo.serve.sampling import Parts
from gspo.serve.sampling import sample as draw
from gspo.train.minibatches import prepare
from support import choice, embedded, random_groups, trajectory

LENGTHS = (64, 1024, 16_384, 131_072)
WIDTH, VOCABULARY = 16, 61
CLIP = 3e-4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def over_the_wire(tokens: torch.Tensor, logprobs: list[float], prompt: list[int]) -> Choice:
    """The engine's answer as JSON and back, as a client gets it."""
    own = choice(tokens.tolist(), prompt, logprobs)
    return Choice.model_validate_json(own.model_dump_json())


def float64_logprobs(hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor):
    logits = hidden.double() @ head.double().t()
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def log_ratio(new: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    sampled = torch.ones_like(microbatch.targets, dtype=torch.bool)
    segments = Segments(microbatch.sequence_ids, 1, sampled, sampled)
    return sequence_log_ratio(token_log_ratio(new, microbatch.old_logprobs, sampled), segments)


@pytest.mark.parametrize("length", LENGTHS)
def test_l_is_within_1e_6_of_float64(length: int):
    """Engine logits -> sampling -> JSON -> Sample -> row -> log-probs -> l_i, as in training."""
    hidden = torch.randn(length, WIDTH, generator=generator(length))
    old = torch.randn(VOCABULARY, WIDTH, generator=generator(1)) * 0.5
    new = old + 0.01 * torch.randn(VOCABULARY, WIDTH, generator=generator(2))
    parts = Parts([SamplingParams()] * length, hidden.device)
    uniform = torch.rand(length, generator=generator(3)).clamp(max=1 - 1e-6)
    tokens, logprobs, _ = draw(hidden @ old.t(), torch.ones(length), uniform, parts)

    own = trajectory(1.0, over_the_wire(tokens, logprobs.tolist(), [1]))
    (microbatch,) = pack(trajectory_samples(own), budget=length + 1)
    scored = token_logprobs(hidden, Head(new), tokens, microbatch.temperatures)
    l_i = log_ratio(scored.logprobs, microbatch)

    exact = (float64_logprobs(hidden, new, tokens) - float64_logprobs(hidden, old, tokens)).mean()
    assert abs(exact.item()) > 1e-5
    assert l_i.dtype == torch.float32
    assert abs(l_i.double().item() - exact.item()) < 1e-6


def test_storing_log_probs_in_bfloat16_costs_the_clip_range():
    """Why half precision is refused: rounding mu alone moves l_i of 64 tokens by about 3e-4."""
    length, sequences = 64, 400
    hidden = torch.randn(sequences * length, WIDTH, generator=generator(0))
    head = torch.randn(VOCABULARY, WIDTH, generator=generator(1)) * 0.5
    parts = Parts([SamplingParams()] * len(hidden), hidden.device)
    uniform = torch.rand(len(hidden), generator=generator(3)).clamp(max=1 - 1e-6)
    _, logprobs, _ = draw(hidden @ head.t(), torch.ones(len(hidden)), uniform, parts)

    def rms(stored: torch.Tensor) -> float:
        error = (logprobs.double() - stored.double()).view(sequences, length).mean(-1)
        return error.square().mean().sqrt().item()

    assert rms(logprobs.bfloat16()) > 1e-4
    assert rms(logprobs.bfloat16()) > CLIP / 3
    assert rms(logprobs.float()) == 0


def test_the_trainers_log_probs_are_float32_whatever_it_computes_in():
    policy = embedded(dtype="bfloat16")
    policy.round_weights()
    assert policy.lm.dtype == torch.bfloat16
    batch = prepare(random_groups(policy), context=policy.context)
    for microbatch in pack([s for own in batch.samples for s in own], budget=64):
        scored = policy.logprobs(microbatch)
        assert scored.logprobs.dtype == scored.entropy.dtype == torch.float32
        # Not bfloat16 numbers in a float32 tensor.
        assert not torch.equal(scored.logprobs.bfloat16().float(), scored.logprobs)


def test_samples_and_rows_hold_float32():
    exact = -1 / 3
    (own,) = trajectory_samples(trajectory(0.0, choice([7, 8], [1], [exact, -2.0])))
    assert own.old_logprobs.dtype == np.float32
    (microbatch,) = pack([own], budget=8)
    assert microbatch.old_logprobs.dtype == torch.float32
    assert microbatch.old_logprobs[0].item() == np.float32(exact)


def test_parquet_files_hold_float32(tmp_path: Path):
    run = Run(tmp_path, "p", "m", {})
    value = float(np.float32(-1 / 3))
    path = run.trajectories("train", 1)
    write_batch(path, [art.TrajectoryGroup([trajectory(0.0, choice([7, 8], [1], [value, -2.0]))])])
    run.close()
    table = pq.read_table(path)
    assert table.schema.field("logprobs").type == pa.list_(pa.list_(pa.float32()))
    assert table["logprobs"].to_pylist() == [[[value, -2.0]]]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([-0.5, -1.0], dtype=torch.bfloat16),
        torch.tensor([-0.5, -1.0], dtype=torch.float16),
        np.array([-0.5, -1.0], dtype=np.float16),
        list(np.array([-0.5, -1.0], dtype=np.float16)),
    ],
    ids=["bfloat16", "float16", "numpy", "list of numpy"],
)
def test_half_precision_log_probs_are_refused(values: Any):
    own = choice([7, 8], [1])
    own.token_logprobs = values  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(MissingLogprobsError, match=r"trajectory 0.*float16.*keep float32"):
        trajectory_samples(trajectory(0.0, own))


def test_every_hop_asserts_its_type(unhooked: None):
    half = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"log-probs are torch\.bfloat16"):
        TokenLogprobs(half, half)
    (own,) = trajectory_samples(trajectory(0.0, choice([7, 8], [1], [-0.5, -2.0])))
    with pytest.raises(TypeError, match="old_logprobs are float16"):
        dataclasses.replace(own, old_logprobs=own.old_logprobs.astype(np.float16))
    (microbatch,) = pack([own], budget=8)
    for name in ("old_logprobs", "temperatures", "advantages"):
        with pytest.raises(TypeError, match=f"{name} are torch.bfloat16"):
            dataclasses.replace(microbatch, **{name: getattr(microbatch, name).bfloat16()})
