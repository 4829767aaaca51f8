"""One vLLM server: its settings, its weights, and the proof that it computes with them.

vLLM's own HTTP routes are all that is used (0.32 and newer), of a server in its development mode:

    /server_info, /weight_info              settings; the label of its weights
    /inference/v1/generate                  token ids in and out, and the weights' label per token
    /collective_rpc reload_weights          reads a folder's weights in place
    /v1/load_lora_adapter                   reads an adapter beside the base model

A success that vLLM reports proves nothing: in 0.32 on a CPU a reload leaves a tied head as it was
and spoils an MoE model. So each load is followed by a probe.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gspo.core.errors import RequestError, ServeError
from gspo.core.log import log
from gspo.weights.vllm_http import ServerFault, call, client
from gspo.weights.vllm_process import ENV, FLAGS, VllmProcess, server_url

START_SECONDS = 900.0
"""How long a server may take to load a model and answer."""
LOAD_SECONDS = 600.0
"""How long it may take to read new weights, or to score the probe."""
LOOK_SECONDS, HEALTH_SECONDS = 30.0, 60.0
"""While an answer is awaited, how often the server is asked if it lives, and for how long."""
REQUEST_SECONDS = 3600.0
"""How long one answer may take."""
T = TypeVar("T")
Read = Callable[[Any, int], T]
"""Makes something of an answer and of the version of its weights."""
_ODD = (KeyError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True)
class Publication:
    """Weights that servers must sample with.

    Attributes:
        version: of the policy.
        label: what vLLM calls these weights. No other run or version has the same.
        folder: in Hugging Face layout; with `lora_base`, an adapter's.
        probe: [T] token ids.
        scores: [T - 1] log-probs of all but the first, by the trainer.
        allowed: nats by which a server's may differ.
        dtype, context: that a server must have.
        lora_base: the model that the adapter is of; "": the folder is a whole model.
        lora_rank: of the adapter.
    """

    version: int
    label: str
    folder: Path
    probe: list[int]
    scores: list[float]
    allowed: float
    dtype: str
    context: int
    lora_base: str = ""
    lora_rank: int = 0


class VllmServer:
    """A server that was given by URL, or a command that starts one here.

    Args:
        entry: `http://host:port`; or what starts one here, see `VllmProcess`.
        log: where a server that is started here writes.

    Attributes:
        publication: the weights that it was proved to have; None: it must not be used.
        running: completions that it samples.
        scores: its log-probs of the last probe; `distance`, in nats, from the trainer's.
        fault: why it is not used.
    """

    def __init__(self, entry: str, log: Path):
        self.url = server_url(entry)
        self._own = None if entry.startswith("http") else VllmProcess(entry, log)
        self.publication: Publication | None = None
        self.running, self.fault = 0, "it was not asked yet"
        self.scores: list[float] = []
        self.distance = float("inf")
        self._model, self._reloads = "", True
        self._http = client(self.url)

    async def sample(
        self, weights: Publication, prompt: list[int], params: dict[str, Any], read: Read[T]
    ) -> T:
        """What is read of the answer of `/inference/v1/generate`, with proved weights.

        Args:
            read: of the answer and the weights' version. What it raises of an answer that is none
                is a fault of the server.

        Raises:
            ServerFault: it dies or hangs meanwhile, other weights answered, or nobody can read it.
            RequestError: it refuses the request.
        """
        asked = asyncio.create_task(self._generate(prompt, params, weights, read, REQUEST_SECONDS))
        try:
            while not (await asyncio.wait([asked], timeout=LOOK_SECONDS))[0]:
                await self._call("/health", None, HEALTH_SECONDS)
                # The engine, which is another process: it answers when its step has ended.
                await self._call("/weight_info", None, LOAD_SECONDS)
            return asked.result()
        except RequestError as error:  # perhaps since it was started again, with other settings
            told = await self._call("/weight_info", None, LOAD_SECONDS)
            if told == {"weight_version": weights.label}:
                raise
            raise ServerFault(f"{error}, of the weights {told}: it began anew") from None
        finally:
            asked.cancel()  # the connection is closed: vLLM lets go of the request

    async def bring(self, new: Publication) -> None:
        """Give the server these weights, and prove it: after a return it may be used.

        A server of ours that fails is started again with them, and proved again.

        Raises:
            ServerFault: it is dead or hangs.
            ServeError: its settings are wrong, or it doesn't compute with these weights.
        """
        self.publication = None
        fresh = self._own is not None and not (self._reloads and await self._lives())
        for last in (fresh or self._own is None, True):
            # A label for each try: where several servers answer at one URL, one of them may have
            # got the label of a former try, and never its weights.
            new = replace(new, label=f"{new.label}-{uuid.uuid4().hex[:8]}")
            try:
                await self._loaded(new, fresh)
                break
            except ServeError as error:
                self.fault = str(error)
                if last:
                    raise
                log.warning("%s: it is started again", error)
                # Else this vLLM doesn't reload this model rightly.
                self._reloads = bool(new.lora_base) or isinstance(error, ServerFault)
                fresh = True
        self.publication = new

    async def close(self) -> None:
        """End a server that was started here; leave another one alone."""
        self.publication = None
        await self._http.aclose()
        if self._own is not None:
            await asyncio.to_thread(self._own.stop)

    async def _call(self, path: str, body: Any, seconds: float) -> Any:
        return await call(self._http, self.url + path, body, seconds)

    async def _generate(
        self, prompt: list[int], params: Any, new: Publication, read: Read[T], limit: float
    ) -> T:
        """What is read of an answer whose completions are whole, and of these weights alone."""
        model = new.label if new.lora_base else self._model
        body = {"model": model, "token_ids": prompt, "sampling_params": params}
        answer = await self._call("/inference/v1/generate", body, limit)
        try:
            for choice in answer["choices"]:
                labels = {span["version"] for span in choice["weight_versions"]}
                if labels != {new.label}:
                    raise ServerFault(
                        f"{self.url} answered with the weights {labels}: it began anew, another "
                        "run uses it, or several servers answer there"
                    )
                if (reason := choice["finish_reason"]) not in ("stop", "length"):
                    raise ServerFault(f"{self.url} ended a completion itself: {reason!r}")
            return read(answer, new.version)
        except _ODD as error:
            raise ServerFault(f"{self.url}: an answer that gspo cannot read: {error!r}") from None

    async def _lives(self) -> bool:
        """Whether a server that was started here answers."""
        with suppress(ServeError):
            if self._own is not None and self._own.runs:
                await self._call("/health", None, HEALTH_SECONDS)
                return self._own.runs
        return False

    async def _loaded(self, new: Publication, fresh: bool) -> None:
        """Load the weights, into a server that is started for it if `fresh`, and prove them."""
        settings = ["--dtype", new.dtype, "--max-model-len", f"{new.context}"]
        if new.lora_base:
            rank = max(8, 1 << (new.lora_rank - 1).bit_length())
            settings += ["--enable-lora", "--max-lora-rank", f"{rank}"]
        if fresh:
            await self._start(new.lora_base or str(new.folder), settings)
        kind = ServeError
        try:
            if not (wrong := await self._wrong_settings(new)):
                return await self._load(new, fresh)
        except (RequestError, *_ODD) as error:
            wrong = [f"it does not answer as vLLM does ({error!r})"]
            if not isinstance(error, RequestError):
                kind = ServerFault  # perhaps of a moment
        raise kind(
            f"{self.url}: {'; '.join(wrong)}. Start vLLM 0.32 or newer, without --api-key, with "
            f"{ENV} python {FLAGS} {' '.join(settings)}, or give a smaller max_context"
        )

    async def _load(self, new: Publication, fresh: bool) -> None:
        # Before the load: a server that begins anew during it has lost the label, and what is
        # sampled there for somebody else, with their label, is not sampled with these weights.
        await self._call("/update_weight_version", {"new_version": new.label}, HEALTH_SECONDS)
        folder = str(new.folder)
        if new.lora_base:
            adapter = {"lora_name": new.label, "lora_path": folder, "load_inplace": True}
            await self._call("/v1/load_lora_adapter", adapter, LOAD_SECONDS)
        elif not fresh:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            await self._call("/collective_rpc", reload, LOAD_SECONDS)
            # What still runs, of somebody else, would keep keys and values of the old weights.
            forget = "/reset_prefix_cache?reset_running_requests=true"
            if not (await self._call(forget, {}, LOAD_SECONDS) or {}).get("success"):
                raise ServerFault(f"{self.url} keeps what it computed with older weights")
        await self._prove(new)

    async def _wrong_settings(self, new: Publication) -> list[str]:
        """The settings with which the numbers would be others."""
        models = (await self._call("/v1/models", None, HEALTH_SECONDS))["data"]
        self._model, *_ = (model["id"] for model in models if not model.get("parent"))
        told = await self._call("/server_info?config_format=json", None, LOAD_SECONDS)
        found = told["vllm_config"]["model_config"]
        room = max(new.context, found["max_model_len"])
        right = {"logprobs_mode": "processed_logprobs", "dtype": f"torch.{new.dtype}"}
        right |= {"quantization": None, "max_model_len": room}
        return [f"{n} is {found[n]!r}, not {v!r}" for n, v in right.items() if found[n] != v]

    async def _prove(self, new: Publication) -> None:
        """Compare the server's scores of the probe with the trainer's.

        Raises:
            ServeError: they differ; says by how much, and what to do.
        """

        def scores(answer: Any, _: int) -> list[float]:
            pairs = zip(answer["prompt_logprobs"][1:], new.probe[1:], strict=True)
            return [float(by_id[str(token)]["logprob"]) for by_id, token in pairs]

        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "logprobs": 0}
        self.scores = await self._generate(new.probe, params, new, scores, LOAD_SECONDS)
        both = zip(self.scores, new.scores, strict=True)
        off = [abs(found - wanted) for found, wanted in both]
        self.distance = max(off)
        if not all(nats <= new.allowed for nats in off):  # a NaN is no largest one
            raise ServeError(
                f"{self.url} does not compute with version {new.version} of the weights: its "
                f"log-probs of the probe are off by {self.distance:.3g} nats "
                f"({new.allowed:.3g} allowed), though vLLM reported success. It serves another "
                "model, or this vLLM cannot reload this one (docs/vllm.md): give the Python that "
                "starts it in place of its URL, so that gspo starts it again with each version"
            )

    async def _start(self, model: str, settings: list[str]) -> None:
        """Start the server anew, and wait until it answers.

        Raises:
            ServerFault: it ended, or START_SECONDS went by; with the end of its log.
        """
        own = self._own
        assert own is not None
        await asyncio.to_thread(own.stop)
        self.url = own.start(model, *settings)
        limit = time.monotonic() + START_SECONDS
        while not await self._lives():
            if not own.runs or time.monotonic() > limit:
                raise ServerFault(
                    f"a server ended, or gave no answer within {START_SECONDS:.0f} s: "
                    f"{own.last_words()}"
                )
            await asyncio.sleep(0.3)
