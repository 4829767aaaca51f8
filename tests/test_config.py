"""The two numbers of the public configuration."""

from __future__ import annotations

import pytest

from gspo import TrainConfig
from gspo.core.errors import ConfigError


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf")])
def test_learning_rate_must_be_positive(rate: float):
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig(learning_rate=rate)
