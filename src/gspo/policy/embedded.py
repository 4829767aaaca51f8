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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from gspo.core.errors import ModelError, suggestion
from gspo.kernels.hf import quiet
from gspo.tasks import Task, load_task, task_names

Progress = Callable[[int, int, float], None]
"""Called with (step, steps, loss) while the warm start trains."""

PREFIX = "embedded:"
SPECIAL = ("<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How the warm start is trained: so short that there is something left to learn."""

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0


RECIPES = {
    "sort": Recipe(steps=95, batch=64, learning_rate=6e-3),
    "reverse": Recipe(steps=380, batch=64, learning_rate=3e-3),
    "add": Recipe(steps=620, batch=32, learning_rate=4e-3),
    "chain": Recipe(steps=300, batch=16, learning_rate=4e-3),
    "climb": Recipe(steps=400, batch=16, learning_rate=4e-3),
}


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
        names = ", ".join(PREFIX + task for task in task_names())
        raise ModelError(f"unknown base_model {name!r}.{near} Embedded models: {names}.")
    return task_name


def embedded_folder(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of `embedded:<task>`, built if it isn't there yet.

    Args:
        name: the whole name, `embedded:` included.
        progress: told of each step of the warm start.

    Raises:
        ModelError: no such task.
    """
    task_name = embedded_task(name)
    recipe = RECIPES[task_name]
    key = json.dumps([asdict(recipe), _CONFIG, CHAT_TEMPLATE], sort_keys=True)
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
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as parent:
        building = Path(parent) / "model"
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, recipe.seed)
        # One thread, so that the same seed gives the same weights on any machine of this kind.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _warm_start(model, tokenizer, load_task(task_name), recipe, progress)
        finally:
            torch.set_num_threads(threads)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        with quiet():
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
        try:
            os.rename(building, folder)
        except OSError:
            if not (folder / "config.json").exists():  # another process was faster otherwise
                raise
    return folder


_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    # Short texts: slow rotations would leave positions indistinguishable.
    "rope_parameters": {"rope_type": "default", "rope_theta": 30.0},
    "tie_word_embeddings": True,
    "router_aux_loss_coef": 0.0,
}


def build_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Build a tokenizer: a token per printable ASCII character, and the special ones of a chat."""
    characters = [c for c in string.printable if c not in "\r\x0b\x0c"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:5]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(
    tokenizer: transformers.PreTrainedTokenizerBase, seed: int
) -> transformers.Qwen3MoeForCausalLM:
    """Draw the weights of a new model of `_CONFIG` from a seed."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        pad_token_id=SPECIAL.index("<|pad|>"),
        eos_token_id=SPECIAL.index("<|end|>"),
        bos_token_id=None,
        **_CONFIG,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Qwen3MoeForCausalLM(config)


def _warm_start(
    model: transformers.Qwen3MoeForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    task: Task,
    recipe: Recipe,
    progress: Progress | None,
) -> None:
    """Train on the solutions of the train split: each token given those before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    warmup = max(1, recipe.steps // 10)
    for step in range(recipe.steps):
        left = (recipe.steps - step) / (recipe.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min((step + 1) / warmup, left)
        indices = range(step * recipe.batch, (step + 1) * recipe.batch)
        tokens, labels = _examples(tokenizer, task, indices, recipe.seed)
        logits = model(input_ids=tokens, attention_mask=(tokens != tokenizer.pad_token_id)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, recipe.steps, loss.item())


def _examples(
    tokenizer: transformers.PreTrainedTokenizerBase, task: Task, indices: range, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make token ids [B, T] and labels [B, T], -100 outside the solutions; padded on the right."""
    texts, labels = [], []
    # Other problems than those of the RL run, which sees the seeds from 0 on.
    stream = 1_000_003 + seed
    for index in indices:
        problem = task.problem("train", index, stream)
        prompt: Any = tokenizer.apply_chat_template(
            task.messages(problem), add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id] if task.ends else answer
        texts.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad, pad_token = torch.nn.utils.rnn.pad_sequence, SPECIAL.index("<|pad|>")
    return pad(texts, True, pad_token), pad(labels, True, -100)
