"""The protocol of engines, and that nobody looks behind it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gspo.core.errors import RequestError
from gspo.serve.engine import Engine, Request, SamplingParams, check_fits
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.torch_engine import TorchEngine
from support import embedded

SOURCE = Path(__file__).parents[2] / "src" / "gspo"
BEHIND = re.compile(r"engine\.policy\b|TorchEngine|torch_engine")
"""What only serve/ may say: the engine's weights, and a class of engine."""


def test_both_engines_keep_the_protocol():
    assert isinstance(TorchEngine(embedded()), Engine)
    assert isinstance(FakeEngine(), Engine)


def test_nobody_outside_serve_looks_behind_the_protocol():
    for path in SOURCE.rglob("*.py"):
        if "serve" not in path.relative_to(SOURCE).parts:
            match = BEHIND.search(path.read_text())
            assert match is None, f"{path} says {match and match[0]}"


@pytest.mark.parametrize(
    "line", ["service.engine.policy.lm", "from gspo.serve.torch_engine import TorchEngine"]
)
def test_a_look_behind_it_would_be_seen(line: str):
    assert BEHIND.search(line)
    assert not BEHIND.search("engine.policy_version")


def test_the_room_for_a_completion():
    assert check_fits(Request((1, 2)), context=8, vocabulary=5) == 6
    assert check_fits(Request((1, 2), SamplingParams(max_tokens=3)), context=8, vocabulary=5) == 3
    for prompt, params, message in (
        ((), SamplingParams(), "the prompt is empty"),
        ((5,), SamplingParams(), r"vocabulary is 0\.\.4"),
        ((1, 2), SamplingParams(max_tokens=7), "the model's context is 8"),
        ((1, 2), SamplingParams(max_tokens=2, min_tokens=3), "at most 2 tokens fit"),
        ((1,) * 50, SamplingParams(), "the prompt has 50 tokens"),
        (
            (1, 2),
            SamplingParams(logit_bias=((4, 1.0), (5, 1.0))),
            "logit_bias names the token id 5",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            check_fits(Request(prompt, params), context=8, vocabulary=5)
