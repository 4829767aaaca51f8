"""What the parts of the GPU suite count, and how a machine without gspo gets its packages."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import gpu_wheels
import pytest
import torch
from gpu_parts import bare, bench, correctness, decoding, head, models
from gpu_parts.bench import Bench, Card, card
from gpu_parts.profiling import Event, counted, host_share, precision
from transformers import AutoModelForCausalLM

from gspo.data.packing import pack
from gspo.kernels.split_projection import split_product
from gspo.weights.rollout_copy import RoundedCopy

CPU = card(tiny=True)


def test_doctests() -> None:
    assert doctest.testmod(bench).failed == 0


def test_full_sizes_are_those_that_the_page_names() -> None:
    with torch.device("meta"):
        for config, low, high in ((models.dense(), 0.48e9, 0.5e9), (models.moe(), 0.9e9, 1.0e9)):
            lm = AutoModelForCausalLM.from_config(config)
            assert low < sum(p.numel() for p in lm.parameters()) < high
    heads = ("num_attention_heads", "num_key_value_heads")
    assert all(getattr(models.dense(), h) == getattr(models.moe(), h) for h in heads)


@pytest.mark.parametrize("make", [models.dense, models.moe])
def test_a_drawn_model_is_the_one_that_loads_from_a_folder(make: Any, tmp_path: Path) -> None:
    from gspo.dev import InternalModelConfig
    from gspo.policy.load import load_policy, save_weights
    from gspo.policy.probe import choose_packing

    drawn = models.policy_of(make(tiny=True), CPU)
    again = models.policy_of(make(tiny=True), CPU)
    save_weights(drawn, tmp_path)
    loaded = load_policy(str(tmp_path), InternalModelConfig(dtype="bfloat16", device="cpu"))
    choose_packing(loaded)
    for other in (again, loaded):
        assert other.packing == drawn.packing and other.dtype == torch.bfloat16
        for (name, one), (same, two) in zip(
            drawn.lm.named_parameters(), other.lm.named_parameters(), strict=True
        ):
            assert name == same and torch.equal(one, two)
    for name in ("_attn_implementation", "_experts_implementation"):
        assert getattr(drawn.lm.config, name) == getattr(loaded.lm.config, name)


def test_operations_of_a_shared_prompt_count_once() -> None:
    policy = models.policy_of(models.dense(tiny=True), CPU)
    batch = models.make_batch(policy, groups=1, size=2, prompt=16, completion=8)
    samples = [sample for own in batch.samples for sample in own]
    shared, apart = (
        models.step_flops(policy, pack(samples, 1000, share=share)) for share in (True, False)
    )
    assert shared["head"] == apart["head"]
    assert shared["layers"] < 0.75 * apart["layers"]


def test_checkpointing_costs_time_and_adds_no_operation_that_is_needed() -> None:
    found = []
    for options in ({}, {"activation_checkpointing": True}):
        policy = models.policy_of(models.dense(tiny=True), CPU, **options)
        assert policy.checkpointing == bool(options)
        batch = models.make_batch(policy, groups=2, size=1, prompt=4, completion=8)
        microbatches = pack([sample for own in batch.samples for sample in own], 1000)
        found.append(models.step_flops(policy, microbatches))
    assert found[0] == found[1]


def test_kernels_launches_and_waits_are_counted_apart() -> None:
    events = [
        Event("gemm", True, 0.5),
        Event("gemm", True, 0.25),
        Event("norm", True, 0.25),
        Event("Memcpy DtoH (Device -> Pageable)", True, 9.0),
        Event("cudaLaunchKernel", False, 0.1),
        Event("cudaLaunchKernel", False, 0.1),
        Event("cuLaunchKernelEx", False, 0.1),
        Event("cudaStreamSynchronize", False, 0.4),
        Event("cudaMalloc", False, 0.1),
    ]
    assert counted(events, on_gpu=True, per=2) == {
        "kernels": 1.5,
        "kernels_s": 0.5,
        "copies": {"Memcpy DtoH (Device -> Pageable)": 0.5},
        "launches": {"cudaLaunchKernel": 1.0, "cuLaunchKernelEx": 0.5},
        "waits": {"cudaStreamSynchronize": 0.5},
        "top": [["gemm", 0.375, 1.0], ["norm", 0.125, 0.5]],
    }
    assert host_share({"kernels_s": 0.5}, 2.0) == 0.75
    assert host_share({"kernels_s": None}, 2.0) is None


def test_the_precision_is_put_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="no"), precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise ValueError("no")
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_floor_of_decoding_follows_the_rows_that_ran() -> None:
    policy = RoundedCopy(models.policy_of(models.dense(tiny=True), CPU), "bfloat16").policy
    weights = 2 * sum(p.numel() for p in policy.lm.parameters())
    config = policy.lm.config
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * 8  # heads of 8

    def floor(running: list[int], rows: int) -> float:
        return decoding._floor_bytes(policy, running, rows, prompt=5, length=4)

    assert floor([8, 8, 8], rows=8) == 3 * (weights + 5 * token) + 8 * (1 + 2 + 3) * token
    # 16 rows in two waves: the weights once more for each position of the second.
    one, two = floor([16] * 3, rows=16), floor([8] * 6, rows=16)
    assert two - one == 3 * weights


def test_packed_rows_that_are_wrong_are_told() -> None:
    policy = models.policy_of(models.dense(tiny=True), CPU, dtype="float32")
    samples = correctness._samples(Bench(CPU, tiny=True), policy)
    expected = correctness.plain(policy, samples)
    good = correctness.differences(correctness.packed(policy, samples, True), expected, samples)
    assert good["token_max"] < correctness.TOKEN and good["gradient_max"] < correctness.GRADIENT
    moved = expected._replace(logprobs=expected.logprobs + 0.01)
    off = correctness.differences(moved, expected, samples)
    assert off["token_max"] == pytest.approx(0.01, rel=1e-3) == off["sequence_max"]
    turned = {name: -own for name, own in expected.gradient.items()}
    off = correctness.differences(expected._replace(gradient=turned), expected, samples)
    assert (off["gradient_max"], off["gradient_norm"]) == (2, 2)


def test_three_products_are_nearly_those_of_float32() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 64, generator=rng), torch.randn(30, 64, generator=rng)
    exact = a.double() @ b.double().t()
    once, thrice = ((f(a, b) - exact).abs().max() for f in (head.once, split_product))
    assert thrice < 1e-2 * once < 1e-2


def test_a_peer_whose_numbers_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(given: head.Inputs) -> head.Outcome:
        return head.logprob.ours(given._replace(coefficients=-given.coefficients))

    with pytest.raises(AssertionError, match="d_hidden is off by 2"):
        head._beside(Bench(CPU, tiny=True), True, wrong, None)


def test_times_are_of_the_work_without_the_warm_up_and_stop_with_the_time(tmp_path: Path) -> None:
    calls: list[int] = []
    times = Bench(CPU, seconds=60).time(lambda: calls.append(1), repeats=3, warmup=2)
    assert (len(calls), times["repeats"]) == (5, 3)
    assert times["spread_s"][0] <= times["median_s"] <= times["spread_s"][1]
    calls.clear()
    # No second repeat has room: one is there all the same.
    assert Bench(CPU, seconds=0).time(lambda: calls.append(1), repeats=9)["repeats"] == 1
    assert len(calls) == 2


def test_a_file_is_valid_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    own = Bench(CPU, tmp_path / "a" / "part.json", {"part": "a"}, say=lambda _: None)
    with own.row("odd") as row:
        row |= {"nan": math.nan, "large": 1.23456789e12, "inside": {"inf": math.inf}}
    stored = json.loads((tmp_path / "a" / "part.json").read_text())
    assert stored["rows"] == [
        {"what": "odd", "nan": "nan", "large": 1.23457e12, "inside": {"inf": "inf"}}
    ]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["part.json"]


@pytest.mark.parametrize(
    ("name", "flops"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA X1", None)]
)
def test_a_card_without_a_data_sheet_is_measured_without_shares(
    name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    assert (card().name, card().flops) == (name, flops)


def wheel(folder: Path, name: str) -> None:
    """A wheel of one module that says where it is from."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "HERE = __file__\n")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )


def test_wheels_of_what_is_missing_are_unpacked_and_others_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("gspo_test_carried", "torch"):
        wheel(tmp_path, name)
    assert bare.prepare(tmp_path, ["gspo_test_carried"]) == [
        "gspo_test_carried-1.0-py3-none-any.whl"
    ]
    module = importlib.import_module("gspo_test_carried")
    assert "gspo-wheels-" in module.HERE
    assert torch.__version__ != "1.0"


def test_what_is_missing_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"gspo_no_such cannot be imported.*make gpu-wheels"):
        bare.prepare(tmp_path, ["gspo_no_such"])


def test_wheels_are_what_gspo_needs_less_what_is_there() -> None:
    found = gpu_wheels.needed()
    assert {"openai", "fastapi", "uvicorn", "pydantic", "pydantic-core", "jiter"} <= set(found)
    assert not {"gspo", "torch", "transformers", "numpy", "pytest"} & set(found)
    # With nothing there, what these need is followed too; a package that is there hides its own.
    assert {"numpy", "anyio"} <= set(gpu_wheels.needed(there={"torch", "transformers"}))


def test_on_a_card_bytes_are_read_from_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 3)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 10)
    assert Card("a card", "cuda", None, None).memory() == {"now": 3, "peak": 10}
    assert CPU.memory() == {"now": None, "peak": None}
