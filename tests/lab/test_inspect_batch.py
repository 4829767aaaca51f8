"""`gspo inspect`: its numbers are those that training logged, at whichever weights are on disk."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo import LocalBackend, TrainableModel, TrajectoryGroup, dev
from gspo.config import TrainConfig
from gspo.core.errors import ConfigError, RunError
from gspo.lab import inspect_batch
from gspo.lab.inspect_batch import OWN, inspect_run, make_methods, render
from gspo.lab.pictures import draw_inspection
from gspo.lab.stored_step import StoredStep
from gspo.objective import PRESETS
from lab.written import as_object
from support import trajectory

RATE = TrainConfig(learning_rate=1e-3)
SEED = 210
"""One with which the completions of each group differ, though the model is sure of most."""


async def a_run(path: Path, *, steps: int = 2, load: dict[str, Any] | None = None, **options: Any):
    """Steps of one minibatch on sampled digits; the first group's rewards are all equal."""
    routes = options.pop("routes", False)
    keep = options.pop("keep_checkpoints", None)
    backend = LocalBackend(path, keep_checkpoints=keep)
    config = dev.InternalModelConfig(**load or {})
    model = TrainableModel(
        name="m", project="p", base_model="embedded:sort", _internal_config=config
    )
    await model.register(backend)
    rate = RATE.model_copy(update={"kl_penalty_coef": options.pop("kl", 0.0)})
    given: dict[str, Any] = {"minibatches": 1, **options}
    for step in range(steps):
        groups = []
        for number, text in enumerate(("918273", "20715", "5544")):
            answer = await model.openai_client().chat.completions.create(
                model=model.inference_name,
                messages=[{"role": "user", "content": f"{text}{step}"}],
                max_tokens=8,
                n=4,
                seed=SEED + 10 * step + number,
                extra_body={"return_routes": True} if routes else None,
            )
            rewards = [(number > 0) * (i + step) % 4 / 3 for i in range(4)]
            pairs = zip(rewards, answer.choices, strict=True)
            groups.append(TrajectoryGroup([trajectory(r, c) for r, c in pairs]))
        await model.train(groups, rate, dev.TrainConfig(**given))
    await backend.close()
    return path / "p" / "m"


def logged(run: Path, step: int) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == step)


def own(at: Any) -> Any:
    return at.methods[0]


def assert_as_logged(found: Any, metrics: dict[str, float]) -> None:
    """At the weights before, the run's own method is what the one optimizer step computed."""
    (before,) = found.at
    method = own(before)
    assert method.loss == pytest.approx(metrics["loss/policy"], rel=1e-4, abs=2e-7)
    assert method.kl == pytest.approx(metrics["loss/kl"], rel=1e-4, abs=1e-7)
    assert method.grad_norm == pytest.approx(metrics["optim/grad_norm"], rel=1e-4)
    assert method.clip_fraction == pytest.approx(metrics["ratio/clip_fraction"])
    assert method.clip_fraction_tokens == pytest.approx(metrics["ratio/clip_fraction_tokens"])
    assert found.tokens == metrics["tokens/completion"]
    assert found.flat_groups == metrics["train/groups_zero_advantage"] == 1
    assert before.log_ratio is not None
    assert before.log_ratio.mean == pytest.approx(metrics["ratio/log_mean"], rel=1e-3, abs=1e-7)


def before(run: Path, step: int = 2, presets: tuple[str, ...] = ("gspo",)) -> Any:
    return as_object(inspect_run(run, step, "before", presets))


VARIANTS: dict[str, dict[str, Any]] = {
    "gspo": {},
    "grpo": {"algorithm": "grpo"},
    "dapo": {"algorithm": "dapo"},
    "rloo": {"algorithm": "rloo"},
    "reinforce": {"algorithm": "reinforce"},
    "kl": {"kl": 0.2},
    "turn": {"sequence_unit": "turn", "importance_sampling_level": "sequence_token"},
    "overlong": {"overlong_max_tokens": 8, "overlong_cache": 4, "epsilon": 0.1},
    "trainer": {"old_logprobs": "trainer", "load": {"rollout_dtype": "int4"}},
    "quantized": {"load": {"rollout_dtype": "int4"}},
    "correction": {
        "old_logprobs": "trainer",
        "correction": "sequence_geometric_truncate",
        "load": {"rollout_dtype": "int4"},
    },
    "replay": {"routing_replay": "rollout", "routes": True, "load": {"rollout_dtype": "int4"}},
    "old_policy": {"routing_replay": "old_policy"},
    "bfloat16": {"load": {"dtype": "bfloat16"}, "share_prefixes": False},
    "recompute": {"load": {"activation_checkpointing": True}},
}


FROM_THE_BASE = ("gspo", "kl", "trainer", "replay", "old_policy", "bfloat16")
"""Variants whose first step is looked at too: from the base model, not from a checkpoint."""


SLOW = {"grpo", "rloo", "quantized"}
"""Variants that others stand for: a preset as `dapo` and `reinforce` are, and an engine in int4,
which `trainer`, `correction` and `replay` have."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in VARIANTS],
)
async def test_before_the_step_it_is_what_training_logged(tmp_path: Path, name: str):
    options = VARIANTS[name]
    run = await a_run(tmp_path, **options)
    assert_as_logged(before(run), logged(run, 2))
    if name in FROM_THE_BASE:
        assert_as_logged(before(run, step=1), logged(run, 1))


@pytest.mark.parametrize("kl", [0.0, 0.2])
async def test_with_lora_the_gradient_is_the_adapters(tmp_path: Path, kl: float):
    run = await a_run(tmp_path, load={"lora": {"r": 2}}, kl=kl)
    assert_as_logged(before(run), logged(run, 2))
    assert_as_logged(before(run, step=1), logged(run, 1))


async def test_a_steered_range_is_the_one_that_was_in_force(tmp_path: Path):
    run = await a_run(tmp_path, steps=3, epsilon="auto", minibatches=2)
    found = before(run, step=3)
    metrics = logged(run, 3)
    assert found.own == OWN
    assert own(found.at[0]).epsilon == [metrics["ratio/epsilon_low"], metrics["ratio/epsilon_high"]]
    assert metrics["ratio/epsilon_low"] != 3e-4
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=r"metrics\.jsonl lacks the clip range of step 3"):
        before(run, step=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of two minibatches; nothing of it may be changed."""
    return asyncio.run(a_run(tmp_path_factory.mktemp("run"), steps=3, minibatches=2))


@pytest.fixture(scope="module")
def stored(run: Path) -> dict[str, Any]:
    return inspect_run(run)


@pytest.fixture(scope="module")
def whole(stored: dict[str, Any]) -> Any:
    return as_object(stored)


def named(at: Any) -> dict[str, Any]:
    return {method.name: method for method in at.methods}


def test_all_presets_at_both_weights(whole: Any):
    assert (whole.step, whole.own, whole.trained) == (3, "gspo", 8)
    assert [(at.weights, at.source) for at in whole.at] == [
        ("before", "checkpoint 0002"),
        ("after", "checkpoint 0003"),
    ]
    for at in whole.at:
        methods = named(at)
        assert set(methods) == set(PRESETS)
        for name, method in methods.items():
            objective = PRESETS[name].objective
            if method.epsilon is not None:
                assert method.epsilon == [objective.epsilon_low, objective.epsilon_high]
            assert method.sequences == (12 if PRESETS[name].counts_flat else 8)
            assert method.grad_norm > 0
        assert methods["gspo"].cosine == pytest.approx(1.0, abs=1e-12)
        assert methods["gspo_token"].cosine == pytest.approx(1.0, abs=1e-6)
        size = len(at.methods)
        matrix = torch.tensor(at.cosines)
        torch.testing.assert_close(matrix, matrix.T)
        torch.testing.assert_close(matrix.diag(), torch.ones(size))
        row = [method.cosine for method in at.methods]
        assert row == at.cosines[0]


def test_the_clip_acts_after_the_step_and_not_before(whole: Any):
    before, after = (named(at) for at in whole.at)
    assert all(method.clip_fraction == 0 for method in before.values())
    # At ratio 1 these differ by their weights of sequences alone; the clip tells them apart.
    assert before["grpo"].cosine == pytest.approx(1.0, abs=1e-4)
    assert after["gspo"].clip_fraction > 0.2 > after["gmpo"].clip_fraction
    assert after["gspo"].clip_fraction > after["grpo"].clip_fraction
    assert after["grpo"].cosine is not None and after["grpo"].cosine < 0.999
    assert after["sapo"].clip_fraction == after["vespo"].clip_fraction == 0
    assert [at.log_ratio is not None and at.log_ratio.std > 1e-4 for at in whole.at] == [
        False,
        True,
    ]


def test_the_run_is_only_read(run: Path, stored: dict[str, Any]):
    files = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    again = inspect_run(run)
    assert again == stored
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == files


def test_some_presets_keep_the_runs_own(run: Path):
    found = before(run, step=1, presets=("dapo", "sapo"))
    assert [method.name for method in found.at[0].methods] == ["gspo", "dapo", "sapo"]
    assert found.at[0].source == "embedded:sort"


def test_a_method_of_ones_own_stands_beside_the_presets(run: Path):
    record = StoredStep(run, 1).record
    other = dataclasses.replace(record, options={"algorithm": "grpo", "epsilon": 0.1})
    methods = make_methods(other, other.settings())
    assert list(methods) == [OWN, *PRESETS]
    assert methods[OWN].objective.epsilon_high == 0.1
    assert methods["grpo"].objective == PRESETS["grpo"].objective
    assert methods["dr_grpo"].preset.advantage == "group_mean"
    plain = dataclasses.replace(record, options={"algorithm": "grpo", "epochs": 2})
    assert next(iter(make_methods(plain, plain.settings()))) == "grpo"
    kl = dataclasses.replace(record, kl_penalty_coef=0.3, options={"old_logprobs": "trainer"})
    methods = make_methods(kl, kl.settings())
    assert next(iter(methods)) == "gspo"
    assert {(s.objective.kl_coef, s.old_logprobs) for s in methods.values()} == {(0.3, "trainer")}


def test_text_json_and_picture(stored: dict[str, Any], tmp_path: Path):
    text = render(stored)
    assert "12 trajectories in 3 groups (1 with equal rewards), 8 with an advantage" in text
    assert "weights before the step (checkpoint 0002)" in text
    assert "its method: gspo (minibatches=2)" in text
    assert "cosines of the gradients" not in text
    assert "cosines of the gradients" in render(stored, matrix=True)
    fields = as_object(stored)
    assert fields.at[1].methods[0].name == "gspo"
    assert len(fields.at[0].cosines) == len(PRESETS)
    path = draw_inspection(stored, tmp_path / "deep" / "a.html")
    assert path.stat().st_size > 20_000


async def test_a_step_without_any_gradient(tmp_path: Path):
    source = await a_run(tmp_path, steps=1)
    table = source / "trajectories" / "train" / "0001.parquet"
    import pyarrow.parquet as pq

    stored = pq.read_table(table)
    rows = [row | {"reward": 0.5} for row in stored.to_pylist()]
    pq.write_table(type(stored).from_pylist(rows, schema=stored.schema), table)
    inspection = inspect_run(source, presets=("gspo", "dapo"))
    found = as_object(inspection)
    assert (found.flat_groups, found.trained) == (3, 0)
    for at in found.at:
        assert at.log_ratio is None
        assert all((m.grad_norm, m.cosine) == (0.0, None) for m in at.methods)
    text = render(inspection)
    assert "0 with an advantage" in text and "cosines of the gradients" in text
    draw_inspection(inspection, tmp_path / "a.html")


async def test_the_balance_loss_is_said_to_be_left_out(tmp_path: Path):
    run = await a_run(tmp_path, steps=1, router_aux_loss_coef=0.01)
    found = inspect_run(run, 1, "before", ("gspo",))
    assert found["left_out"] == ["router_aux_loss_coef=0.01"]
    assert "left out, being the same for every method: router_aux_loss_coef=0.01" in render(found)


async def test_gone_checkpoints_are_named_with_what_is_there(tmp_path: Path):
    run = await a_run(tmp_path, steps=5, keep_checkpoints=2)
    there = r"before: 1, 5; after: 4, 5\. Choose with --step"
    with pytest.raises(RunError, match=rf"step 3 .* weights before it: checkpoint 2 .* {there}"):
        inspect_run(run, number=3)
    with pytest.raises(RunError, match=rf"step 2 .* weights after it: checkpoint 2 .* {there}"):
        inspect_run(run, number=2, weights="after")
    with pytest.raises(RunError, match=rf"step 4 .* weights before it: checkpoint 3 .* {there}"):
        inspect_run(run, number=4)
    found = inspect_run(run, number=4, weights="after", presets=("gspo",))
    assert [at["weights"] for at in found["at"]] == ["after"]
    with pytest.raises(RunError, match="has no batch of step 6: it has those of 1 to 5"):
        inspect_run(run, number=6)


async def test_the_trainers_own_pi_old_needs_the_weights_before(tmp_path: Path):
    run = await a_run(tmp_path, steps=3, keep_checkpoints=2, old_logprobs="trainer")
    found = as_object(inspect_run(run, number=3, presets=("gspo",)))
    assert [at.log_ratio and at.log_ratio.std > 1e-5 for at in found.at] == [False, True]
    with pytest.raises(RunError, match="weights after it: checkpoint 1 is not on disk"):
        inspect_run(run, number=2, weights="after")


def test_gradients_that_do_not_fit_are_refused_before_the_work(run: Path, monkeypatch):
    monkeypatch.setattr(inspect_batch, "free_memory", lambda device: 3_000_000)
    message = r"14 gradients of 1 MiB each don't fit the 3 MiB.*at most 3 methods with --presets"
    with pytest.raises(ConfigError, match=message):
        inspect_run(run)
    assert len(inspect_run(run, presets=("gspo", "dapo"))["at"]) == 2
    monkeypatch.undo()
    free = inspect_batch.free_memory(torch.device("cpu"))
    assert free is None or 10**6 < free < 10**14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "bevore"}, "Did you mean 'before'"),
        ({"presets": ("gspo", "cipso")}, "Did you mean 'cispo'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        inspect_run(Path("x"), **options)


METHOD = {
    "epsilon": (3e-4, 4e-4),
    "sequences": 8,
    "loss": -0.5,
    "kl": 0.0,
    "grad_norm": 0.25,
    "clip_fraction": 0.5,
    "clip_fraction_tokens": 0.125,
    "cosine": None,
}


def inspection(methods: int, **fields: Any) -> dict[str, Any]:
    shown = [METHOD | {"name": f"m{index}"} for index in range(methods)]
    at: dict[str, Any] = {"weights": "after", "source": "checkpoint 0003", "methods": shown}
    at |= {"log_ratio": {"p01": -0.12, "p50": 0.5, "p99": 0.036}}
    at |= {"cosines": [[1.0] * methods for _ in shown]}
    batch = {"run": "run", "step": 3, "own": "m0", "options": {}, "left_out": [], "at": [at]}
    counts = {"trajectories": 12, "groups": 3, "trained": 8, "tokens": 6655}
    return batch | counts | {"dropped": 0, "flat_groups": 0, "splits": {}, "turns": []} | fields


def test_what_the_batch_was_stands_first():
    lines = render(inspection(1)).splitlines()
    assert lines[:2] == [
        "run, step 3: 12 trajectories in 3 groups, 8 with an advantage, 6,655 sampled tokens",
        "its method: m0 (all options at their defaults)",
    ]
    lines = render(
        inspection(
            1,
            dropped=2,
            flat_groups=1,
            splits={"answer": 3},
            left_out=("a=1",),
            options={"epochs": 2, "epsilon": 0.1},
        )
    ).splitlines()
    assert "12 trajectories in 3 groups (1 with equal rewards), 2 too long and dropped" in lines[0]
    assert ", 3 split (answer), " in lines[0]
    assert lines[1] == "its method: m0 (epochs=2, epsilon=0.1)"
    assert lines[2] == "left out, being the same for every method: a=1"


def test_a_row_per_method():
    text = render(inspection(2))
    assert "weights after the step (checkpoint 0003); log-ratios of sequences" in text
    assert ", median [1 %, 99 %]: 0.5 [-0.12, 0.036]" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("  m1"))
    assert row == ["m1", "0.0003/0.0004", "-0.5", "0.25", "0.5", "0.125", "-"]


def test_the_matrix_of_many_methods_is_printed_if_asked_for():
    assert "cosines of the gradients, weights after the step" in render(inspection(6))
    assert "cosines of the gradients" not in render(inspection(7))
    assert "cosines of the gradients" in render(inspection(7), matrix=True)
