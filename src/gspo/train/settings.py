"""Public options -> what one call of `train` does. Contradictions end here.

(TrainConfig, dev.TrainConfig) -> resolve -> Settings -> with_defaults (the model's)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gspo import dev
from gspo.config import TrainConfig
from gspo.core.errors import ConfigError
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


class Settings(dev.TrainConfig):
    """A resolved call of `train`: every option of `dev.TrainConfig`, with the value that applies.

    Attributes:
        algorithm: name of the preset, or `level:<level>` for a level that has none.
        minibatches: a number.
        preset: the method, with the clip range, KL weight and advantage that apply.
        learning_rate: peak; None until the model is known (`with_defaults`).
    """

    minibatches: int  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    preset: Preset
    learning_rate: float | None

    @property
    def objective(self) -> Objective:
        """What `policy_loss` computes."""
        return self.preset.objective

    @property
    def advantage(self) -> AdvantageKind:
        """How A_i is made of the group's rewards."""
        return self.preset.advantage

    @property
    def counts_flat(self) -> bool:
        """Whether groups with equal rewards count in N and T."""
        return self.preset.counts_flat

    def with_range(self, low: float, high: float) -> Settings:
        """The same call with the clip range that was steered to."""
        preset = replace(self.preset, objective=self.objective.with_epsilon(low, high))
        return self.model_copy(update={"preset": preset, "epsilon": low, "epsilon_high": high})

    @property
    def auto_epsilon(self) -> bool:
        """Whether the clip range is steered; the objective's is where it starts."""
        return self.epsilon == "auto"

    @property
    def overlong(self) -> tuple[int, int] | None:
        """(max_tokens, cache) of the overlong punishment, or None."""
        if self.overlong_max_tokens is None or self.overlong_cache is None:
            return None
        return self.overlong_max_tokens, self.overlong_cache

    def as_config(self) -> dict[str, Any]:
        """The options by their own names, with the values that apply.

        >>> resolve().as_config()["epsilon_high"]
        0.0004
        """
        return self.model_dump(mode="json", exclude={"preset"})


def resolve(config: TrainConfig | None = None, options: dev.TrainConfig | None = None) -> Settings:
    """Settings of one call.

    Raises:
        ConfigError: options that contradict one another.

    >>> resolve(options=dev.TrainConfig(importance_sampling_level="sequence")).algorithm
    'gspo'
    """
    config, given = config or TrainConfig(), options or dev.TrainConfig()
    preset = _preset(given)
    _check_epsilon(preset, given)
    low, high = _range(preset.objective, given)
    old = _old_logprobs(given)
    try:
        objective = replace(
            preset.objective,
            epsilon_low=low,
            epsilon_high=high,
            kl_coef=_kl(preset.objective, config, given),
            epsilon_scale=given.epsilon_scale or preset.objective.epsilon_scale,
            correction=_correction(preset.objective.correction, given, old),
        )
    except ValueError as error:
        raise ConfigError(f"dev.TrainConfig: {error}") from None
    advantage, correction = _advantage(preset, given), objective.correction
    has_range = objective.has_range
    applies = {
        "algorithm": preset.name,
        "importance_sampling_level": objective.level,
        "epsilon": (given.epsilon if given.epsilon == "auto" else low) if has_range else None,
        "epsilon_high": high if has_range else None,
        "epsilon_scale": objective.epsilon_scale,
        "scale_rewards": {"group_std": True, "group_mean": False}.get(advantage),
        "old_logprobs": old,
        "kl_penalty_coef": objective.kl_coef,
        "correction": correction and correction.kind,
        "correction_low": correction and correction.low,
        "correction_high": correction and correction.high,
        "minibatches": given.minibatches or preset.minibatches,
    }
    # Checked already, each by its own class; which options the user gave stays known.
    return Settings.model_construct(
        given.model_fields_set,
        **(dict(given) | applies),
        preset=replace(preset, objective=objective, advantage=advantage),
        learning_rate=config.learning_rate,
    )


def _preset(options: dev.TrainConfig) -> Preset:
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


def _kl(objective: Objective, config: TrainConfig, options: dev.TrainConfig) -> float:
    """The first that was given: the option, the public one, else the preset's own."""
    if options.kl_penalty_coef is not None:
        return options.kl_penalty_coef
    given = "kl_penalty_coef" in config.model_fields_set
    return config.kl_penalty_coef if given else objective.kl_coef


def _range(objective: Objective, options: dev.TrainConfig) -> tuple[float, float]:
    low, high = objective.epsilon_low, objective.epsilon_high
    if isinstance(options.epsilon, float | int):
        low = high = float(options.epsilon)
    if options.epsilon_high is not None:
        high = options.epsilon_high
    return low, high


def _check_epsilon(preset: Preset, options: dev.TrainConfig) -> None:
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


def _old_logprobs(options: dev.TrainConfig) -> str:
    if not options.precalculate_logprobs:
        return options.old_logprobs
    if "old_logprobs" in options.model_fields_set and options.old_logprobs == "rollout":
        raise ConfigError(
            "precalculate_logprobs=True means old_logprobs='trainer', not 'rollout': "
            "give one of the two"
        )
    return "trainer"


def _correction(preset: Correction | None, options: dev.TrainConfig, old: str) -> Correction | None:
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


def _advantage(preset: Preset, options: dev.TrainConfig) -> AdvantageKind:
    if options.scale_rewards is None:
        return preset.advantage
    if preset.advantage in ("group_std", "group_mean"):
        return "group_std" if options.scale_rewards else "group_mean"
    raise ConfigError(
        f"algorithm={preset.name!r} doesn't centre rewards by group: leave scale_rewards out"
    )
