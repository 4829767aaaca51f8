"""The README.md of an exported model: what it is of, how it was trained, and what came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import gspo as art
from gspo.experiment.heldout import Estimate
from gspo.experiment.run_table import last_update, method_name
from gspo.experiment.saved_run import SavedRun
from gspo.experiment.spec import flat
from gspo.objective import PRESETS

_USE = {
    False: "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
    'tokenizer = AutoTokenizer.from_pretrained("{name}")\n',
    True: "from peft import AutoPeftModelForCausalLM\n"
    "from transformers import AutoTokenizer\n\n"
    'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n'
    'tokenizer = AutoTokenizer.from_pretrained("{name}")\n',
}


def model_card(run: SavedRun, step: int, *, adapter: bool, dtype: str) -> str:
    """The card of a saved step.

    Args:
        run, step: the checkpoint.
        adapter: it stays an adapter; else it is a whole model.
        dtype: of the weights.
    """
    name = run.folder.resolve().name
    facts = {
        "base model": f"`{_base(run)}`",
        "what was trained": _trained(run, adapter),
        "method": _method(run),
        "data": _data(run),
        "run": f"`{run.name}`, step {step}" + _lineage(run),
        "weights": f"{dtype}, {'a LoRA adapter' if adapter else 'a whole model'}",
        "made with": f"[gspo](https://arxiv.org/abs/2507.18071) {art.__version__}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)
    return (
        f"---\n{_header(run, adapter)}\n---\n\n# {name}\n\n"
        f"`{_base(run)}`, trained with reinforcement learning.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Held-out reward\n\n{_rewards(run, step)}\n\n"
        f"## How to use it\n\n```python\n{_USE[adapter].format(name=name)}```\n\n"
        f"## How it was made\n\n{_command(run)}\n\n"
        "## Licence\n\nNone is given yet. The base model's own applies to what is made of it: read "
        "that one, then write `license:` into the header of this file.\n"
    )


def _header(run: SavedRun, adapter: bool) -> str:
    base, method = run.base_model, (method_name(run) or "").partition(",")[0]
    on_hub = base.count("/") == 1 and not Path(base).exists()
    tags = ["gspo", "reinforcement-learning", *([method] if method not in ("gspo", "") else [])]
    return ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    ).to_yaml()


def _base(run: SavedRun) -> str:
    """The base model; of a folder its name, since the rest says where it lay on a machine."""
    return Path(run.base_model).name if Path(run.base_model).is_dir() else run.base_model


def _trained(run: SavedRun, adapter: bool) -> str:
    lora: Any = run.config.get("lora")
    if not lora:
        return "all weights"
    where = json.dumps(lora.get("target_modules"))
    merged = "" if adapter else "; merged into the weights"
    return f"LoRA adapters (r = {lora.get('r')}, alpha = {lora.get('alpha')}, {where}){merged}"


def _method(run: SavedRun) -> str:
    """Name, formula, source and clip range of the last step that was trained on rewards."""
    name, record = method_name(run), last_update(run)
    if name is None or record is None:
        return "supervised fine-tuning" if name == "sft" else ""
    settings = record.settings()
    told = f"`{settings.algorithm}`"
    if preset := PRESETS.get(settings.algorithm):
        told += f": {preset.formula} ({preset.source})"
    objective = settings.objective
    if objective.has_range:
        told += f"; epsilon {objective.epsilon_low:g} / {objective.epsilon_high:g}"
    return told.replace("|", "\\|") + f"; {settings.minibatches} optimizer steps a batch"


def _data(run: SavedRun) -> str:
    spec = run.spec
    if spec is None:
        return "of a program of its own"
    of = spec.task or f"the rollout {_without_folders(str(spec.rollout))}"
    sft = f"; before it SFT on `{Path(spec.sft.data).name}`" if spec.sft else ""
    return f"`{_without_folders(of)}`, {spec.prompts} prompts x {spec.completions} a step{sft}"


def _lineage(run: SavedRun) -> str:
    parents = run.config.get("lineage") or []
    return "".join(f"; from `{p['run']}`, step {p['step']}" for p in reversed(parents))


def _rewards(run: SavedRun, step: int) -> str:
    """The first evaluation, and the last one up to the step."""
    lines = {int(r["step"]): r for r in run.records() if "val/reward" in r and r["step"] <= step}
    if not lines:
        return "It was not measured."
    rows = [f"| {at} | {Estimate.logged(lines[at])} |" for at in sorted({min(lines), max(lines)})]
    prompts = lines[max(lines)].get("val/prompts")
    over = f", over {prompts:.0f} prompts that were not trained on" if prompts else ""
    return f"Mean and 95 % interval{over}.\n\n| step | reward |\n|---|---|\n" + "\n".join(rows)


def _command(run: SavedRun) -> str:
    if run.spec is None:
        return "A program of its own called `model.train`."
    given = flat(run.spec.model_dump(mode="json", exclude_defaults=True))
    given |= {"model": run.spec.model}
    lines = [
        f"{key} = {json.dumps(_without_folders(value), ensure_ascii=False)}"
        for key, value in given.items()
        if key != "path" and value is not None
    ]
    return f"`gspo train run.toml` with\n\n```toml\n{chr(10).join(lines)}\n```"


def _without_folders(value: Any) -> Any:
    """A value, of whose paths the folders are left out: a card is read by others."""
    if not isinstance(value, str):
        return value
    return re.sub(r"^(?:[^:\s]*/)?([^/:]+\.\w+(?::\w+)?)$", r"\1", value)
