"""What holds for every model; sharded ones are trained in tests/train/test_mesh.py."""

from __future__ import annotations

import pytest
import torch

from gspo.core.errors import ModelError
from gspo.kernels import sharded
from support import embedded


def test_inside_forward_runs_in_the_place_of_the_models_forward_pass():
    lm, hooked = embedded().lm, []
    handle = lm.register_forward_pre_hook(lambda *_: hooked.append("gathered"))
    assert sharded.inside_forward(lm, lambda: [*hooked, "run"]) == ["gathered", "run"]
    with pytest.raises(ZeroDivisionError):
        sharded.inside_forward(lm, lambda: 1 / 0)
    handle.remove()
    assert "forward" not in vars(lm)  # its own again
    assert lm(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.shape[:2] == (1, 2)


@pytest.mark.parametrize("receiver", [False, True])
def test_tensors_in_host_memory_stay_tied_and_may_be_copies(receiver: bool):
    one, two = torch.ones(2), torch.zeros(3)
    held = sharded.on_host(
        {"a": one, "b": two, "tied": one}, copied=True, whole=True, receiver=receiver
    )
    assert held["a"] is held["tied"] and held["a"] is not one
    assert [t.tolist() for t in held.values()] == (
        [[1, 1], [0, 0, 0], [1, 1]] if receiver else [[]] * 3
    )
    assert sharded.on_host({"a": one}, copied=False)["a"].data_ptr() == one.data_ptr()


def test_a_torch_that_keeps_sharded_weights_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Else a tied head would drift from the second step on, without a word."""

    class State:
        """Without `_fsdp_param_groups`."""

    lm = embedded().lm
    monkeypatch.setattr(sharded, "FSDPModule", torch.nn.Embedding)
    monkeypatch.setattr(sharded, "reshard", lambda lm: None)
    monkeypatch.setattr(sharded.fully_shard, "state", lambda module: State())
    with pytest.raises(ModelError, match=r"keeps sharded weights in another way than torch 2\.13"):
        sharded.begin_sharded(lm)
