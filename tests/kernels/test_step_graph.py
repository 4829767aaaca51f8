"""Decode steps whose shapes stay the same, against those of any shape. Captured on a GPU only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gspo.kernels import kv_cache, step_graph
from gspo.kernels.prompt_cache import SharedPrompts
from gspo.kernels.step_graph import GraphedPrompts, Step
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from kernels.test_kv_cache import backbone, start, whole
from kernels.test_prompt_cache import LONG
from kernels.test_shared_prompt_attention import model
from support import embedded

__all__ = ["backbone"]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that were captured; on a CPU each is computed instead of replayed."""
    found: list[Step] = []

    def capture(step: Step) -> Callable[[], Tensor]:
        found.append(step)
        return step

    monkeypatch.setattr(kv_cache, "SharedPrompts", GraphedPrompts)
    monkeypatch.setattr(GraphedPrompts, "capture", staticmethod(capture))
    return found


def completions(policy: Policy, **params: Any) -> list[Completion]:
    """Prompts of four lengths; completions leave at several times."""
    requests = [
        Request(prompt, SamplingParams(n=3, max_tokens=most, seed=1, ignore_eos=True, **params))
        for prompt, most in zip(LONG, (4, 9, 6, 3), strict=True)
    ]
    return [own for of_one in TorchEngine(policy).generate(requests) for own in of_one]


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("name", ["sliding", "gemma3", "gpt_oss"])
def test_the_tokens_are_those_of_other_steps(name: str, captured, monkeypatch):
    policy = model(name)
    found = completions(policy)
    assert captured
    monkeypatch.setattr(kv_cache, "SharedPrompts", SharedPrompts)
    assert_same(found, completions(policy))


def test_completions_join_and_leave_and_slabs_grow(captured, backbone, monkeypatch):
    monkeypatch.setattr(kv_cache, "FIRST_COLUMNS", 2)
    monkeypatch.setattr(step_graph, "COLUMNS", 8)
    with torch.no_grad():
        kv, _ = start(backbone, LONG[:2], [0, 1, 1], "shared")
        assert isinstance(kv, GraphedPrompts)
        texts = [list(LONG[0]), list(LONG[1]), list(LONG[1])]
        for step in range(24):
            if step == 4:
                more, _ = start(backbone, LONG[2:3], [0, 0], "shared")
                assert isinstance(more, GraphedPrompts)
                kv.join(more)
                texts += [list(LONG[2]) for _ in range(2)]
            if step == 8:
                kv.keep(np.array([0, 4]))
                texts = [texts[0], texts[4]]
            for i, text in enumerate(texts):
                text.append(30 + 3 * i + step % 5)
            states = kv.advance(torch.tensor([text[-1] for text in texts]))
            if step in (0, 1, 3, 4, 5, 10, 23):
                for text, state in zip(texts, states, strict=True):
                    expected = whole(backbone, text)
                    torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
    # Once after each change, not at once, and then as the slabs fill up.
    sizes = [len(step.tokens) for step in captured]
    assert sizes[:3] == [3, 5, 2] and sizes.count(2) == len(sizes) - 2
    assert len(captured) < 16


def test_what_the_step_was_captured_with_stays_where_it_is(captured, backbone):
    """A weight that lies elsewhere, or a pass that is no replay: the step is captured again."""
    with torch.no_grad():
        kv, _ = start(backbone, LONG[:1], [0, 0], "shared")
        assert isinstance(kv, GraphedPrompts)
        token = torch.tensor([7, 9])
        for change in ("none", "weight", "fed"):
            for _ in range(2):
                kv.advance(token)
            if change == "weight":
                weight = next(backbone.parameters())
                weight.data = weight.data.clone()
            elif change == "fed":
                kv.feed(token[:, None])
    assert len(captured) == 2  # the second pass of each of the first two, none after `feed`'s last


def test_a_model_that_cannot_be_captured_is_decoded_as_ever(monkeypatch, caplog):
    def refuses(_step: Step) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    policy = embedded()
    expected = completions(policy)
    monkeypatch.setattr(kv_cache, "SharedPrompts", GraphedPrompts)
    monkeypatch.setattr(GraphedPrompts, "capture", staticmethod(refuses))
    with caplog.at_level(logging.INFO, "gspo"):
        assert_same(completions(policy), expected)
    assert len([line for line in caplog.messages if "without a CUDA graph" in line]) == 1


def test_whose_experts_are_watched_is_not_replayed(captured):
    policy = embedded()
    choices = [own.expert_choices for own in completions(policy, expert_choices=True)]
    assert not captured
    assert all(own is not None and len(own) > 0 for own in choices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "sliding", "qwen3_moe"])
def test_on_a_gpu_a_replay_is_the_step(name: str, monkeypatch: pytest.MonkeyPatch):
    """In bfloat16: in float32 experts can't be captured."""
    policy = model(name, num_attention_heads=4, hidden_size=128, head_dim=32)
    policy.lm.to(torch.device("cuda"), torch.bfloat16)  # pyright: ignore[reportArgumentType]
    choose_packing(policy)
    found = completions(policy)
    monkeypatch.setattr(kv_cache, "GraphedPrompts", SharedPrompts)
    expected = completions(policy)
    assert [own.token_ids for own in found] == [own.token_ids for own in expected]
    assert [own.logprobs for own in found] == [own.logprobs for own in expected]
