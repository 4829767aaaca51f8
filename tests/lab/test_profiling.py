"""`--profile`: rows that add up, and operations that are those of the tokens computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from experiment.test_loop import Silent, records, small
from gspo.backend.stored_batch import read_batch
from gspo.core.timing import span, timing
from gspo.data.packing import pack
from gspo.experiment.loop import run_experiment
from gspo.lab.flops import Flops, head_flops
from gspo.lab.profiling import Profile, peak_flops, render, write_profile
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.train.minibatches import prepare
from gspo.weights.rollout_copy import RoundedCopy
from lab.written import as_object
from policy.test_policy import tiny
from support import embedded, random_groups


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch):
    """A machine of one operation a nanosecond; bfloat16 is twice as fast."""
    from gspo.lab import profiling

    monkeypatch.setattr(
        profiling, "peak_flops", lambda dtype, device: 2e9 if dtype == torch.bfloat16 else 1e9
    )


PHASES = ("sampling", "rollout", "packing", "forward", "head", "backward", "optimizer", "publish")
PHASES += ("checkpoint",)


async def profiled(path: Path, **fields: Any) -> tuple[Path, dict[str, Any]]:
    profile = Profile()
    with timing(profile.clock):
        outcome = await run_experiment(small(path, **fields), Silent(), profile.attach)
    return outcome.run, profile.report()


def by_name(report: dict[str, Any]) -> dict[str, Any]:
    return {phase.name: phase for phase in as_object(report).phases}


async def test_the_phases_add_up_to_the_steps(tmp_path: Path):
    run, report = await profiled(tmp_path)
    phases = by_name(report)
    assert set(phases) == {*PHASES, "other"} and list(phases)[-1] == "other"
    assert sum(p.seconds for p in by_name(report).values()) == pytest.approx(
        report["seconds"], rel=1e-12
    )
    assert sum(p.share for p in by_name(report).values()) == pytest.approx(1.0)
    assert all(p.seconds > 0 for p in by_name(report).values())
    # Evaluations, before and after, are no part of a step.
    assert report["steps"] == phases["sampling"].calls == phases["rollout"].calls == 3
    assert phases["optimizer"].calls == phases["backward"].calls == phases["forward"].calls
    assert phases["checkpoint"].calls == 6  # the batch and the weights
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {k: sum(line.get(k, 0.0) for line in lines) for k in ("time/step", "time/rollout")}
    # Measured inside of the step, and around the rollout.
    assert report["seconds"] >= logged["time/step"] > logged["time/rollout"]
    assert logged["time/rollout"] >= phases["rollout"].seconds + phases["sampling"].seconds


def needed(run: Path, steps: int) -> tuple[float, float, float, float]:
    """Forward, head and both backward passes of the samples that were trained on."""
    policy = embedded()
    own = Flops.of(policy)
    totals = torch.zeros(4, dtype=torch.float64)
    for step in range(1, steps + 1):
        groups = read_batch(run / f"trajectories/train/{step:04d}.parquet").groups
        for samples in prepare(groups, context=policy.context).samples:
            for sample in (s for s in samples if s.advantage != 0):
                positions = torch.arange(len(sample))
                head = head_flops(policy.head, sample.sampled)
                totals += torch.tensor(
                    [own.forward(positions), head[0], own.backward(positions), head[1]],
                    dtype=torch.float64,
                )
    return tuple(totals.tolist())


async def test_threads_that_train_side_by_side_share_the_time(tmp_path: Path):
    """The profiled run computes as the plain one does, to the bit, and its phases still add up."""
    fields: dict[str, Any] = {
        "steps": 2,
        "load": {"threads": 2},
        "train": {"packed_sequence_length": 64, "share_prefixes": False},
    }
    plain = (await run_experiment(small(tmp_path / "plain", **fields), Silent())).run
    run, report = await profiled(tmp_path / "timed", **fields)
    weights = "checkpoints/0002/model.safetensors"
    assert (plain / weights).read_bytes() == (run / weights).read_bytes()
    assert sum(p.seconds for p in by_name(report).values()) == pytest.approx(
        report["seconds"], rel=1e-12
    )
    needed_forward, _, backward, head_backward = needed(run, 2)
    phases = by_name(report)
    assert phases["forward"].flops == pytest.approx(needed_forward, rel=1e-12)
    assert phases["backward"].flops == pytest.approx(backward + head_backward, rel=1e-12)
    assert phases["backward"].calls > 2 * 4


async def test_operations_are_those_of_the_samples_trained_on(tmp_path: Path):
    run, report = await profiled(tmp_path, steps=2, train={"share_prefixes": False})
    forward, head, backward, head_backward = needed(run, 2)
    phases = by_name(report)
    assert phases["forward"].flops == pytest.approx(forward, rel=1e-12)
    assert phases["head"].flops == pytest.approx(head, rel=1e-12)
    assert phases["backward"].flops == pytest.approx(backward + head_backward, rel=1e-12)
    for name in ("forward", "head", "backward", "sampling"):
        phase = phases[name]
        assert phase.floor_seconds == pytest.approx(phase.flops / 1e9)
        assert phase.of_peak == pytest.approx(phase.floor_seconds / phase.seconds)
    for name in ("rollout", "packing", "optimizer", "publish", "checkpoint", "other"):
        assert (phases[name].flops, phases[name].of_peak) == (0.0, None)


async def test_a_kl_term_pays_for_the_reference_too(tmp_path: Path):
    run, report = await profiled(
        tmp_path, steps=1, train={"kl_penalty_coef": 0.1, "minibatches": 1, "share_prefixes": False}
    )
    policy = embedded()
    own = Flops.of(policy)
    groups = read_batch(run / "trajectories/train/0001.parquet").groups
    samples = [s for t in prepare(groups, context=policy.context).samples for s in t]
    forward = sum(own.forward(torch.arange(len(s))) for s in samples)
    head = sum(head_flops(policy.head, s.sampled)[0] for s in samples)
    phases = by_name(report)
    assert phases["forward"].flops == pytest.approx(2 * forward, rel=1e-12)
    assert phases["head"].flops == pytest.approx(2 * head, rel=1e-12)
    backward = sum(own.backward(torch.arange(len(s))) for s in samples) + 2 * head
    assert phases["backward"].flops == pytest.approx(backward, rel=1e-12)


async def test_each_type_is_compared_with_its_own_peak(tmp_path: Path):
    load = {"dtype": "bfloat16", "rollout_dtype": "bfloat16"}
    _, report = await profiled(tmp_path, steps=1, load=load)
    assert report["peak"] == {"bfloat16": 2e9, "float32": 1e9}
    phases = by_name(report)
    # The layers in bfloat16, the vocabulary projection in float32.
    assert phases["forward"].floor_seconds == pytest.approx(phases["forward"].flops / 2e9)
    assert phases["head"].floor_seconds == pytest.approx(phases["head"].flops / 1e9)
    for name in ("sampling", "backward"):
        flops = phases[name].flops
        assert flops / 2e9 < phases[name].floor_seconds < flops / 1e9


def test_sampling_counts_what_torch_counts():
    """Prompts of one length, so that nothing is padded; torch counts a prompt's whole square."""
    policy = tiny(LlamaForCausalLM, LlamaConfig)
    policy.lm.set_attn_implementation("eager")
    engine, profile = TorchEngine(policy), Profile()
    profile.attach(policy, policy)
    prompts = [(5, 6, 7, 8), (9, 10, 11, 12)]
    params = SamplingParams(n=3, max_tokens=6)
    requests = [Request(prompt, params) for prompt in prompts]
    with FlopCounterMode(display=False) as mode, timing(profile.clock), span("step"):
        engine.generate(requests)
    found = mode.get_flop_counts()
    rotary = sum(sum(v.values()) for name, v in found.items() if name.endswith("rotary_emb"))
    own = Flops.of(policy)
    squares = own.pair[0] * sum(len(p) * (len(p) - 1) // 2 for p in prompts)
    counted = by_name(profile.report())["sampling"].flops
    assert counted + squares == sum(found["Global"].values()) - rotary


async def test_a_profile_changes_nothing_but_its_own_files(tmp_path: Path):
    plain = (await run_experiment(small(tmp_path / "a"), Silent())).run
    timed, _ = await profiled(tmp_path / "b")
    assert records(plain) == records(timed)
    weights = "checkpoints/0003/model.safetensors"
    assert (plain / weights).read_bytes() == (timed / weights).read_bytes()


async def test_files_and_text(tmp_path: Path):
    run, report = await profiled(tmp_path, steps=1)
    text = render(report)
    path = write_profile(report, run)
    assert json.loads(path.read_text()) == report
    assert (run / "profile.txt").read_text() == text
    lines = text.splitlines()
    assert "per step of 1" in lines[0] and "1.0 GFLOP/s in float32" in lines[0]
    for name in (*PHASES, "other", "step"):
        assert any(line.split()[:1] == [name] for line in lines), name
    assert all(len(line) <= 100 for line in lines[1:])


async def test_a_finished_run_has_nothing_to_profile(tmp_path: Path):
    await profiled(tmp_path, steps=1)
    _, report = await profiled(tmp_path, steps=1)
    assert (report["steps"], report["phases"]) == (0, [])
    assert "nothing to profile" in render(report)
    write_profile(report, tmp_path)


def test_engine_and_trainer_are_counted_once_each():
    policy = embedded()
    engine, profile = RoundedCopy(policy, "bfloat16").policy, Profile()
    profile.attach(policy, engine)
    batch = prepare(random_groups(policy, groups=1), context=policy.context)
    (row,) = pack([s for own in batch.samples for s in own], 10_000)
    tokens, positions = torch.arange(6, 10)[None], torch.arange(4)[None]
    with timing(profile.clock), span("step"), torch.no_grad():
        policy.logprobs(row)
        with span("sampling"):
            engine.backbone(input_ids=tokens, position_ids=positions, use_cache=False)
    sizes = Flops.of(policy)
    assert profile.clock.counts["forward", "float32"] == sizes.forward(row.positions)
    assert profile.clock.counts["sampling", "bfloat16"] == sizes.forward(positions)
    assert profile.clock.counts["backward", "float32"] == 0


def test_the_peak_is_a_rate_of_products():
    rate = peak_flops(torch.float32, torch.device("cpu"), seconds=0.0)
    assert 1e7 < rate < 1e15
