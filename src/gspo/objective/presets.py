"""Named objectives: one name is one method, and one table of presets.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from .correction import Correction
from .ratio import Level
from .surrogates import SURROGATES

Aggregate = Literal["sequence_mean", "sequence_sum", "token_mean"]
AdvantageKind = Literal["group_std", "group_mean", "leave_one_out", "reward"]
EpsilonScale = Literal["constant", "sqrt_length"]


@dataclass(frozen=True)
class Objective:
    """What `policy_loss` computes.

    Attributes:
        level: over what the importance ratio is taken.
        epsilon_low, epsilon_high: the clip range, in the surrogate's units (see surrogates.py).
        kl_coef: weight of the k3 term against reference log-probs.
        surrogate: what is done with ratio and advantage; a name of surrogates.py, or one that
            `register_surrogate` was given.
        aggregate: `sequence_mean`: (1/N) Σ_i (1/L_i) Σ_t; `sequence_sum`: (1/N) Σ_i Σ_t;
            `token_mean`: (1/T) Σ_i Σ_t with T the step's tokens. Surrogate and k3 are both reduced
            in this way, so that `kl_coef` weighs a token's k3 against a token's surrogate.
        epsilon_scale: `sqrt_length` divides epsilon by sqrt(L_i), so that the band on the summed
            log-ratio grows as sqrt(L_i) (FSPO, arXiv 2509.09177).
        correction: weight for pi_old / mu, if the two are kept apart.
        constants: the numbers of the surrogate.

    Raises:
        ValueError: a name that is none of the choices, or a number outside its range.

    >>> Objective("sequence", 3e-4, 4e-4) == PRESETS["gspo"].objective
    True
    """

    level: Level
    epsilon_low: float
    epsilon_high: float
    kl_coef: float = 0.0
    surrogate: str = "clip"
    aggregate: Aggregate = "sequence_mean"
    epsilon_scale: EpsilonScale = "constant"
    correction: Correction | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = {"level": get_args(Level), "surrogate": SURROGATES}
        choices |= {"aggregate": get_args(Aggregate), "epsilon_scale": get_args(EpsilonScale)}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                more = ", or register_surrogate()'s" if name == "surrogate" else ""
                known = ", ".join(known)
                raise ValueError(f"unknown {name} {value!r}: it is one of {known}{more}")
        surrogate, scale = SURROGATES[self.surrogate], self.epsilon_scale
        title = f"surrogate {self.surrogate!r}"
        if self.level not in surrogate.levels:
            levels = " or ".join(map(repr, surrogate.levels))
            raise ValueError(f"{title} takes ratios of the level {levels}, not {self.level!r}")
        if set(self.constants) != set(surrogate.constants):
            wanted, given = (", ".join(c) or "none" for c in (surrogate.constants, self.constants))
            raise ValueError(f"{title} has the constants {wanted}, but {given} were given")
        if self.has_range and not 0 < self.epsilon_low <= 1:
            raise ValueError(f"epsilon_low = {self.epsilon_low}: must be in (0, 1]")
        if self.has_range and not self.epsilon_high > 0:
            raise ValueError(f"epsilon_high = {self.epsilon_high}: must be above 0")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef = {self.kl_coef}: must not be negative")
        if scale != "constant" and not self.per_sequence:
            raise ValueError(f"epsilon_scale={scale!r} needs a sequence-level ratio")
        if self.correction is not None and self.correction.per_token and self.one_ratio:
            raise ValueError(
                f"correction {self.correction.kind!r} weights tokens, but this objective has "
                "one ratio per sequence: use a sequence_... correction"
            )

    @property
    def has_range(self) -> bool:
        """Whether the surrogate has a clip range; without one, epsilon means nothing."""
        return SURROGATES[self.surrogate].has_range

    @property
    def per_sequence(self) -> bool:
        """Whether a sequence is clipped as a whole, by l_i, as in GSPO and GSPO-token."""
        return self.level in ("sequence", "sequence_token")

    @property
    def exponent(self) -> str:
        """What is exponentiated (see `ratio.is_extreme`): the level's log-ratio, if no other."""
        return SURROGATES[self.surrogate].exponent or self.level

    @property
    def one_ratio(self) -> bool:
        """Whether a sequence has one ratio for all its tokens, hence one advantage."""
        return self.exponent == "sequence"

    def with_epsilon(self, low: float, high: float) -> Objective:
        """The same objective with another range."""
        return replace(self, epsilon_low=low, epsilon_high=high)


def clip_range(
    objective: Objective, lengths: Float[Tensor, " N"]
) -> tuple[float | Float[Tensor, " N"], float | Float[Tensor, " N"]]:
    """How far below and above 1 a ratio may lie before it is clipped.

    Args:
        objective: its epsilons and how they scale with length.
        lengths: L_i of the sequence of each ratio, in the ratio's dtype.

    >>> fspo = Objective("sequence", 0.1, 0.2, epsilon_scale="sqrt_length")
    >>> clip_range(fspo, torch.tensor([4.0]))
    (tensor([0.0500]), tensor([0.1000]))
    """
    if objective.epsilon_scale == "constant":
        return objective.epsilon_low, objective.epsilon_high
    scale = lengths.clamp(min=1).rsqrt()
    return objective.epsilon_low * scale, objective.epsilon_high * scale


@dataclass(frozen=True)
class Preset:
    """A named objective, its formula and where it comes from.

    Attributes:
        advantage: how A_i is made of the group's rewards.
        counts_flat: sequences of groups with equal rewards count in N and T, and in the KL term if
            there is one. False: such groups are left out of all three.
        minibatches: optimizer steps per rollout batch if the user gives no number. 1 for a
            method without a ratio: from the second step on its samples would be off-policy, with
            nothing to correct for it.
        turn_weight: weight of a turn's own advantage beside the trajectory's (`turn_advantages`),
            where turns have rewards. 0: rewards of turns are not read.
    """

    name: str
    objective: Objective
    formula: str = ""
    source: str = "your own"
    advantage: AdvantageKind = "group_std"
    counts_flat: bool = True
    minibatches: int = 4
    turn_weight: float = 0.0


def _preset(name: str, table: dict[str, Any]) -> Preset:
    """The preset of a table of presets.toml; a surrogate without a range has no `epsilon`."""
    low, high = table.pop("epsilon", (1.0, 1.0))
    around = {key: table.pop(key) for key in Preset.__annotations__.keys() & table.keys()}
    return Preset(name, Objective(epsilon_low=low, epsilon_high=high, **table), **around)


_TABLES = tomllib.loads(Path(__file__).with_name("presets.toml").read_text(encoding="utf-8"))
PRESETS: Mapping[str, Preset] = {name: _preset(name, table) for name, table in _TABLES.items()}

LEVEL_DEFAULTS: Mapping[Level, Objective] = {
    "sequence": PRESETS["gspo"].objective,
    "sequence_token": PRESETS["gspo_token"].objective,
    "token": PRESETS["grpo"].objective,
    # ART's mixtures keep the token ratio's spread, hence its clip range.
    "average": Objective("average", 0.2, 0.2),
    "geometric_average": Objective("geometric_average", 0.2, 0.2),
}
