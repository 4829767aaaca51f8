"""A server with vLLM's routes whose model is gspo's own engine, with faults that a test scripts.

As a program it takes the arguments of `vllm.entrypoints.openai.api_server` that gspo gives.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from safetensors.torch import load_file

from gspo.policy.load import load_policy
from gspo.serve import engine as engines
from gspo.serve.params import SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.weights.receipt import Probe, score

PARAMS = {"n": 1, "max_tokens": 5, "temperature": 1.0, "logprobs": 0, "ignore_eos": True}
"""Of a short request."""
LOADING = threading.Lock()
"""transformers loads one model at a time."""
_ODD = {"null": None, "nan": float("nan"), "infinite": float("-inf"), "9999": -9999.0}


async def _trickle() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(0.05)


class StandIn:
    """One server.

    Attributes:
        faults: what is wrong with it now. `dead` (each route answers 500), `hangs`, `hung health`,
            `hung engine` (what the engine itself must answer takes 1 s), `trickles` (answers that
            never end), `no json`, `deep`, `begins anew` (once, when it is asked to sample); of a
            reload: `stale` (it does nothing), `old head` (all but the tied head is loaded), `held
            blocks` (the prefix cache is not reset); of an answer: `list`, `log-probs`, `token
            ids`, `other ids`, `null`, `nan`, `infinite`, `9999`, `shape`, `cut` (fewer tokens than
            asked for), `cut stop` (ended, by nothing), `abort`, `no reason`, `no label`, `label of
            one`.
        passing: whether the faults end with the next answer to a request to sample.
        refusals: the status with which a path is answered in any case.
        busy: to so many requests it answers 503, to be asked again at once.
        failing: to so many, 502.
        seconds: before it answers a request to sample, beside what is computed.
        config, lora: what it says of its settings.
        asked: paths of the requests so far.
    """

    def __init__(self, folder: str, dtype: str = "float32", length: int = 512):
        self.folder, self.faults, self.asked = folder, set[str](), list[str]()
        self.config: dict[str, Any] = {
            "logprobs_mode": "processed_logprobs",
            "dtype": f"torch.{dtype}",
            "quantization": None,
            "max_model_len": length,
        }
        self.lora: dict[str, int] | None = {"max_lora_rank": 16}
        self.seconds, self.busy, self.failing, self.passing = 0.0, 0, 0, False
        self.refusals: dict[str, int] = {}
        self.lock = threading.Lock()
        self.restart()
        self.app = FastAPI()
        self.app.middleware("http")(self._faulty)
        self.app.post("/inference/v1/generate")(self._generate)
        self.app.post("/collective_rpc")(self._reload)
        self.app.post("/v1/load_lora_adapter")(self._lora)
        self.app.post("/update_weight_version")(self._label)
        self.app.post("/reset_prefix_cache")(self._reset)
        self.app.get("/health")(lambda: Response())
        self.app.get("/weight_info")(self._told)
        self.app.get("/v1/models")(lambda: {"data": [{"id": "base", "parent": None}]})
        self.app.get("/server_info")(self._settings)

    def restart(self) -> None:
        """Forget whatever was loaded after the start."""
        self.label, self.adapters = "default", dict[str, Any]()
        with LOADING:
            if not hasattr(self, "policy"):
                self.policy = load_policy(self.folder)
                self.engine = TorchEngine(self.policy)
                state = self.policy.lm.state_dict()
                self.first = {name: weight.clone() for name, weight in state.items()}
            self.policy.lm.load_state_dict(self.first)

    async def _faulty(self, request: Request, proceed: Any) -> Response:
        self.asked.append(request.url.path)
        sampling = request.url.path == "/inference/v1/generate"
        if (broken := self._broken(request.url.path)) is not None:
            return broken
        if ("hangs" in self.faults and sampling) or ("hung health" in self.faults and not sampling):
            await asyncio.sleep(60)
        if sampling and "trickles" in self.faults:
            return StreamingResponse(_trickle(), media_type="application/json")
        if sampling and "begins anew" in self.faults:
            self.faults.remove("begins anew")
            self.restart()
        if sampling:
            await asyncio.sleep(self.seconds)
        return await proceed(request)

    def _broken(self, path: str) -> Response | None:
        if "dead" in self.faults:
            return JSONResponse({"error": "EngineDeadError"}, 500)
        if "no json" in self.faults:
            return Response('{"choices": [', media_type="application/json")
        if "deep" in self.faults:
            return Response("[" * 100_000, media_type="application/json")
        if status := self.refusals.get(path):
            return JSONResponse({"detail": "refused"}, status)
        if self.busy:
            self.busy -= 1
            return JSONResponse({"error": "scaling"}, 503, {"Retry-After": "0"})
        if self.failing:
            self.failing -= 1
            return JSONResponse({"error": "of a moment"}, 502)
        return None

    def _reload(self, body: dict[str, Any]) -> dict[str, Any]:
        if "stale" not in self.faults:
            lm: Any = self.policy.lm
            head = lm.lm_head.weight
            old = head.detach().clone()
            folder = body["kwargs"]["weights_path"]
            found = load_file(f"{folder}/model.safetensors")
            if lm.load_state_dict(found, strict=False).unexpected_keys:  # an MoE's have other names
                with LOADING:
                    lm.load_state_dict(type(lm).from_pretrained(folder).state_dict())
            if "old head" in self.faults:
                lm.lm_head.weight = torch.nn.Parameter(old)
            elif head is not lm.model.embed_tokens.weight:
                lm.tie_weights()
        return {"results": [None]}

    def _reset(self, reset_running_requests: bool = False) -> dict[str, Any]:
        return {"success": reset_running_requests and "held blocks" not in self.faults}

    def _lora(self, body: dict[str, Any]) -> Response:
        from peft import PeftModel

        with LOADING:
            policy = load_policy(self.folder)
        PeftModel.from_pretrained(policy.lm, body["lora_path"])
        self.adapters[body["lora_name"]] = TorchEngine(policy)
        return Response("Success")

    def _label(self, body: dict[str, Any]) -> dict[str, Any]:
        self.label = body["new_version"]
        return {"success": True}

    def _settings(self) -> dict[str, Any]:
        return {"vllm_config": {"model_config": self.config, "lora_config": self.lora}}

    def _told(self) -> dict[str, Any]:
        if "hung engine" in self.faults:
            time.sleep(1)
        return {"weight_version": self.label}

    def _generate(self, body: dict[str, Any]) -> Any:
        engine = self.engine if body["model"] == "base" else self.adapters.get(body["model"])
        if engine is None:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        with self.lock:
            answer = self._answer(engine, body["token_ids"], body["sampling_params"])
            if "list" in self.faults:
                answer = []
            if self.passing:
                self.faults.clear()
        if isinstance(answer, Response):
            return answer
        return Response(json.dumps(answer), media_type="application/json")  # NaN is possible

    def _answer(self, engine: TorchEngine, prompt: list[int], asked: dict[str, Any]) -> Any:
        off = 0.5 if "log-probs" in self.faults else 0.0
        scores = None
        if asked.get("prompt_logprobs") is not None:
            told = score(engine.policy, Probe(torch.tensor(prompt), None)).tolist()
            pairs = zip(prompt[1:], told, strict=True)
            scores = [None, *({str(token): {"logprob": p - off}} for token, p in pairs)]
        names = "n", "max_tokens", "temperature", "seed", "ignore_eos"
        given: dict[str, Any] = {name: asked[name] for name in names if name in asked}
        if not asked["temperature"] and asked["n"] > 1:
            return JSONResponse({"error": "n must be 1 when using greedy sampling"}, 400)
        given["stop"] = tuple(asked.get("stop", ()))
        given["stop_token_ids"] = tuple(asked.get("stop_token_ids", ()))
        params = SamplingParams(top_logprobs=max(1, asked["logprobs"]), **given)
        done = engine.generate([engines.Request(tuple(prompt), params)])[0]
        choices = [self._choice(index, c, engine, params) for index, c in enumerate(done)]
        return {"choices": choices, "prompt_logprobs": scores}

    def _choice(self, index: int, c: Any, engine: TorchEngine, params: SamplingParams) -> Any:
        tokens = [10**6 if "token ids" in self.faults else token for token in c.token_ids]
        content = [
            {
                "token_id": token + ("other ids" in self.faults),
                "logprob": next((p for f, p in _ODD.items() if f in self.faults), logprob),
                "top_logprobs": [{"token_id": t, "logprob": p} for t, p in top],
            }
            for token, logprob, top in zip(tokens, c.logprobs, c.top_logprobs, strict=True)
        ]
        told: dict[str, Any] = {
            "index": index,
            "finish_reason": c.finish_reason,
            "stop_reason": None,
            "token_ids": tokens,
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.label, "start": 0, "end": len(tokens)}],
        }
        whole = engine.tokenizer.decode(c.token_ids)
        if c.finish_reason == "stop" and c.token_ids[-1] not in params.stop_token_ids:
            told["stop_reason"] = next((stop for stop in params.stop if stop in whole), None)
        if "shape" in self.faults:
            del told["logprobs"]
        if self.faults & {"cut", "cut stop"}:
            told["token_ids"], told["stop_reason"] = tokens[:2], None
            told["logprobs"]["content"] = content[:2]
            told["finish_reason"] = "length" if "cut" in self.faults else "stop"
        if self.faults & {"abort", "no reason"}:
            told["finish_reason"] = "abort" if "abort" in self.faults else None
        if "no label" in self.faults:
            told["weight_versions"] = []
        if "label of one" in self.faults and index:
            told["weight_versions"][0]["version"] = "default"
        return told

    @contextmanager
    def listening(self, port: int = 0) -> Iterator[str]:
        """Its URL, while it answers."""
        config = uvicorn.Config(self.app, port=port, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


if __name__ == "__main__":
    given = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    server = StandIn(given["--model"], given["--dtype"], int(given["--max-model-len"]))
    server.faults |= set(os.environ.get("STAND_IN_FAULTS", "").split(",")) - {""}
    with Path(os.environ.get("STAND_IN_STARTS", os.devnull)).open("a") as starts:
        starts.write(given["--model"] + "\n")
    uvicorn.run(server.app, port=int(given["--port"]), log_level="error")
