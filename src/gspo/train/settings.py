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
    """A resolved call of `train`: all options of `dev.TrainConfig`, with the value that applies.

    Attributes:
        algorithm: name of the preset, or `level:<level>` for a level that has none.
        minibatches: a number.
        preset: the method, with the clip range, KL weight and advantage that apply.
        learning_rate: the peak; None until `with_defaults` fills it in for the model.
        given: the options as the user gave them, which a stored batch keeps.
    """

    minibatches: int  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    preset: Preset
    learning_rate: float | None
    given: dev.TrainConfig

    @property
    def objective(self) -> Objective:
        """What `policy_loss` computes."""
        return self.preset.objective

    @property
    def advantage(self) -> AdvantageKind:
        """How A_i is made of the group's rewards."""
        return self.preset.advantage

    def with_range(self, low: float, high: float) -> Settings:
        """The same call with the clip range that was steered to."""
        preset = replace(self.preset, objective=self.objective.with_epsilon(low, high))
        return self.model_copy(update={"preset": preset, "epsilon": low, "epsilon_high": high})

    @property
    def overlong(self) -> tuple[int, int] | None:
        """(max_tokens, cache) of the overlong punishment, or None."""
        if self.overlong_max_tokens is None or self.overlong_cache is None:
            return None
        return self.overlong_max_tokens, self.overlong_cache

    def as_config(self) -> dict[str, Any]:
        """The options by name, with the values that apply.

        >>> resolve().as_config()["epsilon_high"]
        0.0004
        """
        return self.model_dump(mode="json", exclude={"preset", "given"})


def resolve(config: TrainConfig | None = None, options: dev.TrainConfig | None = None) -> Settings:
    """Settings of one call.

    Raises:
        ConfigError: options that contradict one another.

    >>> resolve(options=dev.TrainConfig(importance_sampling_level="sequence")).algorithm
    'gspo'
    """
    config, given = config or TrainConfig(), options or dev.TrainConfig()
    preset = _preset(given)
    _refuse(preset, given)
    old = "trainer" if given.precalculate_logprobs else given.old_logprobs
    low, high = preset.objective.epsilon_low, preset.objective.epsilon_high
    if isinstance(given.epsilon, float | int):
        low = high = float(given.epsilon)
    if given.epsilon_high is not None:
        high = given.epsilon_high
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
    advantage, correction = preset.advantage, objective.correction
    if given.scale_rewards is not None:
        advantage = "group_std" if given.scale_rewards else "group_mean"
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
    # Without a second check: each value was checked by its own class.
    return Settings.model_construct(
        **(dict(given) | applies),
        preset=replace(preset, objective=objective, advantage=advantage),
        given=given,
        learning_rate=config.learning_rate,
    )


def _preset(options: dev.TrainConfig) -> Preset:
    """The method that is asked for, by its name or by the level of its ratio."""
    level = options.importance_sampling_level
    if options.algorithm is None and level is not None:
        objective = LEVEL_DEFAULTS[level]
        named = [preset for preset in PRESETS.values() if preset.objective == objective]
        return named[0] if named else Preset(f"level:{level}", objective, "", "OpenPipe ART")
    preset = find_algorithm(options.algorithm or "gspo")
    if level is not None and level != preset.objective.level:
        fitting = [name for name, p in PRESETS.items() if p.objective.level == level]
        remedy = f"use algorithm={fitting[0]!r}" if fitting else "leave algorithm out"
        raise ConfigError(
            f"algorithm={preset.name!r} has importance_sampling_level="
            f"{preset.objective.level!r}, not {level!r}: {remedy}, or drop one of the two"
        )
    return preset


def _refuse(preset: Preset, options: dev.TrainConfig) -> None:
    """Refuse options that contradict the method or one another."""
    name, low, high = preset.name, options.epsilon, options.epsilon_high
    scale, sequence = options.epsilon_scale, preset.objective.per_sequence
    old_logprobs = options.old_logprobs if "old_logprobs" in options.model_fields_set else "trainer"
    contradictions = (
        (
            (low, high) != (None, None) and not preset.objective.has_range,
            f"algorithm={name!r} has no clip range: leave "
            f"{'epsilon_high' if low is None else 'epsilon'} out",
        ),
        (
            sequence and high is not None and high > 1,
            f"epsilon_high = {high}: a sequence's ratio is a geometric mean near 1; give at most "
            "1 (the paper: 4e-4)",
        ),
        (
            low == "auto" and not sequence,
            f"epsilon='auto' steers a sequence-level clip range, which {name!r} doesn't have: use "
            "algorithm='gspo', or give a number",
        ),
        (
            low is not None and preset.objective.surrogate == "truncate",
            f"algorithm={name!r} bounds its weights from above only: use epsilon_high",
        ),
        (
            low == "auto" and high is not None,
            "epsilon='auto' sets both sides: leave epsilon_high out",
        ),
        (
            scale == "sqrt_length" and not sequence,
            f"epsilon_scale={scale!r} needs a sequence-level ratio, which {name!r} doesn't have",
        ),
        (
            options.precalculate_logprobs and old_logprobs == "rollout",
            "precalculate_logprobs=True means old_logprobs='trainer', not 'rollout': give one of "
            "the two",
        ),
        (
            options.scale_rewards is not None
            and preset.advantage not in ("group_std", "group_mean"),
            f"algorithm={name!r} doesn't centre rewards by group: leave scale_rewards out",
        ),
    )
    for refused, reason in contradictions:
        if refused:
            raise ConfigError(reason)


def _kl(objective: Objective, config: TrainConfig, options: dev.TrainConfig) -> float:
    """The option, else the public one if it was given, else the preset's weight."""
    if options.kl_penalty_coef is not None:
        return options.kl_penalty_coef
    given = "kl_penalty_coef" in config.model_fields_set
    return config.kl_penalty_coef if given else objective.kl_coef


def _correction(preset: Correction | None, options: dev.TrainConfig, old: str) -> Correction | None:
    """The option's, else the preset's, with the bounds that were given."""
    low, high = options.correction_low, options.correction_high
    kind = options.correction or (preset and preset.kind)
    if kind is None:
        if (low, high) != (None, None):
            raise ConfigError("correction_low and correction_high need a correction")
        return None
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
