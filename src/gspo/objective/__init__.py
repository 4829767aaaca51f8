"""The objective by itself: tensors in, loss and statistics out. Imports torch and nothing of gspo.

Any trainer can use it:

    from gspo.objective import PRESETS, group_advantages, policy_loss

    advantages = group_advantages(rewards, group_ids)                      # [S]
    out = policy_loss(logprobs, old_logprobs, sequence_ids, advantages,    # [T], [T], [T], [S]
                      PRESETS["gspo"].objective, total_sequences=N)
    out.loss.backward()

The loss, its gradient and its statistics are the same however the sequences are ordered, packed,
padded or split into microbatches, as long as `total_sequences` is the whole step's.
"""

from .advantage import advantages, group_advantages, turn_advantages
from .correction import BOUNDS, Correction, CorrectionKind
from .loss import LossOutput, policy_loss
from .presets import LEVEL_DEFAULTS, PRESETS, AdvantageKind, Objective, Preset, clip_range
from .ratio import (
    MAX_LOG_RATIO,
    Level,
    Segments,
    importance_ratio,
    k3,
    sequence_log_ratio,
    token_log_ratio,
)
from .surrogates import Terms, clipped_surrogate, register_surrogate

__all__ = [
    "BOUNDS",
    "LEVEL_DEFAULTS",
    "MAX_LOG_RATIO",
    "PRESETS",
    "AdvantageKind",
    "Correction",
    "CorrectionKind",
    "Level",
    "LossOutput",
    "Objective",
    "Preset",
    "Segments",
    "Terms",
    "advantages",
    "clip_range",
    "clipped_surrogate",
    "group_advantages",
    "importance_ratio",
    "k3",
    "policy_loss",
    "register_surrogate",
    "sequence_log_ratio",
    "token_log_ratio",
    "turn_advantages",
]
