from __future__ import annotations

import pytest
import torch

from gspo.core.compute import ComputeThread
from gspo.core.errors import ServeError
from gspo.serve.torch_engine import TorchEngine
from gspo.weights.gathered_copy import GatheredCopy, whole_weights
from gspo.weights.receipt import Receipts
from support import embedded


def parts(**config):
    """A trainer's policy, the copy's publisher, an engine of the copy, and their receipts."""
    trained, copied = embedded(**config), embedded(**config)
    copy = GatheredCopy(copied, lambda frozen: whole_weights(trained, frozen=frozen))
    compute = ComputeThread()
    engine = TorchEngine(copied, compute)
    compute.close()
    return trained, copy, engine, Receipts(trained, copied, copy)


@pytest.mark.parametrize("config", [{}, {"lora": {"r": 4}}])
def test_the_copy_gets_the_weights_and_a_receipt(config):
    trained, copy, engine, receipts = parts(**config)
    with torch.no_grad():
        for weight in trained.trainable.values():
            weight.add_(0.1)
    trained.version += 1
    assert receipts.publish(engine)["publish/probe_max_diff"] == 0.0
    assert copy.policy.version == 1 and not copy.policy.trainable
    for name, weight in trained.lm.named_parameters():
        assert torch.equal(weight, copy.policy.lm.get_parameter(name))


def test_weights_that_did_not_arrive_get_no_receipt(monkeypatch):
    trained, copy, engine, receipts = parts()
    with torch.no_grad():
        # One row, which no probe shows.
        trained.lm.get_parameter("model.embed_tokens.weight")[50, 0] += 0.1
    monkeypatch.setattr(copy, "publish", lambda policy: 0)
    with pytest.raises(ServeError, match=r"embed_tokens\.weight"):
        receipts.publish(engine)
