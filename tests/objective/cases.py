"""Random cases for the objective, their layouts as tensors, and how results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from gspo.objective import Level, LossOutput, Objective, policy_loss
from objective.naive import Case, Expected

LEVELS: tuple[Level, ...] = (
    "token",
    "sequence",
    "sequence_token",
    "average",
    "geometric_average",
)
GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38, -1.0])
# (size of the log-ratios, grid that keeps their differences exact in float32)
SCALES = [(0.0, 2**-20), (1e-3, 2**-20), (0.05, 2**-20), (1.0, 2**-16), (60.0, 2**-16)]
SCALES += [(1e4, 2**-10)]


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_length: int = 200,
    max_sequences: int = 4,
    max_scale: float = 1e4,
    per_token: bool = False,
) -> Case:
    """Sequences of 1 to `max_length` tokens with masks and log-ratios of many sizes."""
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_sequences))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scales = [s for s in SCALES if s[0] <= max_scale]
    masks = st.sampled_from([1.0, 0.7, 0.0])
    parts: list[list[np.ndarray]] = []
    advantages = []
    for i, length in enumerate(lengths):
        scale, grid = draw(st.sampled_from(scales))
        centre = draw(st.sampled_from([0.0, 1.0, -1.0])) * scale
        d = np.round((centre + scale * rng.uniform(-1, 1, length)).clip(-1e4, 1e4) / grid) * grid
        old = -np.round(rng.uniform(0, 8, length) / grid) * grid
        sampled = rng.random(length) < draw(masks)
        if i == len(lengths) - 1:
            sampled[0] = True  # so that token advantages imply the number of sequences
        trained = rng.random(length) < draw(masks)
        spread = np.round(rng.normal(size=length) * 8) / 8
        reference = old - np.round(rng.uniform(-1, 1, length) / grid) * grid
        parts.append([np.full(length, i), old + d, old, reference, sampled, trained, spread])
        advantages.append(draw(st.sampled_from([0.0, 1.0, -1.0, 0.125, -2.5, 3.0])))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    ids, new, old, reference, sampled, trained, spread = columns
    return Case(ids, new, old, reference, sampled, trained, np.array(advantages), spread, per_token)


def in_order(case: Case) -> np.ndarray:
    """The layout [T] of a case as it is. A layout holds indices of tokens; -1 is padding."""
    return np.arange(len(case.ids))


def shuffled(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Tokens anywhere in a packed row, between padding."""
    padding = np.full(int(rng.integers(0, 20)), -1)
    return rng.permutation(np.concatenate([in_order(case), padding]))


def padded(case: Case, rng: np.random.Generator) -> np.ndarray:
    """[B, width]: a sequence per row, in any order of rows, padded left or right."""
    rows = [np.flatnonzero(case.ids == i) for i in rng.permutation(case.count)]
    width = max(map(len, rows)) + int(rng.integers(0, 5))
    out = np.full((len(rows), width), -1)
    for row, tokens in zip(out, rows, strict=True):
        start = int(rng.integers(0, width - len(tokens) + 1))
        row[start : start + len(tokens)] = tokens
    return out


def run(
    case: Case,
    objective: Objective,
    layout: np.ndarray,
    *,
    total: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[LossOutput, np.ndarray]:
    """The library's output and gradient, by token of the case; garbage where nothing was sampled.

    The gradient of padding and of tokens that were not sampled must be exactly 0.
    """
    rng = np.random.default_rng(seed)
    real = layout >= 0
    sampled = real & case.sampled[layout]
    trained = np.where(real, case.trained[layout], rng.random(layout.shape) < 0.5)

    def tensor(values: np.ndarray) -> Tensor:
        junk = rng.choice(GARBAGE, layout.shape)
        return torch.tensor(np.where(sampled, values[layout], junk), dtype=dtype)

    new = tensor(case.new).requires_grad_()
    arguments: dict[str, Any] = {"advantages": torch.tensor(case.advantages, dtype=dtype)}
    if case.per_token:
        arguments = {"advantages": None, "token_advantages": tensor(case.token_advantages)}
    if objective.kl_coef:
        arguments["reference_logprobs"] = tensor(case.reference)
    out = policy_loss(
        new,
        tensor(case.old),
        torch.tensor(np.where(sampled, case.ids[layout], rng.integers(-9, 99, layout.shape))),
        objective=objective,
        ratio_mask=torch.tensor(sampled),
        loss_mask=torch.tensor(trained),
        total_sequences=total,
        **arguments,
    )
    out.loss.backward()
    assert new.grad is not None
    gradient = new.grad.double().numpy()
    assert not gradient[~sampled].any()
    by_token = np.zeros(len(case.ids))
    by_token[layout[real]] = gradient[real]
    return out, by_token


def only(case: Case, sequences: Sequence[int]) -> tuple[Case, np.ndarray]:
    """The case of some of the sequences, renumbered, and where its tokens were."""
    where = np.concatenate([np.flatnonzero(case.ids == i) for i in sequences])
    new_id = {old: new for new, old in enumerate(sequences)}
    part = {
        name: getattr(case, name)[where]
        for name in ("new", "old", "reference", "sampled", "trained", "token_advantages")
    }
    ids = np.array([new_id[i] for i in case.ids[where]])
    return replace(case, ids=ids, advantages=case.advantages[list(sequences)], **part), where


def assert_matches(
    out: LossOutput, gradient: np.ndarray, expected: Expected, rtol: float = 1e-10
) -> None:
    """Everything that `policy_loss` returns, and the gradient, against the loop."""
    near(out.loss.item(), expected.loss, rtol * expected.loss_scale)
    near(out.policy.item(), expected.policy, rtol * expected.loss_scale)
    near(out.kl.item(), expected.kl, rtol * expected.kl_scale)
    near(gradient, expected.gradient, rtol * expected.gradient_scale)
    # Where the loop's gradient is exactly 0 (clipped, beyond the bound), so is the library's.
    assert not gradient[expected.gradient_scale == 0].any()
    near(out.log_ratio.numpy(), expected.log_ratio, rtol * (1 + np.abs(expected.log_ratio)))
    assert out.lengths.tolist() == expected.lengths
    assert out.loss_tokens.tolist() == expected.loss_tokens
    assert out.clipped_tokens.tolist() == expected.clipped_tokens
    assert out.extreme.tolist() == expected.extreme


def near(actual: Any, expected: Any, slack: Any) -> None:
    """Within `slack`, or float32's smallest numbers. NaN is near nothing."""
    assert (np.abs(np.subtract(actual, expected)) <= slack + 1e-37).all(), (actual, expected)
