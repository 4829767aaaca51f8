"""Public options -> what one call of `train` does. Contradictions end here.

(TrainConfig, dev.TrainConfig) -> resolve -> Settings -> with_defaults (the model's)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gspo import dev
from gspo.config import TrainConfig
from gspo.core.errors import ConfigError
from gspo.objective import BOUNDS, LEVEL_DEFAULTS, PRESETS, Correction, Objective, Preset
from gspo.train.algorithms import find_algorithm


class Settings(dev.TrainConfig):
    """A resolved call of `train`: all options of `dev.TrainConfig`, with the value that applies.

    Attributes:
        algorithm: name of the preset, or `level:<level>` for a level that has none.
        minibatches, turn_weight: numbers.
        preset: the method, with the clip range, KL weight and advantage that apply.
        learning_rate: the peak; None until `with_defaults` fills it in for the model.
        given: the options as the user gave them, which a stored batch keeps.
    """

    minibatches: int  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    turn_weight: float  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    preset: Preset
    learning_rate: float | None
    given: dev.TrainConfig

    @property
    def objective(self) -> Objective:
        """What `policy_loss` computes."""
        return self.preset.objective

    def with_objective(self, objective: Objective) -> Settings:
        """The same call with another objective, such as one of the clip range steered to."""
        preset = replace(self.preset, objective=objective)
        return self.model_copy(update={"preset": preset})

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
    original = preset.objective
    low, high = original.epsilon_low, original.epsilon_high
    if isinstance(given.epsilon, float):
        low = high = given.epsilon
    kl = given.kl_penalty_coef
    if kl is None:
        public = "kl_penalty_coef" in config.model_fields_set
        kl = config.kl_penalty_coef if public else original.kl_coef
    if given.kl_reference is not None and not kl:
        raise ConfigError("kl_reference is of a KL term: give a kl_penalty_coef too")
    try:
        objective = replace(
            original,
            epsilon_low=low,
            epsilon_high=given.epsilon_high or high,
            kl_coef=kl,
            epsilon_scale=given.epsilon_scale or original.epsilon_scale,
            correction=_correction(original.correction, given),
        )
    except ValueError as error:
        raise ConfigError(f"dev.TrainConfig: algorithm={preset.name!r}: {error}") from None
    advantage, correction = preset.advantage, objective.correction
    weight = preset.turn_weight if given.turn_weight is None else given.turn_weight
    if given.scale_rewards is not None:
        advantage = "group_std" if given.scale_rewards else "group_mean"
    ranged = objective.has_range
    applies = {
        "algorithm": preset.name,
        "importance_sampling_level": objective.level,
        "epsilon": given.epsilon if given.epsilon == "auto" else low if ranged else None,
        "epsilon_high": objective.epsilon_high if ranged else None,
        "epsilon_scale": objective.epsilon_scale,
        "scale_rewards": {"group_std": True, "group_mean": False}.get(advantage),
        "kl_penalty_coef": objective.kl_coef,
        "correction": correction and correction.kind,
        "correction_low": correction and correction.low,
        "correction_high": correction and correction.high,
        "minibatches": given.minibatches or preset.minibatches,
        "learning_rate": config.learning_rate,
        "turn_weight": weight,
        "preset": replace(preset, objective=objective, advantage=advantage, turn_weight=weight),
        "given": given,
    }
    # Without a second check: each value was checked by its own class.
    return Settings.model_construct(**(dict(given) | applies))


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
    low, high, title = options.epsilon, options.epsilon_high, f"algorithm={preset.name!r}"
    objective, sequence = preset.objective, preset.objective.per_sequence
    centres = preset.advantage in ("group_std", "group_mean")
    weight = preset.turn_weight if options.turn_weight is None else options.turn_weight
    reason = None
    if (low or high) and not objective.has_range:
        reason = f"{title} has no clip range: leave {'epsilon' if low else 'epsilon_high'} out"
    elif high is not None and high > 1 and sequence:
        reason = (
            f"epsilon_high = {high}: a sequence's ratio is a geometric mean near 1; give at most "
            "1 (the paper: 4e-4)"
        )
    elif low == "auto" and not sequence:
        reason = (
            f"epsilon='auto' steers a sequence-level clip range, which {preset.name!r} doesn't "
            "have: use algorithm='gspo', or give a number"
        )
    elif low is not None and objective.surrogate == "truncate":
        reason = f"{title} bounds its weights from above only: use epsilon_high"
    elif low == "auto" and high is not None:
        reason = "epsilon='auto' sets both sides: leave epsilon_high out"
    elif options.scale_rewards is not None and not centres:
        reason = f"{title} doesn't centre rewards by group: leave scale_rewards out"
    elif weight and objective.one_ratio and options.sequence_unit == "trajectory":
        reason = (
            f"{title} has one advantage for all turns of a trajectory, but turn_weight = {weight}: "
            "use algorithm='gspo_token' or 'sampo', or sequence_unit='turn'"
        )
    elif options.turn_discount != 0.95 and not weight:
        reason = f"{title} doesn't read the rewards of turns: leave turn_discount out"
    if reason is not None:
        raise ConfigError(reason)


def _correction(preset: Correction | None, options: dev.TrainConfig) -> Correction | None:
    """The option's, else the preset's, with the bounds that were given."""
    low, high = options.correction_low, options.correction_high
    kind = options.correction or (preset and preset.kind)
    if kind is None:
        if (low, high) != (None, None):
            raise ConfigError("correction_low and correction_high need a correction")
        return None
    if options.old_logprobs == "rollout" and kind != "off_policy_sequence_mask":
        raise ConfigError(
            f"correction={kind!r} weights by trainer / engine, but with old_logprobs='rollout' the "
            "ratio is already taken against the engine: set old_logprobs='trainer'"
        )
    if low is not None and BOUNDS[kind][0] == 0:
        raise ConfigError(f"correction={kind!r} has no lower bound: leave correction_low out")
    if options.correction is None and preset is not None:
        low, high = (preset.low if low is None else low), (preset.high if high is None else high)
    return Correction(kind, low, high)
