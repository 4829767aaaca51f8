"""Public options -> what one call of `train` does. Contradictions end here."""

from __future__ import annotations

from dataclasses import dataclass

from gspo.config import TrainConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.errors import ConfigError
from gspo.objective import LEVEL_DEFAULTS, PRESETS, Objective


@dataclass(frozen=True)
class Settings:
    """A resolved call of `train`.

    Attributes:
        algorithm: name of the preset, or `level:<level>` for a level that has none.
        objective: with the clip range and the KL weight that apply.
        learning_rate: peak.
        options: everything else.
    """

    algorithm: str
    objective: Objective
    learning_rate: float
    options: DevTrainConfig


def resolve(config: TrainConfig | None = None, options: DevTrainConfig | None = None) -> Settings:
    """Settings of one call.

    Raises:
        ConfigError: an algorithm and a level that contradict one another.

    >>> resolve(options=DevTrainConfig(importance_sampling_level="sequence")).algorithm
    'gspo'
    """
    config, options = config or TrainConfig(), options or DevTrainConfig()
    name, objective = _base(options)
    low, high = objective.epsilon_low, objective.epsilon_high
    if options.epsilon is not None:
        low = high = options.epsilon
    if options.epsilon_high is not None:
        high = options.epsilon_high
    kl = config.kl_penalty_coef if options.kl_penalty_coef is None else options.kl_penalty_coef
    return Settings(
        algorithm=name,
        objective=Objective(objective.level, low, high, kl),
        learning_rate=config.learning_rate,
        options=options,
    )


def _base(options: DevTrainConfig) -> tuple[str, Objective]:
    level = options.importance_sampling_level
    if options.algorithm is None and level is not None:
        objective = LEVEL_DEFAULTS[level]
        named = [p.name for p in PRESETS.values() if p.objective == objective]
        return (named[0] if named else f"level:{level}"), objective
    preset = PRESETS[options.algorithm or "gspo"]
    if level is not None and level != preset.objective.level:
        fits = [p.name for p in PRESETS.values() if p.objective.level == level]
        remedy = f"use algorithm={fits[0]!r}" if fits else "leave algorithm out"
        raise ConfigError(
            f"algorithm={preset.name!r} has importance_sampling_level="
            f"{preset.objective.level!r}, not {level!r}: {remedy}, or drop one of the two"
        )
    return preset.name, preset.objective
