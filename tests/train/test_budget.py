"""Tokens of a microbatch, by the memory that their activations take."""

from __future__ import annotations

from types import SimpleNamespace

from gspo.train.budget import ACTIVATION_BYTES, activation_bytes, token_budget


def shape(width: int, layers: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=width, num_hidden_layers=layers)


def test_what_fits_is_within_the_bytes():
    model = shape(896, 24)
    fits = token_budget(model, False)
    each = activation_bytes(model, False)
    assert fits * each <= ACTIVATION_BYTES < (fits + 1) * each


def test_checkpointing_keeps_less_and_fits_more():
    model = shape(2048, 24)
    assert activation_bytes(model, True) < activation_bytes(model, False)
    assert token_budget(model, True) > token_budget(model, False)


def test_no_model_has_too_few_or_too_many():
    assert token_budget(shape(65_536, 200), False) == 256
    assert token_budget(shape(8, 1), False) == 16_384
