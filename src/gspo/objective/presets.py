"""Named objectives. One name is one method; docs/objective.md derives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .ratio import Level


@dataclass(frozen=True)
class Objective:
    """What `policy_loss` computes.

    Attributes:
        level: over what the importance ratio is taken.
        epsilon_low, epsilon_high: clip range [1 - epsilon_low, 1 + epsilon_high].
        kl_coef: weight of the k3 term against reference log-probs.

    >>> Objective("sequence", 3e-4, 4e-4) == PRESETS["gspo"].objective
    True
    """

    level: Level
    epsilon_low: float
    epsilon_high: float
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon_low <= 1:
            raise ValueError(f"epsilon_low = {self.epsilon_low}: must be in (0, 1]")
        if not self.epsilon_high > 0:
            raise ValueError(f"epsilon_high = {self.epsilon_high}: must be above 0")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef = {self.kl_coef}: must not be negative")

    def with_epsilon(self, low: float, high: float) -> Objective:
        """The same objective with another clip range."""
        return replace(self, epsilon_low=low, epsilon_high=high)


@dataclass(frozen=True)
class Preset:
    """A named objective, its formula and where it comes from."""

    name: str
    objective: Objective
    formula: str
    source: str


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "gspo",
            Objective("sequence", 3e-4, 4e-4),
            "-(1/N) Σ_i min(s_i A_i, clip(s_i) A_i),  s_i = exp((1/L_i) Σ_t d_t)",
            "Zheng et al., GSPO, arXiv 2507.18071, equations 5 to 7; clip range of section 5.1",
        ),
        Preset(
            "gspo_token",
            Objective("sequence_token", 3e-4, 4e-4),
            "-(1/N) Σ_i (1/L_i) Σ_t min(s_it A_it, clip(s_it) A_it),  s_it = sg[s_i] π/sg[π]",
            "Zheng et al., GSPO, arXiv 2507.18071, equations 13 and 14",
        ),
        Preset(
            "grpo",
            Objective("token", 0.2, 0.2),
            "-(1/N) Σ_i (1/L_i) Σ_t min(w_t A_i, clip(w_t) A_i),  w_t = exp(d_t)",
            "Shao et al., DeepSeekMath, arXiv 2402.03300, equation 3, without its KL term",
        ),
    )
}

LEVEL_DEFAULTS: Mapping[Level, Objective] = {
    "sequence": PRESETS["gspo"].objective,
    "sequence_token": PRESETS["gspo_token"].objective,
    "token": PRESETS["grpo"].objective,
    # ART's mixtures keep the token ratio's spread, hence its clip range.
    "average": Objective("average", 0.2, 0.2),
    "geometric_average": Objective("geometric_average", 0.2, 0.2),
}
