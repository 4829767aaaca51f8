"""The check of exact mode: one bit is enough to be refused, and the trajectory is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.test_packing import make_sample
from gspo.core.errors import NumericsError
from gspo.data.packing import Microbatch, pack
from gspo.train.bit_equality import check_exact


def packed() -> Microbatch:
    rng = np.random.default_rng(0)
    (microbatch,) = pack([make_sample(number, 9, rng) for number in (4, 7)], budget=1000)
    return microbatch


def test_the_same_bits_pass():
    microbatch = packed()
    check_exact(microbatch.sampling_logprobs.clone().requires_grad_(), microbatch)


@pytest.mark.parametrize("trajectory", [4, 7])
def test_one_bit_is_refused_and_its_trajectory_named(trajectory: int):
    microbatch = packed()
    place = microbatch.trajectory_ids.index(trajectory)
    token = int((microbatch.sequence_ids == place).nonzero()[0])
    logprobs = microbatch.sampling_logprobs.clone()
    logprobs[token] = float(np.nextafter(np.float32(logprobs[token]), np.float32(-9)))
    assert not torch.equal(logprobs, microbatch.sampling_logprobs)
    count = len(logprobs)
    with pytest.raises(NumericsError, match=rf"1 of {count} log-probs .*trajectory {trajectory}\)"):
        check_exact(logprobs, microbatch)
