"""What chunked log-probs compute, and what they keep: counted, not timed."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from gspo.kernels import logprob, projection
from gspo.kernels.logprob import Head, token_logprobs

M, D, V = 24, 8, 60
CHUNK, VOCAB_CHUNK = 6, 20
BLOCKS = (M // CHUNK) * (V // VOCAB_CHUNK)


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of all blocks of logits that are computed, in order."""
    computed: list[tuple[int, ...]] = []
    original = projection.project

    def spied(*arguments):
        logits = original(*arguments)
        computed.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(projection, "project", spied)
    return computed


def score(hidden, weight, bias=None, softcap=None):
    targets = torch.arange(M) % V
    head = Head(weight, bias, softcap)
    with mock.patch.object(logprob, "CPU_BLOCK", (VOCAB_CHUNK, 2**20)):
        return token_logprobs(hidden, head, targets, torch.ones(M), CHUNK).logprobs


def leaves(*trained: bool):
    generator = torch.Generator().manual_seed(0)
    sizes = ((M, D), (V, D), (V,))
    return [
        torch.randn(size, generator=generator).requires_grad_(on)
        for size, on in zip(sizes, trained, strict=True)
    ]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_frozen_head_is_not_projected_again(shapes, softcap):
    hidden, weight, bias = leaves(True, False, False)
    logprobs = score(hidden, weight, bias, softcap)
    assert shapes == [(CHUNK, VOCAB_CHUNK)] * BLOCKS
    logprobs.sum().backward()
    assert len(shapes) == BLOCKS


@pytest.mark.parametrize(
    "kept_bytes, again",
    [
        (2**30, 0),
        (4 * M * V, 0),
        (4 * M * V - 1, BLOCKS // 3),  # the last part of the vocabulary
        (4 * M * VOCAB_CHUNK, 2 * BLOCKS // 3),
        (4 * M * VOCAB_CHUNK - 1, BLOCKS),
        (0, BLOCKS),
    ],
)
@pytest.mark.parametrize("trained", [(True, True, True), (False, False, True)])
def test_a_trained_head_is_projected_again_beyond_what_is_kept(
    shapes, monkeypatch, kept_bytes, again, trained
):
    monkeypatch.setattr(projection, "KEPT_BYTES", kept_bytes)
    score(*leaves(*trained)).sum().backward()
    assert len(shapes) == BLOCKS + again


def test_only_tokens_with_gradient_are_projected_again(shapes, monkeypatch):
    monkeypatch.setattr(projection, "KEPT_BYTES", 0)
    logprobs = score(*leaves(True, True, True))
    upstream = torch.zeros(M)
    upstream[[0, 1, 13]] = 1.0
    logprobs.backward(upstream)
    assert sum(tokens * entries for tokens, entries in shapes[BLOCKS:]) == 3 * V


@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_without_grad_mode_no_gradient_is_prepared(monkeypatch, trained):
    asked: list[tuple[bool, int]] = []
    original = projection._forward

    def spied(*arguments, pull, keep_bytes):
        asked.append((pull, keep_bytes))
        return original(*arguments, pull=pull, keep_bytes=keep_bytes)

    monkeypatch.setattr(projection, "_forward", spied)
    inputs = leaves(*trained)
    with torch.no_grad():
        assert not score(*inputs).requires_grad
    score(*leaves(False, False, False))
    assert asked == [(False, -1)] * 2
    assert score(*inputs).requires_grad
    assert asked[2] == ((True, -1) if trained == (True, False, False) else (False, 256 * 2**20))


@pytest.mark.parametrize("trained", [(True, False, False), (True, True, False)])
def test_what_waits_for_backward_does_not_grow_with_the_vocabulary(monkeypatch, trained):
    monkeypatch.setattr(projection, "KEPT_BYTES", 4 * M * VOCAB_CHUNK)
    inputs = leaves(*trained)
    node = score(*inputs).grad_fn
    assert node is not None
    given = {x.data_ptr() for x in inputs}
    saved = [x for x in node.saved_tensors if x is not None and x.data_ptr() not in given]  # pyright: ignore[reportAttributeAccessIssue]
    count = sum(x.numel() for x in saved)
    assert count <= (M * D if not trained[1] else M * VOCAB_CHUNK + 8 * M)


def test_a_block_of_the_default_size_holds_no_more_than_it_says(shapes, monkeypatch):
    monkeypatch.setattr(logprob, "CPU_BLOCK", (16, 128))
    hidden, weight, _ = leaves(True, True, True)
    token_logprobs(hidden, Head(weight), torch.zeros(M).long(), torch.ones(M))
    assert max(tokens * entries for tokens, entries in shapes) == 256  # at least 16 tokens
    monkeypatch.setattr(logprob, "CPU_BLOCK", (8, 192))
    shapes.clear()
    token_logprobs(hidden, Head(weight), torch.zeros(M).long(), torch.ones(M))
    assert max(tokens * entries for tokens, entries in shapes) == 192
