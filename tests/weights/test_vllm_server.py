"""What one vLLM server is asked, and when it may be used."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo.core.errors import RequestError, ServeError
from gspo.policy.load import Policy, load_policy, save_weights
from gspo.weights import vllm_process, vllm_server
from gspo.weights.receipt import Probe, score
from gspo.weights.vllm_server import Publication, ServerFault, VllmServer
from vllm_stand_in import PARAMS, StandIn
from vllm_stub import entry, gone, starts


def published(policy: Policy, folder: Path, version: int = 1) -> Publication:
    save_weights(policy, folder)
    probe = torch.arange(20)
    scores = score(policy, Probe(probe, None)).tolist()
    text = f"gspo-{version}"
    return Publication(version, text, folder, probe.tolist(), scores, 1e-4, "float32", 512)


async def sample(server: VllmServer, **params: Any) -> tuple[int, int]:
    """The version of the weights that have sampled, and how many completions they are."""
    weights = server.publication
    assert weights is not None

    def read(answer: Any, version: int) -> tuple[int, int]:
        return version, len(answer["choices"])

    return await server.sample(weights, [1, 2, 3], PARAMS | params, read)


def moved(folder: Path) -> Publication:
    policy = load_policy("embedded:sort")
    with torch.no_grad():
        next(policy.lm.parameters()).mul_(1.01)
    return published(policy, folder)


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    return StandIn("embedded:sort")


@pytest.fixture
def url(stand_in: StandIn) -> Iterator[str]:
    stand_in.faults.clear()
    stand_in.refusals.clear()
    stand_in.asked.clear()
    before, lora = dict(stand_in.config), stand_in.lora
    stand_in.restart()
    with stand_in.listening() as address:
        yield address
    stand_in.config, stand_in.lora = before, lora


def brought(url: str, new: Publication) -> VllmServer:
    async def bring() -> VllmServer:
        server = VllmServer(url, Path("unused"))
        try:
            await server.bring(new)
            return server
        finally:
            await server._http.aclose()

    return asyncio.run(bring())


def test_new_weights_are_loaded_and_proved(url: str, stand_in: StandIn, tmp_path: Path):
    new = moved(tmp_path)
    server = brought(url + "/v1/", new)
    assert server.publication is not None and server.publication.folder == new.folder
    assert server.distance < 1e-5
    assert stand_in.label == server.publication.label


@pytest.mark.parametrize("fault", ["stale", "old head", "log-probs"])
def test_a_success_that_is_none_is_found(fault: str, url: str, stand_in: StandIn, tmp_path: Path):
    stand_in.faults.add(fault)
    with pytest.raises(ServeError, match=r"off by .* nats .*gspo starts it again") as found:
        brought(url, moved(tmp_path))
    assert url in str(found.value)
    assert "version 1" in str(found.value)
    assert stand_in.asked.count("/collective_rpc") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs_mode", "raw_logprobs"),
        ("dtype", "torch.bfloat16"),
        ("quantization", "fp8"),
        ("max_model_len", 128),
    ],
)
def test_wrong_settings_are_named_with_the_remedy(
    name: str, value: Any, url: str, stand_in: StandIn, tmp_path: Path
):
    stand_in.config = {**stand_in.config, name: value}
    with pytest.raises(ServeError, match=rf"{name}.*--logprobs-mode processed_logprobs"):
        brought(url, published(load_policy("embedded:sort"), tmp_path))
    assert "/collective_rpc" not in stand_in.asked[-3:]


@pytest.mark.parametrize(("lora", "rank"), [({"max_lora_rank": 8}, 8), (None, 0)])
def test_a_rank_above_the_servers_is_named(
    lora: dict[str, int] | None, rank: int, url: str, stand_in: StandIn, tmp_path: Path
):
    stand_in.lora = lora
    new = replace(published(load_policy("embedded:sort"), tmp_path), lora_base="base", lora_rank=9)
    with pytest.raises(ServeError, match=rf"max_lora_rank is {rank}, not 9.*--max-lora-rank 16"):
        brought(url, new)
    assert "/v1/load_lora_adapter" not in stand_in.asked


@pytest.mark.parametrize("spoilt", ["half", "gone"])
def test_a_folder_that_cannot_be_read_is_named(spoilt: str, url: str, tmp_path: Path):
    new = moved(tmp_path)
    weights = new.folder / "model.safetensors"
    if spoilt == "half":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    with pytest.raises(ServerFault, match=rf"HTTP 500: .*was to read {new.folder}: .* whole"):
        brought(url, new)


def test_weights_that_were_damaged_on_the_disk_are_named(url: str, tmp_path: Path):
    new = moved(tmp_path)
    weights = new.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4000:] = content[-8000:-4000]
    weights.write_bytes(content)
    with pytest.raises(ServeError, match=rf"off by .* nats .*{new.folder} is damaged"):
        brought(url, new)


def test_a_server_that_hangs_while_it_loads_is_found_early(
    url: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not after LOAD_SECONDS only, for which all others would wait with it."""
    monkeypatch.setattr(vllm_server, "LOOK_SECONDS", 0.1)
    call = VllmServer._call

    async def stopping(self: VllmServer, path: str, *rest: Any) -> Any:
        if path == "/collective_rpc":
            monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 0.2)
            stand_in.faults.add("hung health")
        return await call(self, path, *rest)

    monkeypatch.setattr(VllmServer, "_call", stopping)
    with pytest.raises(ServerFault, match=r"/health: no answer within 0.2 s"):
        brought(url, moved(tmp_path))


def test_what_is_no_vllm_is_said(url: str, stand_in: StandIn, tmp_path: Path):
    new = published(load_policy("embedded:sort"), tmp_path)
    stand_in.config = {}
    with pytest.raises(ServerFault, match=r"does not answer as vLLM does.*Start vLLM 0\.32"):
        brought(url, new)
    stand_in.faults.add("dead")
    with pytest.raises(ServerFault, match=r"HTTP 500: .*EngineDeadError"):
        brought(url, new)
    with pytest.raises(ServerFault, match=r"nothing answers at http://.*: start vLLM there"):
        brought("http://127.0.0.1:9", new)


def test_an_answer_of_other_weights_is_not_taken(
    url: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_server, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 0.2)

    async def sampled() -> None:
        server = VllmServer(url, Path("unused"))
        new = published(load_policy("embedded:sort"), tmp_path)
        await server.bring(new)
        assert await sample(server) == (new.version, 1)
        stand_in.label = "default"  # as after a restart
        with pytest.raises(ServerFault, match="began anew"):
            await sample(server)
        stand_in.faults |= {"hangs", "hung health"}
        with pytest.raises(ServerFault, match=r"/health: no answer within 0.2 s"):
            await sample(server)
        await server.close()

    asyncio.run(sampled())


def test_an_adapter_is_loaded_beside_its_model(url: str, stand_in: StandIn, tmp_path: Path):
    import gspo as art

    config = art.dev.InternalModelConfig(lora=art.dev.LoraConfig(r=2, target_modules=["q_proj"]))
    policy = load_policy("embedded:sort", config)
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            parameter.fill_(0.2 if "lora_B" in name else 0.1)
    whole = published(policy, tmp_path)
    new = replace(whole, lora_base="base", lora_rank=2)
    server = brought(url, new)
    assert server.distance < 1e-4
    assert server.publication is not None and [*stand_in.adapters] == [server.publication.label]


def test_keys_and_values_of_older_weights_are_not_used(url: str, stand_in: StandIn, tmp_path: Path):
    stand_in.faults.add("held blocks")
    with pytest.raises(ServerFault, match="keeps what it computed with older weights"):
        brought(url, moved(tmp_path))


def told(folder: Path, version: int, *scores: float, die: bool = False) -> Publication:
    """A publication to a stub, which has no model: its scores stand in the folder."""
    target = folder / f"v{version}"
    target.mkdir()
    (target / "scores.json").write_text(json.dumps(scores))
    if die:
        (target / "die").touch()
    wanted = [-1.0 - version, -2.0]
    return Publication(version, f"gspo-{version}", target, [1, 2, 3], wanted, 1e-3, "float32", 512)


def own(folder: Path, faults: str, work: Callable[[VllmServer], Awaitable[None]]) -> int:
    """Let a server that gspo starts do something; how often it was started."""

    async def main() -> None:
        server = VllmServer(entry(folder, faults), folder / "log")
        try:
            await work(server)
        finally:
            await server.close()

    asyncio.run(main())
    assert gone([number for numbers in starts(folder) for number in numbers])
    return len(starts(folder))


@pytest.mark.parametrize(("faults", "expected"), [("", 1), ("stale", 3)])
def test_a_server_that_cannot_reload_is_started_with_each_version(
    faults: str, expected: int, tmp_path: Path
):
    async def versions(server: VllmServer) -> None:
        for version in range(3):
            new = told(tmp_path, version, -1.0 - version, -2.0)
            await server.bring(new)
            assert server.publication is not None and server.publication.version == version
            assert server.distance == 0

    assert own(tmp_path, faults, versions) == expected


@pytest.mark.parametrize("gpu", [False, True])
def test_prompts_are_read_whole_where_there_is_no_gpu(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    async def version(server: VllmServer) -> None:
        await server.bring(told(tmp_path, 0, -1.0, -2.0))
        command = Path(f"/proc/{starts(tmp_path)[-1][0]}/cmdline").read_text().split("\0")
        assert ("--no-enable-chunked-prefill" in command) is not gpu

    own(tmp_path, "", version)


def test_a_server_that_dies_is_started_again_and_still_reloads(tmp_path: Path):
    async def versions(server: VllmServer) -> None:
        for version in range(4):
            await server.bring(told(tmp_path, version, -1.0 - version, -2.0, die=version == 1))
            if version == 2:
                os.kill(starts(tmp_path)[-1][0], signal.SIGKILL)
                gone(starts(tmp_path)[-1][:1])

    assert own(tmp_path, "", versions) == 3  # of the reload; and of the kill


def test_a_port_that_somebody_took_meanwhile_costs_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At the very first start too, which is not tried again for another reason."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        chosen = [nullcontext(taken)]

        def create_server(address: tuple[str, int]) -> Any:
            return chosen.pop() if chosen else socket.create_server(address)

        replaced = SimpleNamespace(create_server=create_server)
        monkeypatch.setattr(vllm_process, "socket", replaced)

        async def version(server: VllmServer) -> None:
            await server.bring(told(tmp_path, 0, -1.0, -2.0))
            assert server.publication is not None

        assert own(tmp_path, "", version) == 2


@pytest.mark.parametrize(
    ("fault", "said", "seconds"), [("ends", "no model .*v0, an-option", 30.0), ("deaf", "", 0.5)]
)
def test_a_server_that_does_not_start_is_a_fault_in_time(
    fault: str, said: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_server, "START_SECONDS", seconds)

    async def version(server: VllmServer) -> None:
        with pytest.raises(ServerFault, match=rf"(?s)python -m vllm.*{tmp_path}/log: {said}"):
            await server.bring(told(tmp_path, 0, -1.0, -2.0))
        assert server.publication is None and server.fault

    own(tmp_path, fault, version)


@pytest.mark.parametrize("scores", [(-1.0, float("nan")), (float("nan"), -2.0), (-1.0,), (-1, -3)])
def test_scores_that_prove_nothing_are_refused(scores: tuple[float, ...], tmp_path: Path):
    async def version(server: VllmServer) -> None:
        with pytest.raises(ServeError, match=r"off by|cannot read"):
            await server.bring(told(tmp_path, 0, *scores))
        assert server.publication is None

    own(tmp_path, "", version)


def test_an_answer_that_never_ends_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_server, "LOAD_SECONDS", 0.3)

    async def version(server: VllmServer) -> None:
        with pytest.raises(ServerFault, match=r"generate: no answer within 0.3 s"):
            await server.bring(told(tmp_path, 0, -1.0, -2.0))

    own(tmp_path, "trickles", version)


@pytest.mark.parametrize(
    "before", ["/collective_rpc", "/reset_prefix_cache", "/inference/v1/generate"]
)
def test_a_server_that_begins_anew_between_load_and_proof_is_not_used(
    before: str, url: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the weights of its start. Whoever has called tries again."""
    new, times = moved(tmp_path), [1]
    call = VllmServer._call

    async def restarting(self: VllmServer, path: str, *rest: Any) -> Any:
        if path.startswith(before) and times:
            times.pop()
            stand_in.restart()
        return await call(self, path, *rest)

    monkeypatch.setattr(VllmServer, "_call", restarting)
    with pytest.raises(ServerFault, match=r"weights {.default.}: it began anew"):
        brought(url, new)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no label", r"with the weights set\(\)"),
        ("label of one", "with the weights {'default'}"),
        ("abort", "ended a completion itself: 'abort'"),
        ("no reason", "ended a completion itself: None"),
        ("trickles", "no answer within 0.3 s"),
        ("list", "an answer that gspo cannot read"),
    ],
)
def test_an_answer_that_another_server_may_give_better_is_a_fault(
    fault: str,
    said: str,
    url: str,
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if fault == "trickles":
        monkeypatch.setattr(vllm_server, "REQUEST_SECONDS", 0.3)

    async def sampled() -> None:
        server, new = VllmServer(url, Path("unused")), moved(tmp_path)
        await server.bring(new)
        stand_in.faults.add(fault)
        with pytest.raises(ServerFault, match=said):
            await sample(server, n=2)
        await server.close()

    asyncio.run(sampled())


def test_an_engine_that_hangs_behind_a_server_that_lives_is_found(
    url: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_server, "LOOK_SECONDS", 0.1)

    async def sampled() -> None:
        server = VllmServer(url, Path("unused"))
        await server.bring(moved(tmp_path))
        monkeypatch.setattr(vllm_server, "LOAD_SECONDS", 0.2)
        stand_in.faults |= {"hangs", "hung engine"}
        with pytest.raises(ServerFault, match=r"/weight_info: no answer within 0.2 s"):
            await sample(server)
        await server.close()

    asyncio.run(sampled())


def test_what_a_server_refuses_may_be_due_to_a_restart(url: str, stand_in: StandIn, tmp_path: Path):
    """With a shorter --max-model-len, or without the adapter that it had."""

    async def sampled() -> None:
        server = VllmServer(url, Path("unused"))
        await server.bring(moved(tmp_path))
        for status in (400, 404):
            stand_in.refusals = {"/inference/v1/generate": status}
            with pytest.raises(RequestError, match=f"HTTP {status}"):
                await sample(server)
        stand_in.label = "default"
        with pytest.raises(ServerFault, match=r"HTTP 404.*'default'.*it began anew"):
            await sample(server)
        await server.close()

    asyncio.run(sampled())


@pytest.mark.parametrize("status", [401, 404])
@pytest.mark.parametrize(
    "route", ["/v1/models", "/server_info", "/update_weight_version", "/inference/v1/generate"]
)
def test_a_route_that_is_not_there_is_named_with_the_remedy(
    route: str, status: int, url: str, stand_in: StandIn, tmp_path: Path
):
    stand_in.refusals = {route: status}
    remedy = "Start vLLM .* without --api-key, with VLLM_SERVER_DEV_MODE=1 .* --enable-scale-out"
    with pytest.raises(ServeError, match=rf"{route}.*HTTP {status}.*{remedy}") as found:
        brought(url, moved(tmp_path))
    assert not isinstance(found.value, ServerFault)


def test_lora_needs_more_of_a_server(url: str, stand_in: StandIn, tmp_path: Path):
    stand_in.refusals = {"/v1/load_lora_adapter": 404}
    remedy = "ALLOW_RUNTIME_LORA_UPDATING=1 .* --enable-lora --max-lora-rank 16"
    with pytest.raises(ServeError, match=rf"/v1/load_lora_adapter: HTTP 404.*{remedy}"):
        brought(url, replace(moved(tmp_path), lora_base="base", lora_rank=9))


def test_of_two_servers_at_one_url_none_samples_with_old_weights(
    url: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One has the label of a try whose weights the other one got."""
    call = VllmServer._call
    to_other = {"/update_weight_version", "/inference/v1/generate"}

    async def asked() -> None:
        with StandIn("embedded:sort").listening() as other:

            async def balanced(self: VllmServer, path: str, *rest: Any) -> Any:
                self.url = other if path in to_other else url
                return await call(self, path, *rest)

            monkeypatch.setattr(VllmServer, "_call", balanced)
            server, new = VllmServer(url, Path("unused")), moved(tmp_path)
            with pytest.raises(ServeError, match="off by"):
                await server.bring(new)
            to_other.clear()
            await server.bring(new)
            assert await sample(server) == (1, 1)
            to_other.add("/inference/v1/generate")
            with pytest.raises(ServerFault, match="several servers answer there"):
                await sample(server)
            await server.close()

    asyncio.run(asked())


def test_what_another_run_loads_is_not_taken_for_the_weights_before(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not at any moment of its loading."""
    call, tried = VllmServer._call, []

    async def asked() -> None:
        first, second = VllmServer(url, Path("unused")), VllmServer(url, Path("unused"))
        await first.bring(moved(tmp_path / "first"))

        async def watched(self: VllmServer, path: str, *rest: Any) -> Any:
            done = await call(self, path, *rest)
            if self is second and path.startswith(("/collective_rpc", "/reset")):
                with pytest.raises(ServerFault, match="another run uses it"):
                    await sample(first)
                tried.append(path)
            return done

        monkeypatch.setattr(VllmServer, "_call", watched)
        await second.bring(published(load_policy("embedded:sort"), tmp_path / "second"))
        await first.close()
        await second.close()

    asyncio.run(asked())
    assert len(tried) == 2
