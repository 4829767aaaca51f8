"""The embedded engine: its log-probs are the trainer's, and nothing depends on the batch."""

from __future__ import annotations

import functools

import pytest
import torch

from gspo import dev
from gspo.core.errors import RequestError
from gspo.data.packing import pack
from gspo.data.sample import trajectory_samples
from gspo.kernels import kv_cache
from gspo.policy.load import Policy
from gspo.serve import torch_engine
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.serve.verbatim import chat_tokens
from support import choice, embedded, trajectory


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


@pytest.fixture
def engine(policy: Policy) -> TorchEngine:
    return TorchEngine(policy)


def chat(engine: TorchEngine, text: str) -> tuple[int, ...]:
    return tuple(chat_tokens(engine, [{"role": "user", "content": text}]))


def requests(engine: TorchEngine, **params) -> list[Request]:
    texts = ["918273645546", "12", "0000", "987654321098"]
    return [Request(chat(engine, t), SamplingParams(**params)) for t in texts]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("packing", ["tiles", "mask", "single"])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_logprobs_are_the_trainers(policy: Policy, engine, temperature, packing, budget):
    asked = requests(engine, n=5, max_tokens=40, temperature=temperature, seed=1)
    policy.packing = packing
    items = [
        trajectory_samples(
            trajectory(0.0, choice(c.token_ids, r.prompt, c.logprobs, temperature=c.temperature)),
            trajectory_id=5 * i + j,
        )[0]
        for i, (r, done) in enumerate(zip(asked, engine.generate(asked), strict=True))
        for j, c in enumerate(done)
    ]
    with torch.no_grad():
        for microbatch in pack(items, budget):
            error = (policy.logprobs(microbatch).logprobs - microbatch.old_logprobs).abs().max()
            assert error < 1e-4
    policy.packing = "tiles"


def test_a_completion_does_not_depend_on_its_batch(
    policy: Policy, engine: TorchEngine, monkeypatch
):
    asked = requests(engine, n=3, max_tokens=30, seed=5)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked]
    monkeypatch.setattr(engine, "max_running", 2)
    in_turns = engine.generate(asked)
    for a, b, c in zip(together, alone, in_turns, strict=True):
        assert [x.token_ids for x in a] == [x.token_ids for x in b] == [x.token_ids for x in c]


def test_seeded_requests_repeat_and_unseeded_ones_do_not(engine: TorchEngine):
    request = Request(chat(engine, "12"), SamplingParams(n=4, max_tokens=20, temperature=2.0))
    first, second = engine.generate([request]), engine.generate([request])
    assert first != second
    engine.reseed(0)
    assert engine.generate([request]) == first


def test_an_unseeded_request_does_not_depend_on_other_requests(engine: TorchEngine):
    params = SamplingParams(n=2, max_tokens=20, temperature=2.0)
    asked = [Request(chat(engine, text), params) for text in ("12", "345")]

    def draw(*requests: Request) -> list[list[tuple[int, ...]]]:
        return [[c.token_ids for c in done] for done in engine.generate(requests)]

    engine.reseed(0)
    one, other = draw(*asked)
    engine.reseed(0)
    assert draw(asked[1]) == [other]
    assert draw(asked[0]) == [one]
    assert draw(asked[0]) != [one]


def test_unseeded_draws_differ_by_what_they_are_for(engine: TorchEngine):
    def draw(purpose: tuple[int | str, ...], seed: int = 0):
        engine.reseed(seed)
        params = SamplingParams(n=4, max_tokens=20, temperature=2.0, purpose=purpose)
        return engine.generate([Request(chat(engine, "12"), params)])

    assert draw(("train", 1, 0)) == draw(("train", 1, 0))
    others = [draw(("train", 1, 1)), draw(("heldout", 1, 0)), draw((), 0), draw(("train", 1, 0), 1)]
    assert all(other != draw(("train", 1, 0)) for other in others)


def test_a_server_does_not_count_repetitions_for_ever(engine: TorchEngine, monkeypatch):
    monkeypatch.setattr(torch_engine, "_REMEMBERED", 4)
    engine.reseed(0)
    for text in "0123456789":
        engine.generate([Request(chat(engine, text), SamplingParams(max_tokens=2))])
    assert 0 < len(engine._drawn) <= 4


def test_the_completions_of_a_prompt_differ(engine: TorchEngine):
    params = SamplingParams(n=8, max_tokens=20, temperature=2.0, seed=3)
    done = engine.generate([Request(chat(engine, "12"), params)])[0]
    assert len({c.token_ids for c in done}) > 4


def test_greedy_equals_the_models_own_argmax(policy: Policy, engine: TorchEngine):
    prompt = chat(engine, "918273645546")
    done = engine.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=10))])[0][0]
    tokens = list(prompt)
    with torch.no_grad():
        for token in done.token_ids:
            logits = policy.lm(torch.tensor([tokens])).logits[0, -1]
            assert int(logits.argmax()) == token
            tokens.append(token)
    assert done.temperature == 1.0


def test_a_prompt_is_computed_once_for_its_completions(engine: TorchEngine, monkeypatch):
    seen: list[tuple[int, ...]] = []
    backbone = type(engine.policy.backbone)
    own = backbone.forward

    @functools.wraps(own)
    def counted(self, *args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(backbone, "forward", counted)
    prompt = chat(engine, "918273645546")
    engine.generate([Request(prompt, SamplingParams(n=16, max_tokens=4, seed=0))] * 2)
    assert seen[0] == (1, len(prompt))
    assert seen[1] == (1, 32)


@pytest.fixture
def fed(engine: TorchEngine, monkeypatch) -> list[int]:
    """Rows of each decoding pass."""
    seen: list[int] = []
    for kind in (kv_cache.SharedPrompts, kv_cache.ModelCache):

        def counted(self, tokens, own=kind.advance):
            seen.append(len(tokens))
            return own(self, tokens)

        monkeypatch.setattr(kind, "advance", counted)
    return seen


def lasting(engine: TorchEngine, lengths: list[int], **params) -> list[Request]:
    """One request for each length, at different prompts, which no end token ends before."""
    texts = ["918273645546", "12", "0000", "987654321098"]
    return [
        Request(
            chat(engine, texts[i % 4]),
            SamplingParams(max_tokens=n, seed=i, ignore_eos=True, **params),
        )
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("packing", ["tiles", "mask"])
def test_finished_rows_leave_the_batch(policy: Policy, engine: TorchEngine, fed, packing):
    policy.packing = packing
    done = engine.generate(lasting(engine, [2, 9, 5]))
    policy.packing = "tiles"
    assert fed == [3, 2, 2, 2, 1, 1, 1, 1]
    assert [len(own[0].token_ids) for own in done] == [2, 9, 5]


def test_a_few_finished_rows_are_carried_along(engine: TorchEngine, fed):
    """Dropping a row copies the keys of all others."""
    done = engine.generate(lasting(engine, [3] + [9] * 15))
    assert fed == [16] * 8
    assert [len(own[0].token_ids) for own in done] == [3] + [9] * 15


def test_a_finished_rows_place_is_taken_at_once(engine: TorchEngine, fed, monkeypatch):
    asked = lasting(engine, [2, 9, 5, 7, 30, 3, 4, 1, 12])
    expected = engine.generate(asked)
    fed.clear()
    monkeypatch.setattr(engine, "max_running", 3)
    found = engine.generate(asked)
    assert max(fed) == 3
    assert len(fed) < 36  # in turns of three at a time: 8 + 29 + 11 passes, at least
    for one, other in zip(expected, found, strict=True):
        assert one[0].token_ids == other[0].token_ids
        assert one[0].logprobs == pytest.approx(other[0].logprobs, abs=1e-5)


def test_rows_that_join_see_their_own_prompt_alone(policy: Policy, engine, monkeypatch):
    """Against the trainer's forward pass, through joins, drops and a slab that grows."""
    monkeypatch.setattr(kv_cache, "FIRST_COLUMNS", 2)
    monkeypatch.setattr(engine, "max_running", 4)
    asked = lasting(engine, [6, 17, 3, 9, 25, 1, 8, 14, 2, 11], n=2)
    done = engine.generate(asked)
    for i, (request, own) in enumerate(zip(asked, done, strict=True)):
        for c in own:
            item = trajectory_samples(
                trajectory(0.0, choice(c.token_ids, request.prompt, c.logprobs)), trajectory_id=i
            )[0]
            with torch.no_grad():
                got = policy.logprobs(pack([item], 1)[0]).logprobs
            torch.testing.assert_close(got, torch.tensor(c.logprobs), atol=1e-4, rtol=0)


def test_end_token_stops_and_is_part_of_the_completion(engine: TorchEngine):
    done = engine.generate(
        [Request(chat(engine, "918273645546"), SamplingParams(temperature=0, max_tokens=30))]
    )[0][0]
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] == engine.policy.tokenizer.eos_token_id
    assert len(done.token_ids) == len(done.logprobs) == len(done.text) + 1


def test_an_ignored_end_token_is_a_token_like_others(engine: TorchEngine):
    prompt = chat(engine, "918273645546")
    params = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=on) for on in (False, True)]
    stops, goes_on = (own[0] for own in engine.generate([Request(prompt, p) for p in params]))
    assert stops.finish_reason == "stop"
    assert goes_on.finish_reason == "length"
    assert goes_on.token_ids[: len(stops.token_ids)] == stops.token_ids


def test_max_tokens_is_a_length_stop(engine: TorchEngine):
    done = engine.generate([Request(chat(engine, "918273645546"), SamplingParams(max_tokens=3))])
    assert done[0][0].finish_reason == "length"
    assert len(done[0][0].token_ids) == 3


def test_stop_text_is_cut_from_the_text_but_not_from_the_tokens(engine: TorchEngine):
    params = SamplingParams(temperature=0, max_tokens=30)
    prompt = chat(engine, "918273645546")
    whole = engine.generate([Request(prompt, params)])[0][0]
    stop = whole.text[3:5]
    params = SamplingParams(temperature=0, max_tokens=30, stop=(stop,))
    cut = engine.generate([Request(prompt, params)])[0][0]
    at = whole.text.index(stop)
    assert cut.text == whole.text[:at]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: at + 2]


def test_what_does_not_fit_is_refused(engine: TorchEngine):
    with pytest.raises(RequestError, match="context is 512"):
        engine.generate([Request(tuple([9] * 500), SamplingParams(max_tokens=13))])
    with pytest.raises(RequestError, match="empty"):
        engine.generate([Request((), SamplingParams())])
    for token in (-1, engine.policy.head.size, 10**30):
        with pytest.raises(
            RequestError, match=rf"vocabulary is 0\.\.{engine.policy.head.size - 1}"
        ):
            engine.generate([Request((9, token, 9))])
    full = engine.generate([Request(tuple([9] * 510), SamplingParams(seed=0))])[0][0]
    assert len(full.token_ids) <= 2


def test_a_long_completion_outgrows_its_first_slab(policy: Policy, engine, monkeypatch):
    asked = requests(engine, n=2, max_tokens=30, seed=2, temperature=3.0)
    expected = engine.generate(asked)
    monkeypatch.setattr(kv_cache, "FIRST_COLUMNS", 3)
    assert engine.generate(asked) == expected


def test_lora_weights_are_sampled_from():
    policy = embedded(lora=dev.LoraConfig(r=2))
    engine = TorchEngine(policy)
    request = Request(chat(engine, "918273645546"), SamplingParams(max_tokens=5, seed=0))
    before = engine.generate([request])[0][0]
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after: Completion = engine.generate([request])[0][0]
    assert before.logprobs != after.logprobs
