"""The embedded model: a small Qwen3-MoE that the package builds and warm-starts by itself.

`embedded:<task>` is built once, from a fixed seed, into an ordinary Hugging Face folder
(config.json, model.safetensors, tokenizer.json) below `cache_folder()`.
"""

from __future__ import annotations

import hashlib
import json
import os
import string
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo.core.errors import ModelError, suggestion
from gspo.kernels.hf import quiet
from gspo.tasks import Task, load_task

PREFIX = "embedded:"
SPECIAL = ("<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_VOCABULARY = (*SPECIAL, *(c for c in string.printable if c not in "\r\x0b\x0c"))
_TABLES = tomllib.loads(Path(__file__).with_name("embedded.toml").read_text(encoding="utf-8"))
CHAT_TEMPLATE: str = _TABLES["chat_template"]
_CONFIG: dict[str, Any] = _TABLES["config"]
RECIPES: dict[str, dict[str, Any]] = _TABLES["recipes"]
"""How each warm start is trained."""


def cache_folder() -> Path:
    """Return $GSPO_CACHE, else gspo's folder below $XDG_CACHE_HOME or ~/.cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("GSPO_CACHE", caches / "gspo"))


def embedded_task(name: str) -> str:
    """Return the task of `embedded:<task>`.

    Raises:
        ModelError: no such task.
    """
    task_name = name.removeprefix(PREFIX)
    if task_name not in RECIPES:
        near = suggestion(task_name, RECIPES)
        names = ", ".join(PREFIX + task for task in RECIPES)
        raise ModelError(f"unknown model {name!r}.{near} Embedded models: {names}.")
    return task_name


def embedded_folder(name: str) -> Path:
    """Return the folder of `embedded:<task>`, built if it isn't there yet.

    Args:
        name: the whole name, `embedded:` included.

    Raises:
        ModelError: no such task, or the cache cannot be written.
    """
    task_name = embedded_task(name)
    recipe = RECIPES[task_name]
    key = json.dumps([recipe | {"seed": 0}, _CONFIG, CHAT_TEMPLATE], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    folder = cache_folder() / "embedded" / f"{task_name}-{digest}"
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot build {name} in {folder.parent}: {error}. "
            "Set GSPO_CACHE to a folder that is writable."
        ) from None
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as parent, quiet():
        building = Path(parent) / "model"
        tokenizer, model = build_tokenizer(), build_model(recipe.get("context"))
        # One thread, so that the same seed gives the same weights on any machine of this kind.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        warm_start(model, tokenizer, load_task(task_name), recipe)
        torch.set_num_threads(threads)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        # transformers writes the model on the first rank alone, but each may have its own cache.
        model.should_save_on_this_rank = lambda is_main_process: True
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        with suppress(OSError):  # another process was faster
            os.rename(building, folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer: a token per printable ASCII character, and the special ones of a chat."""
    vocabulary = {token: i for i, token in enumerate(_VOCABULARY)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:5]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(context: int | None = None) -> Qwen3MoeForCausalLM:
    """Draw the weights of a new model of `_CONFIG`; `context` in tokens, None: 512."""
    config = Qwen3MoeConfig(
        vocab_size=len(_VOCABULARY),
        pad_token_id=SPECIAL.index("<|pad|>"),
        eos_token_id=SPECIAL.index("<|end|>"),
        bos_token_id=None,
        **_CONFIG | cast(Any, {"max_position_embeddings": context} if context else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config)


def warm_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, recipe: dict[str, Any]
) -> None:
    """Train on the solutions of the train split: each token given those before it."""
    steps, batch, rate = recipe["steps"], recipe["batch"], recipe["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    for step in range(steps):
        tokens, labels = _examples(tokenizer, task, range(step * batch, (step + 1) * batch))
        mask = tokens != tokenizer.pad_token_id
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _examples(
    tokenizer: PreTrainedTokenizerBase, task: Task, indices: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make token ids [B, T] and labels [B, T], -100 outside the solutions; padded on the right."""
    texts, labels = [], []
    for index in indices:
        # Other problems than those of the RL run, which sees the seeds from 0 on.
        problem = task.problem("train", index, 1_000_003)
        lessons, tools = task.lessons(problem), cast(Any, task.tools)
        messages, said = lessons[index % len(lessons)]
        prompt: Any = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False
        )
        answer: Any = tokenizer(said + ("<|end|>" if task.ends else ""))["input_ids"]
        texts.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(texts, True, SPECIAL.index("<|pad|>")), pad(labels, True, -100)
