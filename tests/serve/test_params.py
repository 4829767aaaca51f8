"""Ranges of the sampling parameters, and which of them change the distribution."""

from __future__ import annotations

import pytest

from gspo.core.errors import RequestError
from gspo.serve.params import SamplingParams


@pytest.mark.parametrize(
    "params",
    [
        {"n": 0},
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"stop": ("",)},
        {"stop": ("a",) * 65},
        {"stop": ("a" * 1025,)},
        {"min_tokens": -1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 101.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, 0.0), (2, -101.0))},
        {"top_logprobs": 21},
        {"top_logprobs": -1},
    ],
)
def test_parameters_out_of_range_are_refused(params: dict):
    with pytest.raises(RequestError, match=next(iter(params))) as caught:
        SamplingParams(**params)
    assert caught.value.param == next(iter(params))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({}, ()),
        ({"temperature": 0.5, "stop": ("a",), "stop_token_ids": (1,), "top_logprobs": 3}, ()),
        ({"top_p": 0.9, "top_k": 5, "min_p": 0.1}, ("top_p", "top_k", "min_p")),
        # The likeliest token is in each of these parts.
        ({"temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, ("temperature",)),
        ({"temperature": 0, "presence_penalty": 1.0}, ("temperature", "presence_penalty")),
        ({"min_tokens": 3}, ("min_tokens",)),
        ({"min_tokens": 3, "ignore_eos": True}, ()),  # no token is barred
        ({"min_tokens": 3, "ignore_eos": True, "stop_token_ids": (1,)}, ("min_tokens",)),
        ({"logit_bias": ((3, 0.0),)}, ()),
        ({"logit_bias": ((3, 0.0), (4, 1.0))}, ("logit_bias",)),
        (
            {"repetition_penalty": 1.1, "frequency_penalty": -1.0, "grammar": "{}"},
            ("repetition_penalty", "frequency_penalty", "grammar"),
        ),
    ],
)
def test_what_changes_the_distribution_is_named(params: dict, names: tuple[str, ...]):
    assert SamplingParams(**params).altered_by == names
