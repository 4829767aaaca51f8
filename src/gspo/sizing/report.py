"""`gspo plan` as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jinja2 import Template

from gspo.core.errors import ConfigError, suggestion
from gspo.core.tables import as_text, table
from gspo.sizing.cluster import GPUS, Fit, Gpu, Layout, Rates, Rollouts, fits, layouts
from gspo.sizing.model_size import HEAD_TOKENS, ModelSize, Training, read_size

_SHOWN_LAYOUTS = 5
_SOURCE = Path(__file__).with_name("plan.txt").read_text(encoding="utf-8")
_TEXT = Template(_SOURCE, trim_blocks=True, lstrip_blocks=True)


def make_report(
    model: str, gpu: str, gpus: int, rollouts: Rollouts, lora: int, mfu: float | None
) -> tuple[str, dict[str, Any]]:
    """Plan a run: the text for a person, and the same as an object.

    Raises:
        ConfigError: an unknown GPU.
        ModelError: no such model.
    """
    gpu = gpu.lower()
    if gpu not in GPUS:
        raise ConfigError(
            f"unknown gpu {gpu!r}.{suggestion(gpu, list(GPUS))} Known: {', '.join(GPUS)}"
        )
    card, size = GPUS[gpu], read_size(model)
    rates = replace(Rates(), mfu=mfu)
    tried = fits(size, rollouts, card, gpus, lora)
    chosen = next((fit for fit in tried if fit.fits), None)
    found: list[Layout] = []
    trouble = ""
    if chosen is not None:
        try:
            found = layouts(size, chosen.how, rollouts, card, gpus, rates)
        except ConfigError as error:
            trouble = str(error)
    else:
        trouble = _remedy(size, rollouts, card, gpus, lora)
    told = {
        "model": asdict(size),
        "fits": [asdict(fit) for fit in tried],
        "chosen": chosen and chosen.how.about(),
        "layouts": [asdict(layout) for layout in found],
        "assumed": asdict(rates) | {"mfu": rates.training(size)},
    }
    text = _TEXT.render(
        model=model,
        size=size,
        gpu=gpu,
        gpus=gpus,
        card=card,
        rollouts=rollouts,
        rates=rates,
        memory=_memory(tried, gpus, card),
        best=found[0] if found else None,
        times=_times(found, chosen.how) if found and chosen else "",
        trouble=trouble,
        head_tokens=HEAD_TOKENS,
    )
    return f"{text}\n", told


def _remedy(size: ModelSize, rollouts: Rollouts, card: Gpu, gpus: int, lora: int) -> str:
    """The smallest number of GPUs of this kind that is enough, for what needs least."""
    for more in (2**power for power in range(13)):
        if more > gpus and (fit := fits(size, rollouts, card, more, lora)[-1]).fits:
            return f"Nothing fits on {gpus}: {fit.how.about()} fits on {more}."
    longest = rollouts.prompt + rollouts.longest
    return (
        f"Nothing fits on any number of these GPUs: one sample of {longest:,} tokens, beside the "
        "gathered layers, is more than one takes: shorten the longest completion, take a GPU with "
        "more memory, or divide samples by cp_size, which isn't counted here."
    )


def _memory(tried: list[Fit], gpus: int, card: Gpu) -> str:
    names = list(tried[0].parts)
    header = ["trained", "checkp.", *names, "sum", "fits", "most tokens"]
    rows = [
        [
            "all" if fit.how.lora is None else f"LoRA {fit.how.lora}",
            "yes" if fit.how.checkpointing else "no",
            *(f"{fit.parts[name] / 2**30:,.1f}" for name in names),
            f"{sum(fit.parts.values()) / 2**30:,.1f}",
            "yes" if fit.fits else "no",
            f"{fit.most_tokens:,}" if fit.most_tokens else "-",
        ]
        for fit in tried
    ]
    title = (
        f"GiB on each of {gpus} GPU{'s' * (gpus > 1)}, of {card.memory / 2**30:.0f}, at a "
        "microbatch of the longest sample, with and without checkpointing"
    )
    return as_text([table([header, *rows], title)], width=120).removesuffix("\n")


def _times(fastest_first: list[Layout], how: Training) -> str:
    header = ["train", "roll out", "per server", *fastest_first[0].parts, "a step"]
    rows = []
    for layout in fastest_first[:_SHOWN_LAYOUTS]:
        rolling = str(layout.rollout_gpus) if layout.overlapped else "same"
        seconds = [f"{spent:,.1f}" for spent in (*layout.parts.values(), layout.seconds)]
        rows.append([str(layout.training_gpus), rolling, str(layout.per_server), *seconds])
    title = f"GPUs, and seconds of a step: {how.about()}"
    return as_text([table([header, *rows], title)], width=120).removesuffix("\n")
