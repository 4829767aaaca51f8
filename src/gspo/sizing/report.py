"""`gspo plan` as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from gspo.core.errors import ConfigError, suggestion
from gspo.lab.tables import as_text, table
from gspo.sizing.cluster import Fit, Layout, fits, layouts
from gspo.sizing.memory import HEAD_TOKENS, Training
from gspo.sizing.model_size import ModelSize, read_size
from gspo.sizing.step_time import GPUS, Gpu, Rates, Rollouts

_SHOWN_LAYOUTS = 5
_ASSUMED = (
    "weights, gradients and AdamW in float32 (16 bytes a trained weight), sharded by FSDP2; "
    f"activations in bfloat16; float32 logits of {HEAD_TOKENS:,} tokens at a time",
    "rollout servers hold bfloat16 weights, and as many completions as their KV cache has room "
    "for; (1 - share)^(longest/mean - 1) of the completions reach that share of the longest",
    "GPUs that roll out and train in turns hold one of the two at a time; the other waits in the "
    "host's memory",
    "every prompt is computed for each completion; no failures, no waiting for an environment; no "
    "checkpoint is written",
)


def make_report(
    model: str, gpu: str, gpus: int, rollouts: Rollouts, lora: int, mfu: float | None
) -> tuple[str, dict[str, Any]]:
    """Plan a run: the text for a person, and the same as an object.

    Raises:
        ConfigError: an unknown GPU, or lengths that contradict one another.
        ModelError: no such model.
    """
    if gpu not in GPUS:
        raise ConfigError(
            f"unknown gpu {gpu!r}.{suggestion(gpu, list(GPUS))} Known: {', '.join(GPUS)}"
        )
    if rollouts.longest < rollouts.mean:
        raise ConfigError(
            f"longest = {rollouts.longest} is less than the mean length {rollouts.mean:.0f}: give "
            "the longest completion, max_tokens, that a run allows"
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
    parts = [_about(model, size, card, gpu, gpus, rollouts), _memory(tried, gpus, card)]
    if found and chosen:
        parts += [_times(found, chosen.how), *_balance(found)]
    if trouble:
        parts.append(trouble)
    parts.append("Assumed:\n" + "\n".join(f"- {line}" for line in _assumed(size, rates)))
    told = {
        "model": asdict(size),
        "fits": [asdict(fit) for fit in tried],
        "chosen": chosen and chosen.how.about(),
        "layouts": [asdict(layout) for layout in found],
        "assumed": asdict(rates) | {"mfu": rates.training(size)},
    }
    return as_text(parts, width=120), told


def _remedy(size: ModelSize, rollouts: Rollouts, card: Gpu, gpus: int, lora: int) -> str:
    """The smallest number of GPUs of this kind that is enough, for what needs least."""
    for more in (2**power for power in range(13)):
        if more > gpus and (fit := fits(size, rollouts, card, more, lora)[-1]).fits:
            return f"Nothing fits on {gpus}: {fit.how.about()} fits on {more}."
    longest = rollouts.prompt + rollouts.longest
    return (
        f"Nothing fits on any number of these GPUs: one sample of {longest:,} tokens is more than "
        "a GPU takes: shorten the longest completion or take a GPU with more memory."
    )


def _about(model: str, size: ModelSize, card: Gpu, gpu: str, gpus: int, wanted: Rollouts) -> str:
    active = f", {(size.active + size.head) / 1e9:,.2f} B active" if size.experts else ""
    experts = (
        f", {size.experts_per_token} of {size.experts} experts for a token" if size.experts else ""
    )
    return (
        f"{model}: {size.parameters / 1e9:,.2f} B parameters{active}; {size.layers} layers of "
        f"width {size.width}{experts}; vocabulary {size.vocabulary:,}\n"
        f"{gpus} x {gpu} ({card.memory / 1e9:.0f} GB, {card.flops / 1e12:.0f} TFLOP/s, "
        f"{card.bytes_per_s / 1e12:.2f} TB/s)\n"
        f"a step: {wanted.completions:,} completions of {wanted.mean:,.0f} tokens, the longest of "
        f"{wanted.longest:,}, behind prompts of {wanted.prompt:,}"
    )


def _memory(tried: list[Fit], gpus: int, card: Gpu) -> Any:
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
        f"GiB on each of {gpus} GPUs, of {card.memory / 2**30:.0f}, at a microbatch of the longest "
        "sample, with and without checkpointing"
    )
    return table([header, *rows], title)


def _times(fastest_first: list[Layout], how: Training) -> Any:
    names = list(fastest_first[0].parts)
    header = ["train", "roll out", "per server", *names, "a step"]
    rows = []
    for layout in fastest_first[:_SHOWN_LAYOUTS]:
        rolling = str(layout.rollout_gpus) if layout.overlapped else "same"
        seconds = (f"{layout.parts[name]:,.1f}" for name in names)
        rows.append(
            [
                str(layout.training_gpus),
                rolling,
                str(layout.per_server),
                *seconds,
                f"{layout.seconds:,.1f}",
            ]
        )
    title = f"GPUs, and seconds of a step: {how.about()}"
    return table([header, *rows], title)


def _balance(fastest_first: list[Layout]) -> list[str]:
    best = fastest_first[0]
    if not best.overlapped:
        return ["Fastest: the same GPUs roll out and train, in turns."]
    trained = best.parts["scoring"] + best.parts["training"]
    waits = "trainer waits" if best.parts["rollouts"] > trained else "servers wait"
    idle = abs(best.parts["rollouts"] - trained) / best.seconds
    return [
        f"Fastest: {best.training_gpus} GPUs train the last step's completions while "
        f"{best.rollout_gpus} roll out; the {waits} {idle:.0%} of a step."
    ]


def _assumed(size: ModelSize, rates: Rates) -> list[str]:
    return [
        f"training reaches {rates.training(size):.0%} of the data sheet's FLOP/s (--mfu)",
        f"decoding reaches {rates.decode_bytes:.0%} of the memory's rate and "
        f"{rates.decode_flops:.0%} of the FLOP/s; a layer takes at least "
        f"{(rates.moe_layer_s if size.experts else rates.layer_s) * 1e6:.0f} us for a token, and "
        f"{rates.node_s * 1e6:.0f} us more where a server has several GPUs "
        f"({rates.network_s * 1e6:.0f} us across nodes)",
        f"new weights arrive at {rates.link / 1e9:.0f} GB/s for each GPU of a server",
        *_ASSUMED,
    ]
