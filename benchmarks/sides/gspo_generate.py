"""gspo's side of `vs_vllm.py`: one process, one job file in, one result file out.

python sides/gspo_generate.py JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(job_path: str, result_path: str) -> None:
    """Run the job."""
    from forced import FORCED

    from gspo.dev import InternalModelConfig
    from gspo.policy.load import load_policy
    from gspo.serve.engine import Request, SamplingParams
    from gspo.serve.torch_engine import TorchEngine

    job = json.loads(Path(job_path).read_text())
    config = InternalModelConfig(threads=job["threads"], max_context=job["context"])
    engine = TorchEngine(load_policy(job["model"], config))
    params = SamplingParams(n=job["completions"], max_tokens=job["max_tokens"], **FORCED)
    rounds, first = [], []
    for prompts in job["rounds"]:
        requests = [Request(tuple(prompt), params) for prompt in prompts]
        started = time.perf_counter()
        done = engine.generate(requests)
        seconds = time.perf_counter() - started
        rounds.append(
            {"seconds": seconds, "tokens": sum(len(c.token_ids) for o in done for c in o)}
        )
        if not first:
            first = [
                {"tokens": list(own[0].token_ids), "logprobs": list(own[0].logprobs)}
                for own in done
            ]
    Path(result_path).write_text(json.dumps({"rounds": rounds, "first": first}))


if __name__ == "__main__":
    main(*sys.argv[1:])
