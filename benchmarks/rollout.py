"""The embedded engine against transformers' generate: the same model, prompts and lengths.

    python benchmarks/rollout.py            # writes benchmarks/results/rollout.json

64 rows (8 prompts x 8) of the embedded sort model, 48 new tokens each, sampled, no early end on
either side; paired and repeated in one process. Both sides must produce the same number of tokens.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

from gspo.policy.load import load_policy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine

PROMPTS, COMPLETIONS, TOKENS, REPEATS = 8, 8, 48, 7


def main() -> None:
    """Measure, print one line, write the result."""
    policy = load_policy("embedded:sort")
    torch.set_num_threads(1)
    engine = TorchEngine(policy)
    engine._end_tokens = frozenset()  # forced lengths, as on the other side
    prompts = [tuple(6 + (7 * i + 3 * j) % 60 for j in range(32)) for i in range(PROMPTS)]
    params = SamplingParams(n=COMPLETIONS, max_tokens=TOKENS)
    batch = torch.tensor([prompt for prompt in prompts for _ in range(COMPLETIONS)])

    def ours() -> int:
        done = engine.generate([Request(prompt, params) for prompt in prompts])
        return sum(len(c.token_ids) for own in done for c in own)

    def theirs() -> int:
        with torch.no_grad():
            out = policy.lm.generate(  # pyright: ignore[reportCallIssue]
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                top_k=0,
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
                return_dict_in_generate=True,
                output_logits=True,
            )
        # The log-probs of the sampled tokens, which the engine returns too.
        new = out.sequences[:, batch.shape[1] :]
        logits = torch.stack(out.logits, dim=1).float()
        logits.log_softmax(-1).gather(-1, new[..., None])
        return new.numel()

    assert ours() == theirs() == PROMPTS * COMPLETIONS * TOKENS
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(REPEATS)]
    ratios = sorted(b / a for a, b in pairs)
    result = {
        "name": "rollout",
        "shape": f"{PROMPTS} prompts of 32 x {COMPLETIONS} completions of {TOKENS}, one thread",
        "ours_s": statistics.median(a for a, _ in pairs),
        "other_s": statistics.median(b for _, b in pairs),
        "other": "transformers generate, with log-probs",
        "ratio": statistics.median(ratios),
        "spread": [ratios[0], ratios[-1]],
        "machine": f"{platform.machine()}, {platform.processor() or 'cpu'}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python benchmarks/rollout.py",
    }
    path = Path(__file__).parent / "results" / "rollout.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    low, high = result["spread"]
    print(
        f"rollout: ours {result['ours_s']:.3f} s, {result['other']} {result['other_s']:.3f} s, "
        f"ratio {result['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    )


def _seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
