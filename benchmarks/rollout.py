"""The embedded engine against transformers' two ways to sample: `generate` and `generate_batch`.

    python benchmarks/rollout.py

The embedded sort model (MoE, 0.2M parameters), one thread, one process, in turns. All three sample
at temperature 1 and return the log-prob of every sampled token. Lengths are forced: no end token
on either side, or, where they are ragged, an end at the same planned lengths.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import run
import torch
from harness import Pairs, paired, stamp
from sides.forced import FORCED
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from gspo.policy.embedded import SPECIAL, embedded_folder
from gspo.policy.load import load_policy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine

Side = Callable[[], int]
"""Samples once and returns the number of new tokens."""


@dataclass(frozen=True)
class Case:
    """P prompts of a length, and the planned length of every completion, G a prompt."""

    what: str
    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    goal: float | None = None

    @property
    def completions(self) -> int:
        """G."""
        return len(self.lengths) // len(self.prompts)

    @property
    def uniform(self) -> bool:
        """All completions have one length."""
        return len(set(self.lengths)) == 1

    @property
    def shape(self) -> str:
        """For the table."""
        low, high = min(self.lengths), max(self.lengths)
        ends = f"{low}" if low == high else f"{low}..{high}"
        size = f"{len(self.prompts)} prompts of {len(self.prompts[0])} x {self.completions}"
        return f"{size} of {ends}, 1 thread"


def cases(tiny: bool = False) -> list[Case]:
    """The three shapes; small ones of the same kind for tests."""
    rng = random.Random(0)

    def prompts(count: int, length: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rng.randint(6, 65) for _ in range(length)) for _ in range(count))

    def ragged(count: int, low: int, high: int) -> tuple[int, ...]:
        return (low, *(rng.randint(low, high) for _ in range(count - 2)), high)

    if tiny:
        return [
            Case("equal lengths", prompts(2, 5), (4,) * 4),
            Case("ragged lengths", prompts(2, 5), ragged(4, 1, 6)),
        ]
    return [
        Case("equal lengths", prompts(8, 32), (48,) * 64),
        Case("short and many", prompts(32, 16), (13,) * 512),
        Case("ragged lengths", prompts(8, 32), ragged(128, 10, 400)),
    ]


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """Two rows a case: against `generate`, and against `generate_batch`."""
    torch.set_num_threads(1)
    rows = []
    for case in cases(tiny):
        ours = our_side(case)
        for name, side, count in (
            ("transformers generate", generate_side, 5),
            ("transformers generate_batch", batch_side, 2),
        ):
            with side(plain_model(), case) as other:
                assert ours() == other() == sum(case.lengths), f"{case.what}: unequal work"
                pairs = paired(ours, other, repeats=repeats or count, warmup=0)
            rows.append(_row(case, name, pairs))
    return rows


def _row(case: Case, other: str, pairs: Pairs) -> dict[str, Any]:
    fields = pairs.fields()
    tokens = sum(case.lengths)
    rates = {"ours": tokens / fields["ours_s"], "other": tokens / fields["other_s"]}
    return stamp(
        name="rollout",
        what=f"{case.what}, {other.removeprefix('transformers ')}",
        shape=case.shape,
        other=other,
        **fields,
        detail={"tokens": tokens, "tokens_per_s": {k: round(v) for k, v in rates.items()}},
        command="python benchmarks/run.py rollout",
    ).as_dict()


def plain_model() -> Any:
    """The same weights as transformers loads them."""
    folder = embedded_folder("embedded:sort")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def our_side(case: Case) -> Side:
    """The engine as the backend uses it; a prompt's completions are one request where they can."""
    engine = TorchEngine(load_policy("embedded:sort"))
    count = case.completions
    if case.uniform:
        params = SamplingParams(n=count, max_tokens=case.lengths[0], **FORCED)
        requests = [Request(prompt, params) for prompt in case.prompts]
    else:
        requests = [
            Request(case.prompts[i // count], SamplingParams(max_tokens=length, **FORCED))
            for i, length in enumerate(case.lengths)
        ]

    def sample() -> int:
        return sum(len(c.token_ids) for own in engine.generate(requests) for c in own)

    return sample


class ForcedEnds(LogitsProcessor):
    """Row r may end at its `lengths[r]`-th token only, and ends there."""

    def __init__(self, lengths: tuple[int, ...], end: int):
        self._last = torch.tensor(lengths) - 1
        self._end = end
        self._at = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        scores[:, self._end] = -torch.inf
        ends = self._last == self._at
        if bool(ends.any()):
            scores[ends] = -torch.inf
            scores[ends, self._end] = 0.0
        self._at += 1
        return scores


@contextmanager
def generate_side(lm: Any, case: Case) -> Iterator[Side]:
    """`generate` on one batch, and the log-probs of what it sampled, as the engine gives."""
    rows = [case.prompts[i // case.completions] for i in range(len(case.lengths))]
    batch = torch.tensor(rows)
    pad, end = SPECIAL.index("<|pad|>"), SPECIAL.index("<|end|>")
    longest = max(case.lengths)
    options: dict[str, Any] = {"min_new_tokens": longest} if case.uniform else {}

    def sample() -> int:
        if not case.uniform:
            options["logits_processor"] = LogitsProcessorList([ForcedEnds(case.lengths, end)])
        with torch.no_grad():
            out = lm.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                top_k=0,
                max_new_tokens=longest,
                pad_token_id=pad,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
        new = out.sequences[:, batch.shape[1] :]
        logits = torch.stack(out.logits, dim=1).float()
        logits.log_softmax(-1).gather(-1, new[..., None])
        if case.uniform:
            return new.numel()
        # Up to and with the end token; the rest is padding.
        return int(((new == end).int().cumsum(-1) - (new == end).int() == 0).sum())

    yield sample


@contextmanager
def batch_side(lm: Any, case: Case) -> Iterator[Side]:
    """Continuous batching. Its manager is kept, so that setting it up is not counted."""
    count = case.completions if case.uniform else 1
    generation = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=max(case.lengths),
        num_return_sequences=count,
        eos_token_id=-1,
        pad_token_id=0,
    )
    rows = [case.prompts[i // case.completions] for i in range(len(case.lengths))][::count]
    limits = case.lengths[::count]
    manager = lm.init_continuous_batching(
        generation_config=generation,
        # The defaults but for the log-probs; blocks as on a GPU would take most of the memory.
        continuous_batching_config=ContinuousBatchingConfig(
            return_logprobs=True, num_blocks=1024, max_batch_tokens=4096
        ),
    )
    manager.start()

    def sample() -> int:
        for prompt, limit in zip(rows, limits, strict=True):
            manager.add_request(list(prompt), max_new_tokens=limit, eos_token_id=-1)
        tokens = finished = 0
        while finished < len(case.lengths):
            result = manager.get_result(timeout=300)
            assert result is not None and result.error is None, f"generate_batch: {result}"
            if result.is_finished():
                finished += 1
                tokens += len(result.generated_tokens)
                assert len(result.logprobs) == len(result.generated_tokens)
        return tokens

    try:
        yield sample
    finally:
        manager.destroy()


def main() -> None:
    """As `run.py rollout`: in a process with its threads set."""
    raise SystemExit(run.main(["rollout", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
