"""Stored batches give back what was trained on, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from openai.types.chat.chat_completion import Choice

from gspo import LocalBackend, TrainableModel, TrajectoryGroup, dev
from gspo.backend.run import Run
from gspo.backend.stored_batch import StoredBatch, UpdateRecord, read_batch, write_batch
from gspo.config import TrainConfig
from gspo.core.errors import RunError
from gspo.data.check import plain_groups
from gspo.data.expert_choices import encode_expert_choices
from gspo.data.sample import Sample, trajectory_samples
from gspo.train.settings import resolve
from gspo.trajectories import History
from support import choice, trajectory

SETTINGS = resolve(
    TrainConfig(learning_rate=1e-4, kl_penalty_coef=0.5),
    dev.TrainConfig(algorithm="dapo", epsilon_high=0.3, adam_betas=(0.8, 0.9)),
)
RECORD = UpdateRecord.of(SETTINGS, version=7, context=99, dtype="float32")


@pytest.fixture
def run(tmp_path: Path):
    run = Run(tmp_path, "p", "m", {"base_model": "embedded:sort"})
    yield run
    run.close()


def stored_again(run: Run, groups: list[TrajectoryGroup]) -> StoredBatch:
    path = run.trajectories("train", 1)
    write_batch(path, plain_groups(groups), record=RECORD)
    return read_batch(path)


def routes(*shape: int) -> dict[str, Any]:
    rng = np.random.default_rng(len(shape))
    return encode_expert_choices(rng.integers(0, 8, shape).astype(np.uint8))


def openai_choice(tokens: list[int], logprobs: list[float]) -> Choice:
    """Log-probs in OpenAI's own field, and no version, as another engine returns them."""
    content = [
        {"token": str(t), "logprob": p, "bytes": None, "top_logprobs": []}
        for t, p in zip(tokens, logprobs, strict=True)
    ]
    extra = {"token_logprobs": None, "policy_version": None, "logprobs": {"content": content}}
    return Choice.model_validate(choice(tokens).model_dump() | extra)


def groups() -> list[TrajectoryGroup]:
    first = choice([4, 5], (1, 2), [-0.1, -1 / 3], temperature=0.7, finish_reason="length")
    extends = choice([9], (1, 2, 4, 5, 8), [-2.7182817], temperature=1.3, policy_version=3)
    breaks = choice([7, 7], (1, 8), [-0.25, -1e-7], policy_versions=[3, 4], altered_by=["top_p"])
    several = trajectory(0.1)
    several.tools = [{"type": "function", "function": {"name": "add"}}]
    several.additional_histories = [
        History(messages_and_choices=[{"role": "user", "content": "sub"}, choice([6], (1, 2, 3))]),
        History(messages_and_choices=[choice([5], (9,), [-0.3])], tools=several.tools),
    ]
    return [
        TrajectoryGroup([trajectory(1.0, first, extends, breaks), several]),
        TrajectoryGroup(
            [
                trajectory(1 / 3, choice([3], routed_experts=routes(3, 2, 2))),
                trajectory(0.0, openai_choice([4, 6], [-0.5, -0.75])),
            ]
        ),
    ]


def samples(groups: list[TrajectoryGroup]) -> list[Sample]:
    flat = [(g, t) for g, group in enumerate(groups) for t in group]
    out = [
        trajectory_samples(t, trajectory_id=i, group_id=g, advantage=t.reward)
        for i, (g, t) in enumerate(flat)
    ]
    return [sample for own in out for sample in own]


def assert_same(a: Sample, b: Sample) -> None:
    for field in dataclasses.fields(Sample):
        one, two = getattr(a, field.name), getattr(b, field.name)
        assert type(one) is type(two), field.name
        if isinstance(one, np.ndarray):
            assert one.dtype == two.dtype, field.name
            np.testing.assert_array_equal(one, two, err_msg=field.name)
        else:
            assert one == two, field.name


def test_samples_come_back_bit_for_bit(run: Run):
    stored = stored_again(run, groups())
    before, after = samples(groups()), samples(stored.groups)
    assert len(before) == len(after) == 7
    assert any(sample.expert_choices is not None for sample in before)
    assert any(sample.altered_by for sample in before)
    assert len({float(t) for s in before for t in s.temperatures}) == 3
    for a, b in zip(before, after, strict=True):
        assert_same(a, b)


def test_messages_metrics_and_finish_reasons_come_back(run: Run):
    before = groups()
    before[0].trajectories[0].metrics["acc"] = 0.5
    before[0].trajectories[0].metadata["answer"] = "12"
    stored = stored_again(run, before)
    for a, b in zip(before, stored.groups, strict=True):
        for one, two in zip(a, b, strict=True):
            for a_history, b_history in zip(one.histories(), two.histories(), strict=True):
                assert a_history.messages() == b_history.messages()
                assert a_history.tools == b_history.tools
            assert (one.reward, one.metrics, one.metadata) == (
                two.reward,
                two.metrics,
                two.metadata,
            )
            reasons = [[c.finish_reason for c in t.choices()] for t in (one, two)]
            assert reasons[0] == reasons[1]


def test_the_record_gives_the_settings_back(run: Run):
    record = stored_again(run, groups()).record
    assert record == RECORD
    assert record.settings() == SETTINGS
    other = record.settings(algorithm="gspo", epsilon_high=None)
    assert (other.algorithm, other.objective.epsilon_high) == ("gspo", 4e-4)
    assert other.objective.kl_coef == 0.5
    assert other.adam_betas == (0.8, 0.9)


async def test_a_trained_batch_comes_back(tmp_path: Path):
    backend = LocalBackend(tmp_path)
    model = TrainableModel(name="m", project="p", base_model="embedded:sort")
    await model.register(backend)

    async def roll(text: str) -> Choice:
        answer = await model.openai_client().chat.completions.create(
            model=model.inference_name,
            messages=[{"role": "user", "content": text}],
            max_tokens=6,
            temperature=0.9,
            extra_body={"return_routes": True},
        )
        return answer.choices[0]

    before = [
        TrajectoryGroup([trajectory(r, await roll(text)) for r in (0.0, 1.0)])
        for text in ("31", "2718")
    ]
    await model.train(before, _config=dev.TrainConfig(minibatches=1))
    await backend.close()
    stored = read_batch(tmp_path / "p/m/trajectories/train/0001.parquet")
    assert stored.record.policy_version == 0
    # The learning rate was left to gspo, and with it the warmup.
    assert stored.record.options == {"minibatches": 1, "lr_warmup_steps": 5}
    assert stored.record.learning_rate == 1.5e-4
    for a, b in zip(samples(before), samples(stored.groups), strict=True):
        assert a.expert_choices is not None
        assert_same(a, b)


def test_what_cannot_be_replayed_is_refused(run: Run, tmp_path: Path):
    with pytest.raises(RunError, match=r"cannot read the rollout batch .*0009\.parquet"):
        read_batch(run.folder / "trajectories" / "train" / "0009.parquet")
    path = run.trajectories("val", 1)
    write_batch(path, plain_groups(groups()))
    with pytest.raises(RunError, match="older gspo, or was only logged"):
        read_batch(path)
    path = run.trajectories("train", 1)
    write_batch(path, plain_groups(groups()), record=RECORD)
    old = pq.read_table(path).drop_columns(["prompt_token_ids", "routes"])
    pq.write_table(old, path)
    with pytest.raises(RunError, match="older gspo, or was only logged"):
        read_batch(path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(RunError, match="cannot read the rollout batch"):
        read_batch(path)


def test_a_message_that_lost_its_tokens_is_named(run: Run):
    path = run.trajectories("train", 1)
    write_batch(path, plain_groups(groups()), record=RECORD)
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[2]["messages"] = json.dumps([{"role": "user", "content": "?"}])
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    with pytest.raises(RunError, match=r"group 1, trajectory 0 has 0 sampled messages"):
        read_batch(path)


def test_routes_that_no_training_would_take_are_stored_as_none(run: Run):
    group = TrajectoryGroup([trajectory(0.0, choice([3], routed_experts="garbage"))])
    path = run.trajectories("val", 1)
    write_batch(path, [group])
    assert pq.read_table(path).to_pylist()[0]["routes"] is None


def test_a_none_that_was_chosen_is_read_back(tmp_path: Path):
    options = dev.TrainConfig(max_grad_norm="off", epsilon=0.1)  # pyright: ignore[reportArgumentType]
    record = UpdateRecord.of(resolve(options=options), version=0, context=8, dtype="float32")
    path = tmp_path / "0001.parquet"
    write_batch(path, plain_groups(groups()), record=record)
    back = read_batch(path).record.settings()
    assert back.max_grad_norm is None
    assert record.settings(epsilon=None).objective.epsilon_low == 3e-4  # a change that drops one


DUMPED = dev.TrainConfig(algorithm="cispo").model_dump()


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": "auto", "epsilon_high": None},
        {"algorithm": "cispo", "epsilon": None},
        {"old_logprobs": "trainer", "correction": "sequence_product_truncate"}
        | {"correction_low": None},
        {"algorithm": "rloo", "scale_rewards": None},
        DUMPED,
    ],
    ids=lambda options: ", ".join(list(options)[:3]),
)
def test_an_option_that_was_given_as_none_comes_back_as_none(options: dict):
    settings = resolve(options=dev.TrainConfig(**options))
    record = UpdateRecord.of(settings, version=0, context=8, dtype="float32")
    assert record.settings().as_config() == settings.as_config()


def test_another_method_has_its_own_defaults_even_if_all_options_were_given():
    settings = resolve(options=dev.TrainConfig(**dev.TrainConfig().model_dump()))
    record = UpdateRecord.of(settings, version=0, context=8, dtype="float32")
    for name in ("dapo", "dr_grpo", "rloo"):
        other = resolve(options=dev.TrainConfig(algorithm=name))
        assert record.settings(algorithm=name).preset == other.preset


def test_turn_rewards_and_advantages_are_columns_and_rewards_come_back(tmp_path: Path):
    one, other = (trajectory(r, choice([4]), choice([5], [1, 2])) for r in (0.0, 1.0))
    one.turn_rewards = [0.25, -1.0]
    path = tmp_path / "0001.parquet"
    group = TrajectoryGroup([one, other])
    write_batch(path, [group], record=RECORD, turn_advantages={0: (1.5, -0.5)})
    rows = pq.read_table(path).to_pylist()
    assert [row["turn_rewards"] for row in rows] == [[0.25, -1.0], None]
    assert [row["turn_advantages"] for row in rows] == [[1.5, -0.5], None]
    assert [t.turn_rewards for t in read_batch(path).groups[0]] == [[0.25, -1.0], None]
