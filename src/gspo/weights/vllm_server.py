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
        self._given: Publication | None = None  # the last that was proved
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
        try:
            return await self._generate(prompt, params, weights, read, REQUEST_SECONDS)
        except RequestError as error:  # perhaps since it was started again, with other settings
            told = await self._call("/weight_info", None, LOAD_SECONDS)
            if told == {"weight_version": weights.label}:
                raise
            raise ServerFault(f"{error}, of the weights {told}: it began anew") from None

    async def bring(self, new: Publication) -> None:
        """Give the server these weights, and prove it: after a return it may be used.

        A server of ours that fails is started again with them, and proved again.

        Raises:
            ServerFault: it is dead or hangs.
            ServeError: its settings are wrong, or it doesn't compute with these weights.
        """
        given, self.publication = self._given, None
        if given is not None and given == replace(new, label=given.label):
            # One answer was spoilt, perhaps on its way. If the weights are still there, what else
            # it samples goes on under their label.
            with suppress(ServeError):
                await self._prove(given, HEALTH_SECONDS)
                self.publication = given
                return
        fresh = self._own is not None and not (self._reloads and self._own.runs)
        for last in (False, True):
            # A label for each try: where several servers answer at one URL, one of them may have
            # got the label of a former try, and never its weights.
            new = replace(new, label=f"{new.label}-{uuid.uuid4().hex[:8]}")
            try:
                await self._loaded(new, fresh)
                self.publication = self._given = new
                return
            except ServeError as error:
                self.fault = str(error)
                # vLLM binds seconds after the port was chosen: somebody else may have it by then.
                taken = fresh and "Address already in use" in self.fault
                if last or self._own is None or (fresh and not taken):
                    raise
                log.warning("%s: it is started again", error)
                # Else this vLLM doesn't reload this model rightly.
                self._reloads = bool(new.lora_base) or isinstance(error, ServerFault)
                fresh = True

    async def close(self) -> None:
        """End a server that was started here; leave another one alone."""
        self.publication = None
        await self._http.aclose()
        if self._own is not None:
            await asyncio.to_thread(self._own.stop)

    async def _call(self, path: str, body: Any, seconds: float) -> Any:
        """`call`, and meanwhile look whether the server lives if its answer may take long."""
        asked = asyncio.create_task(call(self._http, self.url + path, body, seconds))
        look = LOOK_SECONDS if seconds > HEALTH_SECONDS else None
        try:
            while not (await asyncio.wait([asked], timeout=look))[0]:
                await call(self._http, f"{self.url}/health", None, HEALTH_SECONDS)
                # The engine, which is another process: it answers when its step has ended.
                await call(self._http, f"{self.url}/weight_info", None, LOAD_SECONDS)
            return asked.result()
        finally:
            asked.cancel()  # the connection is closed: vLLM lets go of the request

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
            kind = ServeError if isinstance(error, RequestError) else ServerFault
        raise kind(
            f"{self.url}: {'; '.join(wrong)}. Start vLLM 0.32 or newer, without --api-key, with "
            f"{ENV} python {FLAGS} {' '.join(settings)}, or give a smaller max_context"
        )

    async def _load(self, new: Publication, fresh: bool) -> None:
        # Before the load: a server that begins anew during it has lost the label, and what is
        # sampled there for somebody else, with their label, is not sampled with these weights.
        await self._call("/update_weight_version", {"new_version": new.label}, HEALTH_SECONDS)
        folder = str(new.folder)
        try:
            if new.lora_base:
                adapter = {"lora_name": new.label, "lora_path": folder, "load_inplace": True}
                await self._call("/v1/load_lora_adapter", adapter, LOAD_SECONDS)
            elif not fresh:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                await self._call("/collective_rpc", reload, LOAD_SECONDS)
        except ServerFault as error:
            raise ServerFault(
                f"{error}. It was to read {folder}: that must be whole, at this path on its "
                f"machine too, and of its model, {self._model}. Start it again: it may be spoilt"
            ) from None
        if not (new.lora_base or fresh):
            # What still runs, of somebody else, would keep keys and values of the old weights.
            forget = "/reset_prefix_cache?reset_running_requests=true"
            if not (await self._call(forget, {}, LOAD_SECONDS) or {}).get("success"):
                raise ServerFault(f"{self.url} keeps what it computed with older weights")
        await self._prove(new, LOAD_SECONDS)

    async def _wrong_settings(self, new: Publication) -> list[str]:
        """The settings with which the numbers would be others."""
        models = (await self._call("/v1/models", None, HEALTH_SECONDS))["data"]
        self._model, *_ = (model["id"] for model in models if not model.get("parent"))
        told = await self._call("/server_info?config_format=json", None, LOAD_SECONDS)
        config = told["vllm_config"]
        found = {"max_lora_rank": 0} | config["model_config"] | (config.get("lora_config") or {})
        least = {"max_model_len": new.context, "max_lora_rank": new.lora_rank}
        right = {name: max(value, found[name]) for name, value in least.items()}
        right |= {"logprobs_mode": "processed_logprobs", "quantization": None}
        right["dtype"] = f"torch.{new.dtype}"
        return [f"{n} is {found[n]!r}, not {v!r}" for n, v in right.items() if found[n] != v]

    async def _prove(self, new: Publication, seconds: float) -> None:
        """Compare the server's scores of the probe with the trainer's.

        Raises:
            ServeError: they differ; says by how much, and what to do.
        """

        def scores(answer: Any, _: int) -> list[float]:
            pairs = zip(answer["prompt_logprobs"][1:], new.probe[1:], strict=True)
            return [float(by_id[str(token)]["logprob"]) for by_id, token in pairs]

        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "logprobs": 0}
        self.scores = await self._generate(new.probe, params, new, scores, seconds)
        both = zip(self.scores, new.scores, strict=True)
        off = [abs(found - wanted) for found, wanted in both]
        self.distance = max(off)
        if not all(nats <= new.allowed for nats in off):  # a NaN is no largest one
            raise ServeError(
                f"{self.url} does not compute with version {new.version} of the weights: its "
                f"log-probs of the probe are off by {self.distance:.3g} nats ({new.allowed:.3g} "
                f"allowed), though vLLM reported success. It serves another model, {new.folder} is "
                "damaged, or this vLLM cannot load this model rightly (docs/vllm.md). In place of "
                "its URL, give the Python that starts it: gspo starts it again with each version"
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
        while True:
            with suppress(ServeError):
                await self._call("/health", None, HEALTH_SECONDS)
                if own.runs:  # else somebody else has its port
                    return
            if not own.runs or time.monotonic() > limit:
                raise ServerFault(
                    f"a server ended, or gave no answer within {START_SECONDS:.0f} s: "
                    f"{own.last_words()}"
                )
            await asyncio.sleep(0.3)
