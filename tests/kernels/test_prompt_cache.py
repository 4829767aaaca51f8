"""Prompts that are held once, against one pass over each whole text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gspo.kernels import prompt_cache
from gspo.kernels.prompt_cache import SharedPrompts
from kernels.test_kv_cache import PROMPTS, backbone, start, whole

__all__ = ["backbone"]

LONG = [tuple(1 + i * i % 29 for i in range(length)) for length in (40, 64, 65, 3)]


def test_completions_join_while_others_run(backbone):
    """Prompts with more whole tiles join others; then the first leave, and their prompts too."""
    with torch.no_grad():
        kv, _ = start(backbone, [LONG[0], PROMPTS[2]], [0, 1, 1], "shared")
        assert isinstance(kv, SharedPrompts)
        texts = [list(LONG[0]), list(PROMPTS[2]), list(PROMPTS[2])]
        for step in range(8):
            if step == 3:
                more, _ = start(backbone, LONG[2:3], [0, 0], "shared")
                assert isinstance(more, SharedPrompts)
                kv.join(more)
                texts += [list(LONG[2]) for _ in range(2)]
            if step == 5:
                kv.keep(np.array([3, 4]))
                texts = texts[3:]
                assert len(kv._prompts[0][0]) == 1
            for i, text in enumerate(texts):
                text.append(30 + 3 * i + step)
            states = kv.advance(torch.tensor([text[-1] for text in texts]))
            for text, state in zip(texts, states, strict=True):
                torch.testing.assert_close(state, whole(backbone, text), atol=1e-4, rtol=1e-4)


def test_whole_tiles_of_prompts_are_shared_and_prompts_may_be_fed_in_pieces(backbone):
    """Nor does it matter how many queries the memory for scores allows at a time."""
    prompt_of, states = [0, 0, 1, 2, 3, 3], []
    for size in (prompt_cache._SCORE_BYTES, 1):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(prompt_cache, "_SCORE_BYTES", size)
            kv, hidden = start(backbone, LONG, prompt_of, "shared")
            assert isinstance(kv, SharedPrompts)
            assert kv._prompts[0][0].shape[::2] == (4, 64)
            tokens = torch.arange(6) + 20
            states.append((hidden, kv.advance(tokens), kv.advance(tokens + 1)))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    for i, prompt in enumerate(prompt_of):
        expected = whole(backbone, [*LONG[prompt], 20 + i, 21 + i])
        torch.testing.assert_close(states[0][2][i], expected, atol=1e-4, rtol=1e-4)
