"""Objectives of the user's own: registered, as they are, and by import."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gspo as art
from gspo import TrainConfig, dev
from gspo.backend.stored_batch import UpdateRecord
from gspo.core.errors import ConfigError
from gspo.objective import PRESETS, Correction, Objective
from gspo.train.algorithms import BUILT_IN
from gspo.train.settings import resolve

WIDE = Objective("sequence", 0.01, 0.02, aggregate="sequence_sum")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    for name in set(PRESETS) - BUILT_IN:
        del PRESETS[name]  # pyright: ignore[reportIndexIssue]


def test_a_registered_objective_has_a_name():
    art.register_algorithm("mine", WIDE, advantage="group_mean", formula="f")
    settings = resolve(options=dev.TrainConfig(algorithm="mine"))
    assert (settings.algorithm, settings.objective, settings.preset.advantage) == (
        "mine",
        WIDE,
        "group_mean",
    )
    assert resolve(options=dev.TrainConfig(algorithm="mine", epsilon=0.5)).objective == replace(
        WIDE, epsilon_low=0.5, epsilon_high=0.5
    )
    art.register_algorithm("mine", replace(WIDE, epsilon_low=0.03))
    assert resolve(options=dev.TrainConfig(algorithm="mine")).objective.epsilon_low == 0.03


@pytest.mark.parametrize("value", [WIDE, replace(PRESETS["dr_grpo"], name="mine", objective=WIDE)])
def test_an_objective_or_a_preset_may_be_given_itself(value: object):
    options = dev.TrainConfig(algorithm=value)
    settings = resolve(options=options)
    assert settings.objective == WIDE
    assert settings.preset.advantage == getattr(value, "advantage", "group_std")
    again = dev.TrainConfig(**options.model_dump(mode="json", exclude_unset=True))
    assert resolve(options=again) == settings


def test_a_module_may_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "objectives_here.py").write_text(
        "from gspo.objective import Objective\n"
        "wide = Objective('sequence', 0.01, 0.02, aggregate='sequence_sum')\n"
        "number = 3\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    settings = resolve(options=dev.TrainConfig(algorithm="objectives_here:wide"))
    assert (settings.algorithm, settings.objective) == ("objectives_here:wide", WIDE)
    with pytest.raises(ConfigError, match="is a int; it must be a name"):
        resolve(options=dev.TrainConfig(algorithm="objectives_here:number"))
    del sys.modules["objectives_here"]


def test_a_stored_batch_is_read_where_nobody_has_registered_it():
    art.register_algorithm("mine", WIDE)
    settings = resolve(options=dev.TrainConfig(algorithm="mine"))
    record = UpdateRecord.of(settings, version=0, context=8, dtype="float32")
    del PRESETS["mine"]  # pyright: ignore[reportIndexIssue]
    back = record.settings()
    assert (back.algorithm, back.objective) == ("mine", WIDE)


def test_a_level_without_a_preset_stays_one_in_the_record():
    settings = resolve(options=dev.TrainConfig(importance_sampling_level="average"))
    record = UpdateRecord.of(settings, version=0, context=8, dtype="float32")
    assert record.settings().algorithm == "level:average"


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("gspo", WIDE, "built-in method"),
        ("my-own", WIDE, "letters, digits"),
        ("mine", 3, "is a int; it must be a name"),
    ],
)
def test_registering_nonsense_is_refused(name: str, objective: object, message: str):
    with pytest.raises(ConfigError, match=message):
        art.register_algorithm(name, objective)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mien", "no such method.*register_algorithm"),
        (3, "no such method.*an Objective or a Preset"),
        (Objective, "no such method"),
    ],
)
def test_other_values_are_refused_at_once(value: object, message: str):
    with pytest.raises(ConfigError, match=message):
        dev.TrainConfig(algorithm=value)


def test_fields_that_are_no_objective_are_refused():
    with pytest.raises(ConfigError, match="these fields are no objective"):
        resolve(options=dev.TrainConfig(algorithm={"level": "sequence", "epsilon": 0.1}))


FULL = Objective(
    "sequence",
    0.01,
    0.02,
    kl_coef=0.1,
    epsilon_scale="sqrt_length",
    correction=Correction("sequence_product_mask", 0.6, 3.0),
)


def resolved(config: TrainConfig | None = None, **options: Any) -> Objective:
    """The objective that a call with `FULL` and these options has."""
    fields: dict[str, Any] = {"algorithm": FULL, "old_logprobs": "trainer"}
    given = dev.TrainConfig(**(fields | options))
    again = dev.TrainConfig(**json.loads(given.model_dump_json()))
    objective = resolve(config, given).objective
    assert resolve(config, again).objective == objective  # also after a file
    return objective


def test_every_field_of_an_own_objective_applies():
    assert resolved() == FULL
    art.register_algorithm("mine", FULL)
    assert resolved(algorithm="mine") == FULL
    shown = resolve(options=dev.TrainConfig(algorithm=FULL, old_logprobs="trainer")).as_config()
    assert shown["kl_penalty_coef"] == 0.1
    assert (shown["epsilon_scale"], shown["correction"], shown["correction_high"]) == (
        "sqrt_length",
        "sequence_product_mask",
        3.0,
    )


def test_the_kl_weight_of_an_own_objective_yields_to_one_that_is_given():
    assert resolved(TrainConfig(learning_rate=1e-4)).kl_coef == 0.1
    assert resolved(TrainConfig(kl_penalty_coef=0.0)).kl_coef == 0.0
    assert resolved(TrainConfig(kl_penalty_coef=0.3), kl_penalty_coef=0.2).kl_coef == 0.2
    assert resolved(kl_penalty_coef=0.0).kl_coef == 0.0


def test_the_epsilon_scale_of_an_own_objective_yields_to_one_that_is_given():
    assert resolved(epsilon_scale="constant") == replace(FULL, epsilon_scale="constant")
    assert resolve(options=dev.TrainConfig()).objective.epsilon_scale == "constant"


def test_the_correction_of_an_own_objective_yields_to_one_that_is_given():
    product = Correction("sequence_product_truncate")
    assert resolved(correction="sequence_product_truncate").correction == product
    higher = Correction("sequence_product_mask", 0.6, 4.0)
    assert resolved(correction_high=4.0).correction == higher
    with pytest.raises(ConfigError, match="set old_logprobs='trainer'"):
        resolve(options=dev.TrainConfig(algorithm=FULL))
