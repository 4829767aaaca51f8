"""Exports, as transformers and peft load them, a stand-in of a hub, and what model cards say."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
import tomllib
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from vs_vllm import build

from experiment.small_runs import stored_run, trained_run
from gspo import dev
from gspo.core.errors import CheckpointError, ConfigError, ModelError, RunError
from gspo.experiment.export import Export, export, model_card, write_folder
from gspo.experiment.saved_run import SavedRun, read_run
from gspo.experiment.spec import Spec
from gspo.kernels.hf import quiet

TOKENS = torch.tensor([[9, 8, 7, 6, 5, 9]])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return trained_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return trained_run(tmp_path_factory.mktemp("lora"), lora=dev.LoraConfig(r=2))


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    return lm.eval()(input_ids=TOKENS.to(lm.device)).logits.float()


def loaded(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The folder as its consumer loads it; a warning is an error."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("error")
        # transformers' own name for a property, which peft of the same day still asks for.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        return kind.from_pretrained(folder, **options)


def test_a_full_checkpoint_is_what_was_trained(full: SavedRun, tmp_path: Path):
    write_folder(Export(full, 1), tmp_path / "out")
    policy = full.policy(1)
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(policy.lm))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"optimizer.safetensors", "trainer.json", "manifest.json"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == policy.tokenizer.chat_template


def test_weights_in_the_dtype_that_was_asked_for(full: SavedRun, tmp_path: Path):
    write_folder(Export(full, 1, dtype="bfloat16"), tmp_path / "out")
    lm, whole = loaded(tmp_path / "out", dtype="auto"), full.folder / "checkpoints/0001"
    assert lm.dtype == torch.bfloat16
    assert torch.allclose(logits(lm.float()), logits(loaded(whole)), atol=0.2)
    small, large = (path / "model.safetensors" for path in (tmp_path / "out", whole))
    assert small.stat().st_size < 0.6 * large.stat().st_size


def test_an_adapter_is_loaded_by_peft_without_a_warning(lora: SavedRun, tmp_path: Path):
    """Experts and router have adapters too: embedded models are mixtures of experts."""
    expected = logits(lora.policy(1).lm)
    assert not torch.allclose(expected, logits(lora.policy(0).lm), atol=1e-4)
    write_folder(Export(lora, 1), tmp_path / "out")
    found = loaded(tmp_path / "out", peft.AutoPeftModelForCausalLM)
    assert torch.allclose(logits(found), expected, atol=1e-5)
    assert any(".experts." in name for name, _ in found.named_parameters() if "lora" in name)
    write_folder(Export(lora, 1, dtype="bfloat16"), tmp_path / "half")
    assert torch.allclose(
        logits(loaded(tmp_path / "half", peft.AutoPeftModelForCausalLM)), expected, atol=0.1
    )
    small, large = (tmp_path / n / "adapter_model.safetensors" for n in ("half", "out"))
    assert small.stat().st_size < 0.6 * large.stat().st_size


def test_a_merged_adapter_is_a_whole_model(lora: SavedRun, tmp_path: Path):
    write_folder(Export(lora, 1, merge=True), tmp_path / "out")
    assert torch.allclose(logits(loaded(tmp_path / "out")), logits(lora.policy(1).lm), atol=1e-5)
    write_folder(Export(lora, 1, merge=True, dtype="bfloat16"), tmp_path / "half")
    assert loaded(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert not (tmp_path / "half" / "adapter_config.json").exists()


def test_what_cannot_be_exported_is_refused_first(full: SavedRun, lora: SavedRun, tmp_path: Path):
    with pytest.raises(ConfigError, match="hold all weights"):
        Export(full, 1, merge=True)
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        Export(full, 1, dtype="bf16")
    with pytest.raises(RunError, match=r"step 0 of p/r is its base model, embedded:sort"):
        Export(full, 0)
    with pytest.raises(ConfigError, match="give --to DIR, --push-to"):
        export(Export(full, 1), None, None)
    (tmp_path / "file").write_text("mine")
    for to in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunError, match="is not an empty folder"):
            export(Export(full, 1), to, None)
    assert (tmp_path / "file").read_text() == "mine"
    on_top = SavedRun(
        lora.folder, {**lora.config, "base_model": str(lora.folder / "checkpoints/0001")}, {}
    )
    with pytest.raises(ConfigError, match=r"on top of another one.*add --merge"):
        Export(on_top, 1)


def test_a_damaged_or_unfinished_checkpoint_leaves_no_folder(full: SavedRun, tmp_path: Path):
    shutil.copytree(full.folder, tmp_path / "p/r")
    copy = SavedRun(tmp_path / "p/r", full.config, {})
    checkpoint = copy.folder / "checkpoints/0001"
    (checkpoint / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        write_folder(Export(copy, 1), tmp_path / "out")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        write_folder(Export(copy, 1), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    gone = SavedRun(full.folder, {**full.config, "base_model": "/gone", "lora": {"r": 1}}, {})
    with pytest.raises(ModelError, match="unknown model '/gone'"):
        Export(gone, 1)


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub when a folder is uploaded."""

    files: dict[str, bytes]
    repositories: list[dict[str, Any]]
    refusal: int | None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert self.headers["Authorization"] == "Bearer hf_mine"
        answer: Any = {}
        if self.refusal is not None:
            return self._send(self.refusal, {"error": "not yours"})
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            answer = {"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}"}
        elif self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **modes} for file in wanted]}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/me/mine/commit/1"
            answer = {"commitUrl": url, "commitOid": "1"}
        return self._send(200, answer)

    def do_GET(self) -> None:
        repository = {"id": "me/mine", "sha": "0", "siblings": []}
        self._send(404 if self.refusal else 200, repository)

    def _send(self, status: int, answer: Any) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("OneHub", (Hub,), {"files": {}, "repositories": [], "refusal": None})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        yield kind
        server.shutdown()
        thread.join()


def test_a_checkpoint_is_pushed_to_a_hub(full: SavedRun, hub: type[Hub], tmp_path: Path):
    _, url = export(Export(full, 1), None, "me/mine")
    assert url is not None and url.endswith("me/mine")
    asked = hub.repositories[0]  # older and newer clients say it in two ways
    assert asked.get("private") or asked.get("visibility") == "private"
    checkpoint = full.folder / "checkpoints/0001"
    assert hub.files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert b"# r\n" in hub.files["README.md"] and "optimizer.safetensors" not in hub.files


def test_a_refusal_of_the_hub_comes_before_any_work(full: SavedRun, hub: type[Hub], tmp_path: Path):
    with pytest.raises(ConfigError, match="--push-to 'a/b/c'"):
        export(Export(full, 1), tmp_path / "out", "a/b/c")
    hub.refusal = 403
    with pytest.raises(RunError, match=r"cannot push to 'me/mine': .*not yours.*hf auth login"):
        export(Export(full, 1), tmp_path / "out", "me/mine")
    assert not (tmp_path / "out").exists()


_MADE = Path(__file__).parents[2] / "benchmarks/.venvs/vllm/bin/python"  # by `make bench-vllm`
VLLM = Path(os.environ.get("GSPO_VLLM_PYTHON") or _MADE)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on a busy machine
@pytest.mark.skipif(not VLLM.exists(), reason="no GSPO_VLLM_PYTHON, and not made: make bench-vllm")
@pytest.mark.parametrize(
    ("part", "load", "options"),
    [
        ("dense", {}, {}),
        ("dense", {"lora": dev.LoraConfig(r=8)}, {}),
        ("dense", {"lora": dev.LoraConfig(r=8)}, {"merge": True}),
        ("moe", {"lora": dev.LoraConfig(r=8)}, {"merge": True}),
    ],
    ids=["full", "adapter", "merged", "merged experts"],
)
def test_vllm_computes_what_was_trained(
    tmp_path: Path, part: str, load: dict[str, Any], options: dict[str, Any]
):
    build(part, tmp_path / "base")
    run = trained_run(tmp_path, str(tmp_path / "base"), **load)
    what = Export(run, 1, **options)
    write_folder(what, tmp_path / "out")
    model, adapter = ("base", str(tmp_path / "out")) if what.is_adapter else ("out", "-")
    prompt = [9, 8, 7, 6, 5, 9]
    side = Path(__file__).with_name("vllm_side.py")
    command = [VLLM, side, tmp_path / model, adapter, json.dumps(prompt)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    tokens, found = json.loads(line)
    with torch.no_grad():
        scores = run.policy(1).lm(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = scores.float().log_softmax(-1)[range(8), tokens]
    assert torch.allclose(expected, torch.tensor(found), atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    moved = base(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] - scores
    assert moved.abs().max() > 0.01  # else nothing of the training would be seen


def card(folder: Path, adapter: bool = False) -> str:
    run = read_run(folder)
    what: Any = SimpleNamespace(run=run, step=3, is_adapter=adapter, dtype="bfloat16")
    return model_card(what)


def test_the_card_says_what_when_and_how(tmp_path: Path):
    text = card(stored_run(tmp_path, lineage=[{"run": "p/first", "step": 5}]))
    for told in ("`embedded:sort`", "all weights", "`gspo`: -(1/N)", "epsilon 0.0003 / 0.0004"):
        assert told in text
    assert "| 0 | 0.200" in text and "| 3 | 0.400" in text and "| 2 |" not in text
    assert "over 8 prompts" in text and "from `p/first`, step 5" in text and "bfloat16" in text
    header: Any = ModelCard(text).data
    assert header.library_name == "transformers" and header.license is None
    assert header.base_model is None and header.tags == ["gspo", "reinforcement-learning"]
    assert "write `license:`" in text


def test_the_command_is_a_file_that_gives_the_same_run(tmp_path: Path):
    folder = stored_run(tmp_path)
    toml = card(folder).split("```toml\n")[1].split("```")[0]
    stored = Spec(**json.loads((folder / "spec.json").read_text()))
    assert Spec(**tomllib.loads(toml), path=stored.path) == stored


def test_a_hub_model_is_linked_and_folders_of_the_machine_are_not_told(tmp_path: Path):
    lora = {"r": 4, "alpha": 8.0, "target_modules": "all-linear"}
    folder = stored_run(tmp_path, base_model="Qwen/Qwen3-0.6B", lora=lora)
    spec = json.loads((folder / "spec.json").read_text())
    spec |= {"task": None, "rollout": "/home/me/secret/mine.py:rollout", "model": "Qwen/Qwen3-0.6B"}
    (folder / "spec.json").write_text(json.dumps(spec))
    text = card(folder, adapter=True)
    header: Any = ModelCard(text).data
    assert header.base_model == "Qwen/Qwen3-0.6B"
    assert "mine.py:rollout" in text and "secret" not in text and str(tmp_path) not in text
    assert "LoRA adapters (r = 4" in text and "AutoPeftModelForCausalLM" in text
    merged = card(folder)
    assert "merged into the weights" in merged and "AutoModelForCausalLM" in merged


def test_a_program_of_the_users_own_has_no_file(tmp_path: Path):
    folder = stored_run(tmp_path)
    (folder / "spec.json").unlink()
    (folder / "metrics.jsonl").unlink()
    text = card(folder)
    assert "A program of its own" in text and "It was not measured." in text


def test_rows_and_rewards_of_ones_own_are_named_and_a_warm_start_is_measured(tmp_path: Path):
    folder = stored_run(tmp_path)
    spec = json.loads((folder / "spec.json").read_text())
    named = {
        "dataset": "/home/me/secret/rows.jsonl",
        "reward": ["/home/me/secret/s.py:exact", "s:x"],
    }
    spec |= {
        "task": None,
        "sft": {"data": "a/lessons.jsonl"},
        "reward_weights": [1.0, 0.2],
        **named,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    text = card(folder)
    assert "| data | `rows.jsonl`, 4 prompts x 8 a step; before it SFT on `lessons.jsonl` |" in text
    assert "| reward | 1 x `s.py:exact` + 0.2 x `s:x` |" in text
    assert 'reward = ["s.py:exact", "s:x"]' in text and "secret" not in text
    assert "| 0 | 0.200" in text and "| 1, after the SFT | 0.500" in text and "| 3 | 0.400" in text
    spec |= {
        "dataset": None,
        "reward": [],
        "reward_weights": None,
        "environment": "textworld:house",
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    assert "| data | `textworld:house`, 4 prompts" in card(folder)
