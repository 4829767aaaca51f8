"""Load any Hugging Face causal LM, dense or MoE, into a `Policy`; write its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gspo.core.compute import free_cores
from gspo.core.errors import ModelError
from gspo.dev import InternalModelConfig
from gspo.kernels import hf
from gspo.kernels.attention import PACKED
from gspo.kernels.fused import fuse, shorten
from gspo.kernels.sharded import on_host, reshard
from gspo.policy.context import settle_context
from gspo.policy.lora import add_lora, merge_adapter, quiet_peft
from gspo.policy.policy import Policy
from gspo.policy.source import adapters_below, fingerprint, read_model, read_tokenizer, resolve
from gspo.policy.workers import Workers

SMALL = 20_000_000  # parameters below which threads inside an operation slow a step down


def load_policy(
    base_model: str,
    config: InternalModelConfig | None = None,
    *,
    checkpoint: Path | None = None,
    mesh: Workers | None = None,
) -> Policy:
    """Load `base_model`, or the weights of a checkpoint of it, in float32.

    `Policy.round_weights` is left to the caller: an optimizer needs the float32 numbers, and how
    samples are packed is proved with them.

    Args:
        base_model: `embedded:<task>`, a folder in Hugging Face layout, a hub id, or the folder of
            a LoRA adapter: its model, with the adapter merged into the weights.
        config: precision, LoRA and context.
        checkpoint: a folder written by `save_weights`, whose weights are taken instead.
        mesh: the processes that load the model at the same time and hold a part of it each; None:
            this one alone.

    Raises:
        ModelError: unknown model, unusable architecture, or a context beyond the model's.
    """
    config = config or InternalModelConfig()
    source = resolve(base_model)
    saved_whole = checkpoint is not None and config.lora is None
    weights = str(checkpoint) if saved_whole else source
    trust, device = config.trust_remote_code, _device(config.device)
    shares: dict[str, Any] = {"half": config.dtype != "float32"}
    if mesh is not None:
        remedy = "copy the same files to every machine, or give a folder that all of them share"
        files = fingerprint(source, trust_remote_code=trust)
        mesh.agree(f"model {base_model!r}", files, remedy)
        shares |= {"ranks": mesh.size, "ep_size": mesh.ep_size}
    lm = read_merged(weights, base_model, trust_remote_code=trust, **shares)
    lm = lm.to(device)  # pyright: ignore[reportArgumentType]
    # What a new adapter is of: a path that is right from wherever it is read.
    lm.name_or_path = os.path.abspath(source) if Path(source).is_dir() else source
    tokenizer = read_tokenizer(source, trust_remote_code=trust)
    with _told(base_model, lm):
        if hf.attention_implementation(lm) == "sdpa" or caps_or_sinks(lm):
            lm.set_attn_implementation(PACKED)
        fuse(lm) if device.type == "cuda" else shorten(lm)
        context = settle_context(lm, base_model, config.max_context)
        threads, workers = _threads(lm, config.threads)
        torch.set_num_threads(threads)
        reshard(lm)  # what is frozen now is to be each rank's part
        peft = None if config.lora is None else add_lora(lm, config.lora, checkpoint)
        policy = Policy(
            lm=lm.eval(),
            peft=peft,
            tokenizer=tokenizer,
            source=source,
            dtype=getattr(torch, config.dtype),
            context=context,
            threads=threads,
            entries=max(tokenizer.get_vocab().values()) + 1,  # heads are often padded beyond them
            checkpointing=config.activation_checkpointing,
            # peft swaps the experts' weights on the module while it computes, for every thread.
            workers=mesh or Workers(1 if peft else workers),
        )
    if policy.checkpointing:  # with the same replayed choices of experts
        hf.recompute_layers(lm, policy.routers.recompute)
    return policy


@contextmanager
def _told(name: str, lm: PreTrainedModel) -> Iterator[None]:
    """Say of an error inside the block that the model cannot be computed.

    Raises:
        ModelError: in place of whatever transformers or torch raise.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ModelError(
            f"{name!r}: {type(lm).__name__} cannot compute a few tokens ({type(error).__name__}: "
            f"{error}): its config is wrong, or it is called in a way that gspo doesn't know"
        ) from error


def read_merged(
    source: str, name: str, *, adapters: Sequence[str] = (), ranks: int = 1, **options: Any
) -> PreTrainedModel:
    """Read a model in float32, with the adapter that `source` may be, and further ones, merged.
    `ranks` and `options` are those of `read_model`.

    Raises:
        ModelError: see `read_model` and `merge_adapter`; an adapter, and more than one process.
    """
    base, below = adapters_below(source)
    if below and ranks > 1:
        raise ModelError(
            f"base_model {source!r} is a LoRA adapter, which {ranks} processes cannot merge: write "
            "a folder with the adapter merged (gspo export), and give that"
        )
    lm = read_model(base, name, ranks=ranks, **options)
    for adapter in (*below, *adapters):
        lm = merge_adapter(lm, adapter)
    return lm


def caps_or_sinks(lm: PreTrainedModel) -> bool:
    """Whether a model without SDPA computes soft caps or sinks as gspo's attention does."""
    own = hf.attention_implementation(lm)
    capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None) is not None
    bent = capped or any(name.endswith(".sinks") for name, _ in lm.named_parameters())
    if own != "eager" or not bent:
        return False
    size = lm.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    tokens = torch.arange(24, device=lm.device)[None] % size
    with torch.no_grad():
        expected = lm.eval()(input_ids=tokens, use_cache=False).logits
        try:
            lm.set_attn_implementation(PACKED)
            found = lm(input_ids=tokens, use_cache=False).logits
        except (ValueError, TypeError, NotImplementedError):
            return False
        finally:
            lm.set_attn_implementation(own)
    return torch.allclose(found, expected, atol=1e-3, rtol=1e-3)


def weights_to_store(policy: Policy, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that `save_weights` takes (with LoRA: the adapter's).

    Args:
        masters: by name in the model, numbers that stand for its own.
    """
    whole = {id(p): masters[n] for n, p in policy.lm.named_parameters() if n in masters}
    state: dict[str, Tensor] = (policy.peft or policy.lm).state_dict(keep_vars=True)
    stored = [n for n, t in state.items() if policy.peft is None or t.requires_grad]
    return {name: whole.get(id(state[name]), state[name]) for name in stored}


def whole_weights_to_store(policy: Policy) -> dict[str, Tensor]:
    """Those of `weights_to_store` in the model's type, in host memory of the first rank. All ranks
    call it together; on the others the tensors are empty."""
    lm, own = policy.lm, policy.trainable.items()
    divided = {n: p for n, p in own if isinstance(p, DTensor) and not hf.stays_float32(lm, n)}
    stored = weights_to_store(policy, {n: p.to(policy.dtype) for n, p in divided.items()})
    return on_host(stored, copied=False, whole=True, receiver=policy.workers.rank == 0)


def save_weights(policy: Policy, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights and tokenizer in Hugging Face layout (with LoRA: the adapter in peft's). Of
    several ranks the first one does, with whole weights.

    Args:
        weights: written in place of the policy's; none at all: all files but that of the weights.
    """
    with hf.quiet(), quiet_peft() if policy.peft else nullcontext():
        (policy.peft or policy.lm).save_pretrained(folder, state_dict=weights)
        policy.tokenizer.save_pretrained(folder)
        # peft's model card, whose fields are empty
        (folder / "README.md").unlink(missing_ok=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second: torch was built without CUDA
        reason = str(error).split(". ")[0]  # torch goes on with a list of all its kernels
        raise ModelError(f"device = {name!r}: {reason}: use 'auto' or 'cpu'") from None


def _threads(lm: PreTrainedModel, wanted: int | None) -> tuple[int, int]:
    """(OpenMP threads, workers) that together use `wanted` cores."""
    cores = wanted or int(os.environ.get("OMP_NUM_THREADS") or free_cores())
    small = lm.device.type == "cpu" and sum(p.numel() for p in lm.parameters()) < SMALL
    return (1, cores) if small else (cores, 1)
