"""Public options -> what one call of `train` does. Contradictions end here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gspo.config import TrainConfig
from gspo.core.errors import ConfigError
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.objective import (
    BOUNDS,
    LEVEL_DEFAULTS,
    PRESETS,
    AdvantageKind,
    Correction,
    Objective,
    Preset,
)
from gspo.train.algorithms import find_algorithm


@dataclass(frozen=True)
class Settings:
    """A resolved call of `train`.

    Attributes:
        algorithm: name of the preset, or `level:<level>` for a level that has none.
        objective: with the clip range and the KL weight that apply.
        advantage: how A_i is made of the group's rewards.
        counts_flat: groups with equal rewards count in N and T.
        old_logprobs: `rollout` or `trainer`.
        minibatches: optimizer steps per rollout batch and epoch.
        auto_epsilon: the clip range is steered; the objective's is where it starts.
        learning_rate: peak; None until the model is known (see defaults.py).
        options: everything else.
    """

    algorithm: str
    objective: Objective
    advantage: AdvantageKind
    counts_flat: bool
    minibatches: int
    old_logprobs: str
    auto_epsilon: bool
    learning_rate: float | None
    options: DevTrainConfig

    @property
    def overlong(self) -> tuple[int, int] | None:
        """(max_tokens, cache) of the overlong punishment, or None."""
        options = self.options
        if options.overlong_max_tokens is None or options.overlong_cache is None:
            return None
        return options.overlong_max_tokens, options.overlong_cache

    def as_config(self) -> dict[str, Any]:
        """The options by their own names, with the values that apply.

        >>> resolve().as_config()["epsilon_high"]
        0.0004
        """
        objective, correction = self.objective, self.objective.correction
        clipped = objective.has_range
        low = "auto" if self.auto_epsilon else objective.epsilon_low
        return self.options.model_dump(mode="json") | {
            "algorithm": self.algorithm,
            "importance_sampling_level": objective.level,
            "epsilon": low if clipped else None,
            "epsilon_high": objective.epsilon_high if clipped else None,
            "scale_rewards": {"group_std": True, "group_mean": False}.get(self.advantage),
            "old_logprobs": self.old_logprobs,
            "minibatches": self.minibatches,
            "kl_penalty_coef": objective.kl_coef,
            "epsilon_scale": objective.epsilon_scale,
            "correction": correction and correction.kind,
            "correction_low": correction and correction.low,
            "correction_high": correction and correction.high,
            "learning_rate": self.learning_rate,
        }


def resolve(config: TrainConfig | None = None, options: DevTrainConfig | None = None) -> Settings:
    """Settings of one call.

    Raises:
        ConfigError: options that contradict one another.

    >>> resolve(options=DevTrainConfig(importance_sampling_level="sequence")).algorithm
    'gspo'
    """
    config, options = config or TrainConfig(), options or DevTrainConfig()
    preset = _preset(options)
    _check_epsilon(preset, options)
    low, high = _range(preset.objective, options)
    old = _old_logprobs(options)
    try:
        objective = replace(
            preset.objective,
            epsilon_low=low,
            epsilon_high=high,
            kl_coef=_kl(preset.objective, config, options),
            epsilon_scale=options.epsilon_scale or preset.objective.epsilon_scale,
            correction=_correction(preset.objective.correction, options, old),
        )
    except ValueError as error:
        raise ConfigError(f"dev.TrainConfig: {error}") from None
    return Settings(
        algorithm=preset.name,
        objective=objective,
        advantage=_advantage(preset, options),
        counts_flat=preset.counts_flat,
        minibatches=options.minibatches or preset.minibatches,
        old_logprobs=old,
        auto_epsilon=options.epsilon == "auto",
        learning_rate=config.learning_rate,
        options=options,
    )


def _preset(options: DevTrainConfig) -> Preset:
    level = options.importance_sampling_level
    if options.algorithm is None and level is not None:
        objective = LEVEL_DEFAULTS[level]
        named = [p for p in PRESETS.values() if p.objective == objective]
        return named[0] if named else Preset(f"level:{level}", objective, "", "OpenPipe ART")
    preset = find_algorithm(options.algorithm or "gspo")
    if level is not None and level != preset.objective.level:
        fits = [name for name, p in PRESETS.items() if p.objective.level == level]
        remedy = f"use algorithm={fits[0]!r}" if fits else "leave algorithm out"
        raise ConfigError(
            f"algorithm={preset.name!r} has importance_sampling_level="
            f"{preset.objective.level!r}, not {level!r}: {remedy}, or drop one of the two"
        )
    return preset


def _kl(objective: Objective, config: TrainConfig, options: DevTrainConfig) -> float:
    """The first that was given: the option, the public one, else the preset's own."""
    if options.kl_penalty_coef is not None:
        return options.kl_penalty_coef
    given = "kl_penalty_coef" in config.model_fields_set
    return config.kl_penalty_coef if given else objective.kl_coef


def _range(objective: Objective, options: DevTrainConfig) -> tuple[float, float]:
    low, high = objective.epsilon_low, objective.epsilon_high
    if isinstance(options.epsilon, float | int):
        low = high = float(options.epsilon)
    if options.epsilon_high is not None:
        high = options.epsilon_high
    return low, high


def _check_epsilon(preset: Preset, options: DevTrainConfig) -> None:
    given = [n for n in ("epsilon", "epsilon_high") if getattr(options, n) is not None]
    if given and not preset.objective.has_range:
        raise ConfigError(f"algorithm={preset.name!r} has no clip range: leave {given[0]} out")
    sequence = preset.objective.per_sequence
    if sequence and options.epsilon_high is not None and options.epsilon_high > 1:
        raise ConfigError(
            f"epsilon_high = {options.epsilon_high}: a sequence's ratio is a geometric mean near "
            "1; give at most 1 (the paper: 4e-4)"
        )
    if options.epsilon == "auto" and not sequence:
        raise ConfigError(
            f"epsilon='auto' steers a sequence-level clip range, which {preset.name!r} doesn't "
            "have: use algorithm='gspo', or give a number"
        )
    if options.epsilon is not None and preset.objective.surrogate == "truncate":
        raise ConfigError(
            f"algorithm={preset.name!r} bounds its weights from above alone: use epsilon_high"
        )
    if options.epsilon == "auto" and options.epsilon_high is not None:
        raise ConfigError("epsilon='auto' sets both sides: leave epsilon_high out")
    if options.epsilon_scale == "sqrt_length" and not sequence:
        raise ConfigError(
            f"epsilon_scale={options.epsilon_scale!r} needs a sequence-level ratio, which "
            f"{preset.name!r} doesn't have"
        )


def _old_logprobs(options: DevTrainConfig) -> str:
    if not options.precalculate_logprobs:
        return options.old_logprobs
    if "old_logprobs" in options.model_fields_set and options.old_logprobs == "rollout":
        raise ConfigError(
            "precalculate_logprobs=True means old_logprobs='trainer', not 'rollout': "
            "give one of the two"
        )
    return "trainer"


def _correction(preset: Correction | None, options: DevTrainConfig, old: str) -> Correction | None:
    """The option's, else the preset's, with the bounds that were given."""
    low, high = options.correction_low, options.correction_high
    kind = options.correction
    if kind is None:
        if preset is None:
            if (low, high) != (None, None):
                raise ConfigError("correction_low and correction_high need a correction")
            return None
        kind = preset.kind
    if old == "rollout" and kind != "off_policy_sequence_mask":
        raise ConfigError(
            f"correction={kind!r} weights by trainer / engine, but with "
            "old_logprobs='rollout' the ratio is already taken against the engine: "
            "set old_logprobs='trainer'"
        )
    if low is not None and BOUNDS[kind][0] == 0:
        raise ConfigError(f"correction={kind!r} has no lower bound: leave correction_low out")
    if options.correction is None and preset is not None:
        low = preset.low if low is None else low
        high = preset.high if high is None else high
    return Correction(kind, low, high)


def _advantage(preset: Preset, options: DevTrainConfig) -> AdvantageKind:
    if options.scale_rewards is None:
        return preset.advantage
    if preset.advantage in ("group_std", "group_mean"):
        return "group_std" if options.scale_rewards else "group_mean"
    raise ConfigError(
        f"algorithm={preset.name!r} doesn't centre rewards by group: leave scale_rewards out"
    )
