"""vLLM's side of `vs_vllm.py`: one process, one job file in, one result file out.

    .venvs/vllm/bin/python sides/vllm_generate.py JOB.json RESULT.json

Runs in vLLM's own environment and imports nothing of gspo. Offline `LLM.generate` on token ids,
with the sampled tokens' log-probs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(job_path: str, result_path: str) -> None:
    """Run the job."""
    job = json.loads(Path(job_path).read_text())
    # All cores that the job may use go to the model: none is set aside for the scheduler.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{job['threads'] - 1}"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    import vllm  # pyright: ignore[reportMissingImports]

    llm = vllm.LLM(
        model=job["model"],
        dtype="float32",
        max_model_len=job["context"],
        max_num_seqs=len(job["rounds"][0]) * job["completions"],
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        seed=0,
    )
    params = vllm.SamplingParams(
        n=job["completions"],
        max_tokens=job["max_tokens"],
        temperature=1.0,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )
    rounds, first = [], []
    for prompts in job["rounds"]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        own = [completion for output in outputs for completion in output.outputs]
        rounds.append({"seconds": seconds, "tokens": sum(len(c.token_ids) for c in own)})
        if not first:
            first = [read(output.outputs[0]) for output in outputs]
    result = {"rounds": rounds, "first": first, "versions": {"vllm": vllm.__version__}}
    Path(result_path).write_text(json.dumps(result))


def read(completion: Any) -> dict[str, list]:
    """Tokens and their log-probs."""
    tokens = list(completion.token_ids)
    found = zip(tokens, completion.logprobs, strict=True)
    return {"tokens": tokens, "logprobs": [entry[token].logprob for token, entry in found]}


if __name__ == "__main__":
    main(*sys.argv[1:])
