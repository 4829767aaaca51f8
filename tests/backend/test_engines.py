"""Saved steps are sampled from beside the current weights, and are never trained."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import openai
import pytest

import gspo as art
from gspo.backend.engines import Engines
from gspo.core.errors import ConfigError, RequestError, ServeError
from gspo.serve.engine import Completion, Request, SamplingParams
from support import random_groups

PARAMS = SamplingParams(n=2, max_tokens=6, seed=7)


async def started(path: Path, **options: Any) -> tuple[art.LocalBackend, art.TrainableModel]:
    # Tests train on Choices that no engine sampled.
    config = art.dev.InternalModelConfig(exact=False)
    model = art.TrainableModel(
        name="m", project="p", base_model="embedded:sort", _internal_config=config
    )
    backend = art.LocalBackend(path, **options)
    await model.register(backend)
    return backend, model


async def sampled(engines: Engines, name: str) -> list[Completion]:
    engine = await engines.find(name)
    return await engine.complete(Request(tuple(engine.tokenizer.encode("312")), PARAMS))


async def test_each_saved_step_answers_as_it_did_when_it_was_current(tmp_path: Path):
    backend, model = await started(tmp_path)
    service = backend._service(model)
    engines, then = service.engines, []
    for step in range(3):
        then.append(await sampled(engines, "m"))
        if step < 2:
            groups = random_groups(backend.policy(model), groups=1, size=2, seed=step)
            await model.train(groups, _config=art.dev.TrainConfig(minibatches=1), config=_FAST)
    assert engines.names() == ["m", "m@0", "m@1", "m@2"]
    assert [c.logprobs for c in then[0]] != [c.logprobs for c in then[1]]
    seen = {}
    for step in (0, 1, 2, 1):
        assert await sampled(engines, f"m@{step}") == then[step]  # log-probs and versions too
        seen[step] = weakref.ref(await engines.find(f"m@{step}"))
    assert then[2] == await sampled(engines, "m")
    gc.collect()
    assert [seen[step]() is None for step in (0, 1, 2)] == [True, False, False]  # two are held
    with pytest.raises(RequestError, match=r"step 7 of 'm' is not saved. Saved: 0, 1, 2"):
        await engines.find("m@7")
    for name in ("n", "m@", "m@x", "m@-1", "n@1", "m@1@1", "@1"):
        with pytest.raises(RequestError, match="no model"):
            await engines.find(name)
    held = await engines.find("m@1")
    await backend.close()
    with pytest.raises(ServeError, match="closed"):
        await engines.find("m@1")
    with pytest.raises(ServeError):
        await held.complete(Request((1, 2), PARAMS))


async def test_a_client_asks_for_a_step_by_its_name(tmp_path: Path):
    backend, model = await started(tmp_path)
    client = model.openai_client()
    message: Any = {"role": "user", "content": "312"}

    async def said(name: str) -> tuple[str | None, int]:
        answer = await client.chat.completions.create(
            model=name, messages=[message], max_tokens=6, seed=3
        )
        choice: Any = answer.choices[0]
        return choice.message.content, choice.policy_version

    base = await said(model.get_inference_name())
    groups = random_groups(backend.policy(model), groups=1, size=2)
    await model.train(groups, _FAST)
    assert await said(model.get_inference_name(0)) == base
    assert (await said(model.get_inference_name(1)))[1] == (await said("m"))[1] == 1
    assert [entry.id async for entry in client.models.list()] == ["m", "m@0", "m@1"]
    with pytest.raises(openai.NotFoundError, match=r"step 2 of 'm' is not saved. Saved: 0, 1"):
        await said(model.get_inference_name(2))
    prompted = art.Model(name="x", project="p")
    with pytest.raises(ConfigError, match="no steps"):
        prompted.get_inference_name(1)
    with pytest.raises(ConfigError, match="step = -1"):
        model.get_inference_name(-1)
    await backend.close()


async def test_a_step_is_loaded_once_however_many_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    backend, model = await started(tmp_path)
    engines = backend._service(model).engines
    loaded = []
    load = Engines._load
    monkeypatch.setattr(
        Engines, "_load", lambda self, step: loaded.append(step) or load(self, step)
    )
    found = await asyncio.gather(*(engines.find("m@0") for _ in range(8)))
    assert loaded == [0]
    assert len(set(map(id, found))) == 1
    await backend.close()


async def test_a_checkpoint_that_is_deleted_is_refused(tmp_path: Path):
    backend, model = await started(tmp_path, keep_checkpoints=1)
    for step in range(2):
        groups = random_groups(backend.policy(model), groups=1, size=2, seed=step)
        await model.train(groups, _config=art.dev.TrainConfig(minibatches=1))
    with pytest.raises(RequestError, match=r"Saved: 0, 2"):
        await backend._service(model).engines.find("m@1")
    await backend.close()


_FAST = art.TrainConfig(learning_rate=1e-2)
