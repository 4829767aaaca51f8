"""How GPUs are shared out."""

from __future__ import annotations

import pytest

from gspo.core.errors import ConfigError
from gspo.sizing.cluster import USABLE, fits, layouts, server_gpus
from gspo.sizing.memory import Training
from gspo.sizing.step_time import GPUS, Rates, Rollouts
from models import read_size

WANTED = Rollouts(512, 512, 2048, 8192)
H100 = GPUS["h100"]


def test_what_fits_has_room_for_the_longest_sample():
    tried = fits(read_size("Qwen/Qwen3-30B-A3B"), WANTED, H100, 8, lora=16)
    assert [fit.fits for fit in tried] == [False, True, False, True]
    for fit in tried:
        assert fit.fits == (sum(fit.parts.values()) <= USABLE * H100.memory)
        assert fit.fits == (fit.most_tokens >= 512 + 8192) or abs(fit.most_tokens - 8704) < 1024


def test_a_server_takes_the_weights():
    assert server_gpus(read_size("Qwen/Qwen3-8B"), H100) == 1
    assert server_gpus(read_size("Qwen/Qwen3-30B-A3B"), H100) == 2
    assert server_gpus(read_size("Qwen/Qwen3-235B-A22B"), H100) == 16


def test_layouts_use_the_gpus_that_there_are_and_come_in_order():
    size = read_size("Qwen/Qwen3-30B-A3B")
    found = layouts(size, Training(), WANTED, H100, 16, Rates())
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in found:
        together = one.training_gpus + (one.rollout_gpus if one.overlapped else 0)
        assert together == 16
        assert one.rollout_gpus % one.per_server == 0
        trained = one.parts["scoring"] + one.parts["training"]
        both = (one.parts["rollouts"], trained)
        expected = (max if one.overlapped else sum)(both) + one.parts["publication"]
        assert one.seconds == pytest.approx(expected)


def test_no_room_is_an_error_that_says_what_a_server_needs():
    size = read_size("Qwen/Qwen3-235B-A22B")
    with pytest.raises(ConfigError, match="rollout server, which needs 16 GPUs of 80 GB"):
        layouts(size, Training(16), WANTED, H100, 8, Rates())
