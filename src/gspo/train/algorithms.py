"""Objectives of the user, beside the built-in ones: by name, by import, or as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from gspo.core.byname import load_object
from gspo.core.errors import ConfigError
from gspo.objective import PRESETS, AdvantageKind, Correction, Objective, Preset

BUILT_IN = frozenset(PRESETS)


def register_algorithm(
    name: str,
    objective: Objective | Preset,
    *,
    advantage: AdvantageKind | None = None,
    formula: str = "",
    source: str = "",
) -> None:
    """Make `dev.TrainConfig(algorithm=name)` mean your objective, in this process.

    Args:
        name: for `algorithm`, the report and the metrics' labels; registered again, it is replaced.
        objective: or a whole preset.
        advantage: how A_i is made of the group's rewards: `group_std` (if None), `group_mean`,
            `leave_one_out` or `reward`.
        formula, source: shown by `gspo presets` and in the report.

    Raises:
        ConfigError: the name of a built-in method, one that cannot be used, or no objective.

        register_algorithm("wide_gspo", Objective("sequence", 0.01, 0.02))
        options = dev.TrainConfig(algorithm="wide_gspo")
    """
    if name in BUILT_IN or not str(name).isidentifier():
        raise ConfigError(
            f"register_algorithm({name!r}): a name has letters, digits and '_' only, and is not a "
            "built-in method's"
        )
    preset = as_preset(objective, name)
    changes: dict[str, Any] = {"advantage": advantage, "formula": formula, "source": source}
    given = {key: value for key, value in changes.items() if value}
    cast(dict[str, Preset], PRESETS)[name] = replace(preset, name=name, **given)


def find_algorithm(algorithm: str | Mapping[str, Any]) -> Preset:
    """The preset that the option `algorithm` means.

    Raises:
        ConfigError: a name that is not known in this process, or fields that are no objective.
    """
    if not isinstance(algorithm, str):
        return as_preset(algorithm, "own")
    if ":" in algorithm:
        return as_preset(load_object(algorithm, "algorithm"), algorithm)
    if algorithm not in PRESETS:
        raise ConfigError(
            f"algorithm={algorithm!r} is not known in this process: call "
            "gspo.register_algorithm first, or write 'module:name'"
        )
    return PRESETS[algorithm]


def as_preset(value: Any, name: str) -> Preset:
    """An objective or a preset, or the fields of one, as a preset of that name.

    Raises:
        ConfigError: it is none of these, or a field has no meaning.
    """
    if isinstance(value, Preset):
        return value
    if isinstance(value, Objective):
        return Preset(name, value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"algorithm: {name} is a {type(value).__name__}; it must be a name, a "
            "gspo.objective.Objective or a gspo.objective.Preset"
        )
    fields = dict(value.get("objective", value))
    try:
        if isinstance(fields.get("correction"), Mapping):  # from a file
            fields["correction"] = Correction(**fields["correction"])
        around = value if "objective" in value else {"name": name}
        return Preset(**{**around, "objective": Objective(**fields)})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algorithm: these fields are no objective: {error}") from None
