"""Greedy tokens and their log-probs of an exported folder, in vLLM's own environment.

benchmarks/.venvs/vllm/bin/python tests/experiment/vllm_side.py MODEL ADAPTER|- PROMPT
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    model, adapter, prompt = sys.argv[1:]
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    llm = vllm.LLM(
        model=model,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        enable_lora=adapter != "-",
        seed=0,
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    lora = LoRARequest("adapter", 1, adapter) if adapter != "-" else None
    asked = {"prompt_token_ids": json.loads(prompt)}
    (output,) = llm.generate([asked], params, use_tqdm=False, lora_request=lora)
    tokens = list(output.outputs[0].token_ids)
    found = zip(tokens, output.outputs[0].logprobs, strict=True)
    print(json.dumps([tokens, [entry[token].logprob for token, entry in found]]))
