"""What a layer's attention is given."""

from __future__ import annotations

import torch

from gspo.kernels.layer_input import LayerInput


def test_the_sinks_are_those_of_the_query_heads_that_share_a_key_head():
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16)
    scoring = LayerInput(0, query, key, key, 0.5, None, 30.0, sinks).scoring(torch.float32)
    assert scoring.softcap == 30.0
    assert scoring.sinks is not None
    assert scoring.sinks.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert scoring.sinks.dtype == torch.float32


def test_most_layers_have_neither():
    query = torch.zeros(1, 4, 3, 8)
    scoring = LayerInput(0, query, query, query, 0.5).scoring(torch.float32)
    assert (scoring.softcap, scoring.sinks) == (None, None)
