"""The policy loss: log-probs in, loss and per-sequence statistics out.

For GSPO, `policy_loss` is these lines, with masks, sums over packed sequences and bounds added:

>>> low, high, old = 3e-4, 4e-4, torch.tensor([-1.0, -1.0, -1.5])
>>> new, ids = torch.tensor([-1.1, -0.9, -1.6]), torch.tensor([0, 0, 1])
>>> A = torch.tensor([1.0, -1.0])
>>> d = new - old  # d_t
>>> l = torch.stack([d[ids == i].mean() for i in (0, 1)])  # l_i, equation 7
>>> s = l.exp()  # s_i, equation 7
>>> loss = -torch.minimum(s * A, s.clamp(1 - low, 1 + high) * A).mean()  # equation 5
>>> out = policy_loss(new, old, ids, A, Objective("sequence", low, high))
>>> torch.allclose(out.loss, loss), out.clipped_tokens.tolist()
(True, [0.0, 1.0])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from .inputs import checked
from .presets import Objective, Preset, clip_range
from .ratio import (
    PerSequence,
    PerToken,
    Segments,
    bounded_exp,
    importance_ratio,
    is_extreme,
    k3,
    sequence_log_ratio,
)
from .surrogates import SURROGATES, Terms

Tokens = Float[Tensor, "*shape"]
Mask = Bool[Tensor, "*shape"] | Integer[Tensor, "*shape"]


@dataclass(frozen=True)
class LossOutput:
    """What `policy_loss` returns. Only `loss` carries gradient; S sequences.

    Attributes:
        loss: scalar, already divided by the step's N (or T): add it up over microbatches and
            ranks.
        policy: the surrogate's part of `loss`, without the KL term.
        kl: k3 of the trained tokens, reduced as the surrogate is (see `Objective.aggregate`) and
            not yet weighted: `loss = policy + kl_coef * kl`. 0 without a reference.
        log_ratio: l_i per sequence, unbounded.
        lengths: L_i, sampled tokens per sequence.
        loss_tokens: tokens of each sequence that are trained on.
        clipped_tokens: of those, how many the range acts on: they have zero gradient, or with the
            surrogate `truncate` a bounded weight.
        extreme: sequences in which an exponent that the objective uses (l_i, a token's d_t, or
            their sum) lies beyond ±MAX_LOG_RATIO.
    """

    loss: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    log_ratio: PerSequence
    lengths: PerSequence
    loss_tokens: PerSequence
    clipped_tokens: PerSequence
    extreme: Bool[Tensor, " S"]


def policy_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    sequence_ids: Int[Tensor, "*shape"] | None,
    advantages: PerSequence | None,
    objective: Objective | Preset,
    *,
    token_advantages: Tokens | None = None,
    ratio_mask: Mask | None = None,
    loss_mask: Mask | None = None,
    total_sequences: int | None = None,
    total_tokens: int | None = None,
    sampling_logprobs: Tokens | None = None,
    reference_logprobs: Tokens | None = None,
) -> LossOutput:
    """-(1/N) Σ_i of the clipped surrogate (GSPO, arXiv 2507.18071, equation 5), plus KL.

    Args:
        logprobs: float32 log-probs of the tokens under the policy that is trained; any shape
            (packed [T], padded [B, T], ...). The only argument that gets a gradient.
        old_logprobs: float32 log-probs under the policy that the ratio is taken against.
        sequence_ids: sequence of each token in 0..S-1, in any order; ignored where `ratio_mask` is
            False. None: each row of a [B, T] batch is a sequence.
        advantages: one per sequence; None if `token_advantages` are given instead.
        objective: level, clip range and KL weight; of a preset, its objective is taken.
        token_advantages: one per token, for all levels but `sequence`; S is then the largest
            sequence id + 1.
        ratio_mask: sampled tokens, which make up l_i and L_i. True or 1 is in. Default: all.
        loss_mask: tokens that are trained on. The others have no gradient but stay in l_i and L_i:
            leaving a token out doesn't change the weight of the rest. (With
            `aggregate="token_mean"` it does, unless `total_tokens` stays.) Default: `ratio_mask`.
        total_sequences: N, the sequences of the whole optimizer step over all microbatches and
            ranks, those with zero advantage included. Default: S.
        total_tokens: T, the trained tokens of the whole step, which `aggregate="token_mean"`
            divides by. Default: those given.
        sampling_logprobs: log-probs under mu, the engine that sampled; needed if the objective has
            a correction for pi_old / mu, and only then.
        reference_logprobs: needed if `objective.kl_coef` is above 0, and only then.

    Raises:
        ValueError: shapes, dtypes, ids or masks that don't fit together.

    NeMo-RL's published example, one sequence of three tokens:

    >>> old = torch.tensor([-1.0, -1.0, -1.0])
    >>> new = torch.tensor([-1.69315, -1.0, -0.59453])
    >>> out = policy_loss(new, old, torch.zeros(3, dtype=torch.long), None,
    ...     Objective("sequence_token", 0.2, 0.2), token_advantages=torch.tensor([1.0, -1.0, 2.0]))
    >>> round(out.log_ratio.exp().item(), 5), round(out.loss.item(), 4)
    (0.90856, -0.6057)
    """
    objective = objective.objective if isinstance(objective, Preset) else objective
    given = {"old_logprobs": old_logprobs, "sequence_ids": sequence_ids, "ratio_mask": ratio_mask}
    given |= {"loss_mask": loss_mask, "token_advantages": token_advantages}
    given |= {"sampling_logprobs": sampling_logprobs, "reference_logprobs": reference_logprobs}
    tokens, advantages, segments = checked(logprobs, objective, advantages, total_sequences, given)
    total = segments.count if total_sequences is None else total_sequences  # N
    if objective.aggregate == "token_mean":
        total = max(int(segments.loss_mask.sum()) if total_tokens is None else total_tokens, 1)  # T
    new, old, a = tokens["logprobs"], tokens["old_logprobs"], tokens["token_advantages"]

    d = new - old  # d_t of each sampled token
    log_ratio = sequence_log_ratio(d, segments)  # l_i = (1/L_i) Σ_t d_t, equation 7
    ratio, lengths = bounded_exp(log_ratio), segments.lengths.to(d.dtype)  # s_i, equation 7; L_i
    if objective.level != "sequence":
        ratio, lengths = importance_ratio(objective.level, d, segments), segments.spread(lengths)
    low, high = clip_range(objective, lengths)
    token_weights, weights = _correction_weights(objective, tokens, advantages, segments)
    level, constants = objective.level, objective.constants
    terms = Terms(
        level, ratio, d, new, old, a, advantages, low, high, constants, segments, token_weights
    )
    # v_i; for the surrogate `clip` min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i), equation 5.
    value, clipped = SURROGATES[objective.surrogate].function(terms)
    policy = -_sum(value * weights, objective, segments) / total  # -(1/N) Σ_i v_i

    kl = torch.zeros_like(policy)
    if reference_logprobs is not None:
        estimate = k3(new, tokens["reference_logprobs"], segments.loss_mask)
        kl = _sum(segments.mean(estimate), objective, segments) / total
    clipped = torch.zeros_like(a) if clipped is None else clipped & segments.loss_mask
    return LossOutput(
        loss=policy + objective.kl_coef * kl,
        policy=policy.detach(),
        kl=kl.detach(),
        log_ratio=log_ratio.detach(),
        lengths=segments.lengths,
        loss_tokens=segments.sum(segments.loss_mask.float()),
        clipped_tokens=segments.sum(clipped.float()),
        extreme=is_extreme(objective.exponent, d.detach(), log_ratio.detach(), segments),
    )


def _correction_weights(
    objective: Objective,
    tokens: Mapping[str, Tensor],
    advantages: PerSequence | None,
    segments: Segments,
) -> tuple[PerToken | None, PerSequence | float]:
    """Weights for pi_old / mu, of each token and of each sequence; a correction has one of them."""
    if objective.correction is None:
        return None, 1.0
    new, old, mu = (tokens[name] for name in ("logprobs", "old_logprobs", "sampling_logprobs"))
    signs = segments.mean(tokens["token_advantages"]) if advantages is None else advantages
    weights = objective.correction.weights(new, old, mu, signs, segments)
    return (weights, 1.0) if objective.correction.per_token else (None, weights)


def _sum(means: PerSequence, objective: Objective, segments: Segments) -> Float[Tensor, ""]:
    """Means over each sequence's L_i tokens, as the objective adds them up.

    The surrogate and the KL term go through this one function: reduced in two ways, the weight of
    the KL against the surrogate would depend on the lengths.
    """
    if objective.aggregate != "sequence_mean":
        means = means * segments.lengths.to(means.dtype)
    return means.sum()
