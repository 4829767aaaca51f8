"""The policy loss: log-probs in, loss and per-sequence statistics out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from .kl import k3
from .presets import Objective, Preset
from .ratio import MAX_LOG_RATIO, sequence_log_ratio, token_log_ratio
from .segments import Segments
from .surrogates import SURROGATES, Terms


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
    log_ratio: Float[Tensor, " S"]
    lengths: Float[Tensor, " S"]
    loss_tokens: Float[Tensor, " S"]
    clipped_tokens: Float[Tensor, " S"]
    extreme: Bool[Tensor, " S"]


def policy_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    sequence_ids: Int[Tensor, "*shape"] | None,
    advantages: Float[Tensor, " S"] | None,
    objective: Objective | Preset,
    *,
    token_advantages: Float[Tensor, "*shape"] | None = None,
    ratio_mask: Bool[Tensor, "*shape"] | Integer[Tensor, "*shape"] | None = None,
    loss_mask: Bool[Tensor, "*shape"] | Integer[Tensor, "*shape"] | None = None,
    total_sequences: int | None = None,
    total_tokens: int | None = None,
    sampling_logprobs: Float[Tensor, "*shape"] | None = None,
    reference_logprobs: Float[Tensor, "*shape"] | None = None,
) -> LossOutput:
    """-(1/N) Σ_i of the clipped surrogate (GSPO, arXiv 2507.18071, equation 5), plus KL.

    Args:
        logprobs: float32 log-probs of the tokens under the policy that is trained; any shape
            (packed [T], padded [B, T], ...). The only argument that gets a gradient.
        old_logprobs: float32 log-probs under the policy that the ratio is taken against.
        sequence_ids: sequence of each token in 0..S-1. Where a sequence's tokens lie doesn't
            matter. Ids under a False `ratio_mask` are ignored. None: each row of a [B, T] batch is
            a sequence.
        advantages: one per sequence; None where `token_advantages` are given instead.
        objective: level, clip range and KL weight; of a preset, its objective is taken. A preset's
            way to make advantages is the caller's part: see `gspo.objective.advantages`.
        token_advantages: one per token, for every level but `sequence`; S is then the largest
            sequence id + 1.
        ratio_mask: tokens that were sampled; they give L_i and l_i. True or 1 is in. Default: all.
        loss_mask: tokens that are trained on. A token that is sampled and not trained on has no
            gradient, neither from the surrogate nor from the KL term, but still counts in l_i and
            L_i: means over a sequence divide by L_i, the sampled tokens, in both terms. So
            dropping a token changes neither l_i nor the weight of the others. The exception is
            `aggregate="token_mean"`, which divides both terms by the trained tokens T: there the
            weight of the others stays only if `total_tokens` does. Default: `ratio_mask`.
        total_sequences: N, the sequences of the whole optimizer step over all microbatches and
            ranks, those with zero advantage included. Default: S.
        total_tokens: T, the trained tokens of the whole step, which `aggregate="token_mean"`
            divides by. Default: those given.
        sampling_logprobs: log-probs under mu, the engine that sampled; needed exactly where the
            objective has a correction for pi_old / mu.
        reference_logprobs: needed exactly where `objective.kl_coef` is above 0.

    Raises:
        ValueError: shapes, dtypes, ids or masks that don't fit together.

    Published example (one sequence of three tokens, epsilon 0.2, advantages per token; s_i is
    0.90856, and NeMo-RL's own test expects -0.6057):

    >>> old = torch.tensor([-1.0, -1.0, -1.0])
    >>> new = torch.tensor([-1.69315, -1.0, -0.59453])
    >>> out = policy_loss(new, old, torch.zeros(3, dtype=torch.long), None,
    ...     Objective("sequence_token", 0.2, 0.2), token_advantages=torch.tensor([1.0, -1.0, 2.0]))
    >>> round(out.log_ratio.exp().item(), 5), round(out.loss.item(), 4)
    (0.90856, -0.6057)
    """
    objective = objective.objective if isinstance(objective, Preset) else objective
    sequence_ids = _ids_of_rows(logprobs) if sequence_ids is None else sequence_ids
    if ratio_mask is None:
        ratio_mask = torch.ones_like(logprobs, dtype=torch.bool)
    ratio_mask = _as_mask("ratio_mask", ratio_mask)
    loss_mask = ratio_mask if loss_mask is None else _as_mask("loss_mask", loss_mask)
    tokens = {"old_logprobs": old_logprobs, "sequence_ids": sequence_ids}
    tokens |= {"ratio_mask": ratio_mask, "loss_mask": loss_mask}
    optional = {
        "token_advantages": token_advantages,
        "sampling_logprobs": sampling_logprobs,
        "reference_logprobs": reference_logprobs,
    }
    tokens |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check(logprobs, tokens, objective, advantages, total_sequences)

    segments = _segments(sequence_ids, ratio_mask, loss_mask, advantages)
    mask = segments.ratio_mask
    sequences = segments.count if total_sequences is None else total_sequences
    flat = {name: tensor.reshape(-1) for name, tensor in tokens.items()}
    new = torch.where(mask, logprobs.reshape(-1), 0.0)
    terms = _terms(new, flat, segments, objective, advantages)
    d = terms.d
    per_sequence, clipped = SURROGATES[objective.surrogate](terms, objective)
    per_sequence = per_sequence * _sequence_weights(terms, flat, objective)
    total = sequences
    if objective.aggregate == "token_mean":
        given = int(segments.loss_mask.sum())
        total = max(given if total_tokens is None else total_tokens, 1)
    policy = -_reduced(per_sequence, segments, objective, total)
    kl = torch.zeros_like(policy)
    if reference_logprobs is not None:
        estimate = k3(new, reference_logprobs.reshape(-1), segments.loss_mask)
        kl = _reduced(segments.mean(estimate), segments, objective, total)
    log_ratio = sequence_log_ratio(d.detach(), segments)
    return LossOutput(
        loss=policy + objective.kl_coef * kl,
        policy=policy.detach(),
        kl=kl.detach(),
        log_ratio=log_ratio,
        lengths=segments.lengths,
        loss_tokens=segments.sum(segments.loss_mask.float()),
        clipped_tokens=segments.sum((clipped & segments.loss_mask).float()),
        extreme=_extreme(objective, d.detach(), log_ratio, segments),
    )


def _reduced(
    means: Float[Tensor, " S"], segments: Segments, objective: Objective, total: int
) -> Float[Tensor, ""]:
    """Means over each sequence's L_i tokens, as the objective adds them up; `total` is N or T.

    The surrogate and the KL term go through this one function: reduced in two ways, the weight of
    the KL against the surrogate would depend on the lengths.
    """
    if objective.aggregate != "sequence_mean":
        means = means * segments.lengths.to(means.dtype)
    return means.sum() / total


def _ids_of_rows(logprobs: Tensor) -> Tensor:
    """Sequence ids of a batch whose rows are sequences."""
    if logprobs.dim() != 2:
        raise ValueError(
            f"logprobs have shape {tuple(logprobs.shape)}: give sequence_ids, which may be left "
            "out only for a [B, T] batch of one sequence per row"
        )
    return torch.arange(len(logprobs), device=logprobs.device)[:, None].expand(logprobs.shape)


def _as_mask(name: str, mask: Tensor) -> Tensor:
    """The mask as booleans: tokenizers give attention masks of 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"{name} is {mask.dtype}: give booleans, or integers that are 0 or 1")
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.numel():
        raise ValueError(f"{name} holds {strange[0].item()}: give booleans, or integers 0 and 1")
    return mask.bool()


def _segments(
    sequence_ids: Tensor, ratio_mask: Tensor, loss_mask: Tensor, advantages: Tensor | None
) -> Segments:
    """The sequences; ids of tokens that were not sampled don't count."""
    mask = ratio_mask.reshape(-1)
    ids = torch.where(mask, sequence_ids.reshape(-1), 0)
    lowest, highest = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
    if lowest < 0:
        raise ValueError(f"sequence_ids hold {lowest}: they count from 0")
    count = highest + 1 if advantages is None else advantages.numel()
    if highest >= count:
        raise ValueError(f"sequence_ids reach {highest}, but there are {count} advantages")
    return Segments(ids, count, mask, loss_mask.reshape(-1) & mask)


def _terms(
    new: Float[Tensor, " T"],
    flat: dict[str, Tensor],
    segments: Segments,
    objective: Objective,
    advantages: Float[Tensor, " S"] | None,
) -> Terms:
    """Everything masked, and the correction of each token where there is one."""
    mask = segments.ratio_mask
    old = torch.where(mask, flat["old_logprobs"], 0.0)
    if advantages is not None:
        advantages = advantages.to(new.dtype)
        a = segments.spread(advantages)
    else:
        a = flat["token_advantages"].to(new.dtype)
    # Advantages of padding, and of tokens that are not trained on, may be NaN.
    a = torch.where(segments.loss_mask, a, 0.0)
    weights = None
    correction = objective.correction
    if correction is not None and correction.per_token:
        c = token_log_ratio(flat["old_logprobs"], flat["sampling_logprobs"], mask)
        weights = correction.weights(c, c, segments.mean(a), segments)
    return Terms(new - old, new, old, a, advantages, segments, weights)


def _sequence_weights(
    terms: Terms, flat: dict[str, Tensor], objective: Objective
) -> Float[Tensor, ...] | float:
    """The correction of each sequence, 1 where there is none."""
    correction = objective.correction
    if correction is None or correction.per_token:
        return 1.0
    mask = terms.segments.ratio_mask
    c = token_log_ratio(flat["old_logprobs"], flat["sampling_logprobs"], mask)
    off = token_log_ratio(flat["sampling_logprobs"], terms.logprobs, mask)
    advantages = terms.advantages
    if advantages is None:
        advantages = terms.segments.mean(terms.a)
    return correction.weights(c, off, advantages, terms.segments)


def _extreme(
    objective: Objective, d: Float[Tensor, " T"], log_ratio: Float[Tensor, " S"], segments: Segments
) -> Bool[Tensor, " S"]:
    """Sequences for which an exponent that this objective uses lies beyond the bound."""
    level = objective.level
    sequence = log_ratio.abs() > MAX_LOG_RATIO
    if objective.surrogate == "likelihood":
        return torch.zeros_like(sequence)
    if objective.surrogate == "gamma":
        return segments.sum(d).abs() > MAX_LOG_RATIO
    if objective.surrogate == "geometric":
        return sequence
    if level in ("sequence", "sequence_token"):
        return sequence
    exponent = (d + segments.spread(log_ratio)) / 2 if level == "geometric_average" else d
    token = segments.sum((exponent.abs() > MAX_LOG_RATIO).float()) > 0
    return token | sequence if level == "average" else token


def _check(
    logprobs: Tensor,
    tokens: dict[str, Tensor],
    objective: Objective,
    advantages: Tensor | None,
    total_sequences: int | None,
) -> None:
    for name, tensor in tokens.items():
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(logprobs.shape)}"
            )
    floats = {"logprobs": logprobs, **tokens}
    for name, tensor in floats.items():
        if name.endswith("logprobs") and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} are {tensor.dtype}: half precision alone costs more than the clip range; "
                "compute log-probs in float32"
            )
    _check_advantages(objective, tokens, advantages)
    for name, needed in (
        ("reference_logprobs", objective.kl_coef > 0),
        ("sampling_logprobs", objective.correction is not None),
    ):
        if needed != (name in tokens):
            raise ValueError(
                f"{name} are {'missing' if needed else 'given'}, but kl_coef = "
                f"{objective.kl_coef} and correction = {objective.correction}"
            )
    if total_sequences is not None and total_sequences < 1:
        raise ValueError(f"total_sequences = {total_sequences}: must be at least 1")


def _check_advantages(
    objective: Objective, tokens: dict[str, Tensor], advantages: Tensor | None
) -> None:
    if (advantages is None) == ("token_advantages" not in tokens):
        raise ValueError("give either advantages, one per sequence, or token_advantages")
    if advantages is not None and advantages.dim() != 1:
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, not one per sequence")
    whole = objective.level == "sequence" or objective.surrogate == "geometric"
    if advantages is None and whole:
        raise ValueError(
            "level 'sequence' has one advantage per sequence; "
            "for one per token use 'sequence_token' (preset gspo_token)"
        )
