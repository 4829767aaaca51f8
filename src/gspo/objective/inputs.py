"""What `policy_loss` accepts: everything is checked and flattened before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .presets import Objective
from .ratio import PerSequence, Segments


def checked(
    logprobs: Tensor,
    objective: Objective,
    advantages: Tensor | None,
    total_sequences: int | None,
    given: dict[str, Tensor | None],
    sequence_count: int | None,
    sum_parts: Callable[[Tensor], Tensor] | None,
) -> tuple[dict[str, Tensor], PerSequence | None, Segments]:
    """Check and flatten the arguments of `policy_loss`.

    Numbers are checked on the device that they lie on: checking those of the CPU doesn't wait for
    a GPU.

    Returns:
        What is given for each token, by name, flat and on the device of `logprobs`. `logprobs` and
        `old_logprobs` are 0 where no token was sampled, and `token_advantages`, which are always
        there, are 0 where none is trained on: padding may hold NaN. The advantages of the
        sequences, if they are given; and the sequences.

    Raises:
        ValueError: shapes, dtypes, ids or masks that don't fit together.
    """
    tokens = {"logprobs": logprobs}
    tokens |= {name: tensor for name, tensor in given.items() if tensor is not None}
    _check_objective(objective, tokens, advantages)
    if total_sequences is not None and total_sequences < 1:
        raise ValueError(f"total_sequences = {total_sequences}: must be at least 1")
    shape = tuple(logprobs.shape)
    if "sequence_ids" not in tokens:
        if len(shape) != 2:
            raise ValueError(f"logprobs have shape {shape}: give sequence_ids, or a [B, T] batch")
        rows = torch.arange(len(logprobs), device=logprobs.device)
        tokens["sequence_ids"] = rows[:, None].expand(shape)
    ids = tokens["sequence_ids"]
    tokens.setdefault("ratio_mask", torch.ones_like(ids, dtype=torch.bool))
    tokens.setdefault("loss_mask", tokens["ratio_mask"])
    for name, tensor in tokens.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logprobs {shape}")
        if name.endswith("logprobs") and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} are {tensor.dtype}: the rounding of half precision costs more than the "
                "clip range; compute log-probs in float32"
            )
        if name.endswith("mask"):
            tokens[name] = _as_mask(name, tensor)
    # Ids of tokens that were not sampled don't count.
    ids = tokens["sequence_ids"] = torch.where(tokens["ratio_mask"].to(ids.device), ids, 0)
    lowest, highest = torch.stack(ids.aminmax()).tolist() if ids.numel() else (0, -1)
    count = _count(highest + 1, advantages, sequence_count, summed=sum_parts is not None)
    if lowest < 0 or highest >= count:
        raise ValueError(f"sequence_ids are {lowest} to {highest}, but there are {count} sequences")
    return _flattened(tokens, advantages, count, sum_parts)


def _count(ids_end: int, advantages: Tensor | None, given: int | None, *, summed: bool) -> int:
    """S, of the largest id here + 1 or of what else says it."""
    if advantages is not None:
        if given is not None:
            raise ValueError("sequence_count is the number of advantages: leave it out")
        return advantages.numel()
    if given is None and summed:
        raise ValueError("sum_parts and token_advantages: give sequence_count, the same in all")
    return ids_end if given is None else given


def _flattened(
    tokens: dict[str, Tensor],
    advantages: Tensor | None,
    count: int,
    sum_parts: Callable[[Tensor], Tensor] | None,
) -> tuple[dict[str, Tensor], PerSequence | None, Segments]:
    """What `checked` returns, of arguments that fit together."""
    logprobs = tokens["logprobs"]
    flat = {
        name: tensor.reshape(-1).to(logprobs.device, non_blocking=True)
        for name, tensor in tokens.items()
    }
    mask = flat["ratio_mask"]
    segments = Segments(flat["sequence_ids"], count, mask, flat["loss_mask"] & mask, sum_parts)
    for name in ("logprobs", "old_logprobs"):
        flat[name] = torch.where(mask, flat[name], 0.0)
    if advantages is not None:
        advantages = advantages.to(logprobs.device, logprobs.dtype, non_blocking=True)
        flat["token_advantages"] = segments.spread(advantages)
    a = flat["token_advantages"].to(logprobs.dtype)
    flat["token_advantages"] = torch.where(segments.loss_mask, a, 0.0)
    return flat, advantages, segments


def _check_objective(
    objective: Objective, tokens: dict[str, Tensor], advantages: Tensor | None
) -> None:
    """Refuse what the objective needs and isn't there, and what it wouldn't read."""
    has_kl, has_correction = objective.kl_coef > 0, objective.correction is not None
    for name, needed in (("reference_logprobs", has_kl), ("sampling_logprobs", has_correction)):
        if needed != (name in tokens):
            raise ValueError(
                f"{name} are {'missing' if needed else 'given'}, but kl_coef = "
                f"{objective.kl_coef} and correction = {objective.correction}"
            )
    if (advantages is None) == ("token_advantages" not in tokens):
        raise ValueError("give either advantages, one per sequence, or token_advantages")
    if advantages is not None and advantages.dim() != 1:
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, not one per sequence")
    if advantages is None and objective.one_ratio:
        raise ValueError("one ratio per sequence has one advantage: use level 'sequence_token'")


def _as_mask(name: str, mask: Tensor) -> Tensor:
    """The mask as booleans: tokenizers give attention masks of 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    strange = mask[(mask != 0) & (mask != 1)]
    if mask.is_floating_point() or strange.numel():
        values = strange.unique().tolist()
        raise ValueError(f"{name} is {mask.dtype}, holds {values}: give booleans, or 0 and 1")
    return mask.bool()
