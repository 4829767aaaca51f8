from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    copy = GatheredCopy(copied, lambda frozen: whole_weights(trained, frozen))
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


FAULTS: dict[str, Callable[[Any], object]] = {
    "a frozen weight": lambda lm: lm.get_parameter("model.norm.weight").mul_(1.01),
    "two rows of one": lambda lm: lm.get_parameter("model.embed_tokens.weight").copy_(
        lm.get_parameter("model.embed_tokens.weight").roll(1, 0)
    ),
    "a buffer": lambda lm: lm.get_buffer("model.rotary_emb.inv_freq").mul_(1.01),
    "a hook": lambda lm: lm.get_submodule("model.layers.0").register_forward_hook(
        lambda *call: call[-1] * 1.01
    ),
}


@pytest.mark.parametrize("config", [{}, {"lora": {"r": 4}}])
@pytest.mark.parametrize("name", FAULTS)
def test_what_a_publication_does_not_write_is_proved_too(name: str, config):
    trained, copy, engine, receipts = parts(**config)
    receipts.publish(engine)
    with torch.no_grad():
        for weight in trained.trainable.values():
            weight.add_(0.1)
    trained.version += 1
    copy.publish(trained)
    with torch.no_grad():
        FAULTS[name](copy.policy.lm)
    with pytest.raises(ServeError, match="version 1"):
        receipts.prove(engine, 1)
    with pytest.raises(ServeError, match="version 1"):
        receipts.require(1, engine)
