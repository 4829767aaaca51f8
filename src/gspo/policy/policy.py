"""What a model is to engine and trainer: `Policy`, and the log-probs that it gives to samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo.core.errors import ModelError
from gspo.core.timing import span
from gspo.data.packing import Microbatch
from gspo.kernels import hf
from gspo.kernels.flex import FlexAttention
from gspo.kernels.logprob import Head, TokenLogprobs, token_logprobs
from gspo.kernels.sharded import inside_forward
from gspo.kernels.shared_prompt_attention import SharedPromptAttention
from gspo.policy.logits import logit_scale, soft_cap
from gspo.policy.moe import Routers
from gspo.policy.workers import Workers

Packing = Literal["flex", "tiles", "mask", "single"]
WITH_GSPO_ATTENTION: frozenset[Packing] = frozenset({"flex", "tiles"})
"""Ways of packing that go through gspo's attention, which makes no T x T mask."""


@dataclass
class Policy:
    """A model that can be sampled from and trained; engine and trainer share it.

    Attributes:
        lm: the causal LM (with adapters injected, if LoRA is used).
        peft: the PeftModel around it, or None for full fine-tuning.
        tokenizer: the model's tokenizer.
        source: folder or id that the base weights came from.
        dtype: float32 or bfloat16: what `round_weights` rounds the weights to; they compute in it.
        context: longest sample in tokens.
        packing: how samples share a forward pass, the first that is exact: `flex` (gspo's attention
            on a GPU) or `tiles` (on a CPU), `mask` (a T x T mask, handed to the model's own
            attention), or `single` (one forward pass per sample).
        shares_prompts: samples of a microbatch may share their prompts: proved on the model itself.
        checkpointing: layers are recomputed in the backward pass.
        version: policy version, counted up by every update.
        workers: threads that train a microbatch each.
        threads: OpenMP threads that compute it; None: as many as are set.
        multiple: the tokens of a forward pass are padded to a multiple of this, so that log-probs
            don't depend on how many there are (see `kernels.exact`).
        exact: the engine's log-probs are the trainer's, to the bit: proved on the model itself.
        not_exact: why they are not.
        entries: entries of the vocabulary that are tokens; None: the whole head. What lies behind
            them pads the head; log-probs are over the tokens only.
        logit_scale: factor between the head's product and the logits; None: found on the model.
        microbatch_tokens: tokens of a microbatch that a GPU has memory for; None: not measured yet.
        routers: of an MoE model; none in a dense one.
        softcap: of the logits.
    """

    lm: PreTrainedModel
    peft: Any
    tokenizer: PreTrainedTokenizerBase
    source: str
    dtype: torch.dtype
    context: int
    packing: Packing = "tiles"
    shares_prompts: bool = False
    checkpointing: bool = False
    version: int = 0
    workers: Workers = field(default_factory=Workers, repr=False)
    threads: int | None = None
    multiple: int = 1
    exact: bool = False
    not_exact: str = "exact=False, or a rollout_dtype"
    entries: int | None = None
    logit_scale: float | None = None
    microbatch_tokens: int | None = None
    routers: Routers = field(init=False, repr=False)
    softcap: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.routers, self.softcap = Routers(self.lm, self.source), soft_cap(self.lm)
        if self.logit_scale is None:
            self.logit_scale = logit_scale(self.lm)

    @cached_property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def backbone(self) -> torch.nn.Module:
        """The model below the vocabulary projection."""
        return hf.backbone(self.lm)

    @property
    def head(self) -> Head:
        """The vocabulary projection.

        Raises:
            ModelError: it is no linear layer.
        """
        module = self.lm.get_output_embeddings()
        if not isinstance(module, torch.nn.Linear):
            raise ModelError(
                f"{self.source}: the output head is {type(module)}; gspo computes "
                "log-probs from a plain linear head (with LoRA, leave lm_head out)"
            )
        scale = 1.0 if self.logit_scale is None else self.logit_scale
        split = self.device.type == "cuda" and module.weight.dtype != torch.float32
        cut = self.multiple, self.entries, split
        return Head(module.weight, module.bias, self.softcap, scale, *cut)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name, in a fixed order."""
        return {n: p for n, p in self.lm.named_parameters() if p.requires_grad}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.lm.named_parameters()), **dict(self.lm.named_buffers())}

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block the adapters are off: the base model (LoRA only)."""
        return self.peft.disable_adapter()

    def use_threads(self) -> None:
        """Compute with this model's number of threads: another one may have set its own."""
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)

    @torch.no_grad()
    def round_weights(self) -> dict[str, Tensor]:
        """Round the weights to `dtype`, in place. Once, before anything is computed that counts.

        Weights that are divided among ranks stay float32: FSDP rounds what it gathers of them.

        Returns:
            The float32 numbers of those that are trained, by name: what an optimizer updates.
            Their gradients are float32 from here on: autograd adds up those of all microbatches.
        """
        masters: dict[str, Tensor] = {}
        if self.dtype == torch.float32:
            return masters
        for name, weight in self.lm.named_parameters():
            if isinstance(weight, DTensor) or hf.stays_float32(self.lm, name):
                continue
            if weight.requires_grad:
                masters[name] = weight.detach().float()
            weight.data = weight.data.to(self.dtype)
            if weight.requires_grad:
                weight.grad_dtype = torch.float32
        return masters

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Inside the block the weights compute in float32, with the numbers that they have: whether
        two ways compute the same shows only where rounding doesn't blur it."""
        half = torch.bfloat16, torch.float16
        narrow = {t: t.dtype for t in self.tensors.values() if t.dtype in half}
        try:
            for tensor in narrow:
                tensor.data = tensor.data.float()
            yield
        finally:  # to the bit: each number is one of the narrow type
            for tensor, dtype in narrow.items():
                tensor.data = tensor.data.to(dtype)

    @span("forward")
    def logprobs(
        self, microbatch: Microbatch, chunk: int | None = None, *, part_only: bool = False
    ) -> TokenLogprobs:
        """Compute log-probs of the sampled tokens, at the temperatures they were sampled with.

        Every sample sees only itself, whatever else is in the microbatch.

        Args:
            microbatch: packed samples; M of their tokens were sampled.
            chunk: tokens whose logits exist at once; None: see `token_logprobs`.
            part_only: 0 for tokens that another process computes (see `TokenParts`); nothing waits.

        Returns:
            [M] float32 log-probs with gradient, and entropies without.
        """
        if self.workers.size == 1:
            return self._logprobs(microbatch, chunk)

        def run() -> tuple[Tensor, Tensor]:  # FSDP looks for tensors, and into no dataclass
            scored = self._logprobs(microbatch, chunk)
            return scored.logprobs, scored.entropy

        logprobs, entropy = inside_forward(self.lm, run)
        if not part_only:
            logprobs, entropy = map(self.workers.parts.sum, (logprobs, entropy))
        return TokenLogprobs(logprobs, entropy)

    def _logprobs(self, microbatch: Microbatch, chunk: int | None) -> TokenLogprobs:
        hidden, parts = self._hidden_states(microbatch), self.workers.parts
        sources, targets = microbatch.sources, microbatch.tokens[0, microbatch.targets]
        temperatures, held = microbatch.temperatures, parts.holds(sources, microbatch.token_count)
        if held is not None:
            first, _ = parts.span(microbatch.token_count)
            sources = sources[held] - first
            targets, temperatures = targets[held], temperatures[held]
        hidden = hidden.index_select(0, self._there(sources))
        scored = token_logprobs(hidden, self.head, targets, self._there(temperatures), chunk)
        if held is None:
            return scored
        zeros, places = scored.entropy.new_zeros(len(held)), self._there(held.nonzero()[:, 0])
        return TokenLogprobs(
            zeros.index_copy(0, places, scored.logprobs),
            zeros.index_copy(0, places, scored.entropy),
        )

    def _there(self, values: Tensor) -> Tensor:
        """The values on the device; the host doesn't wait until they are there."""
        return values.to(self.device, non_blocking=True)

    def _hidden_states(self, microbatch: Microbatch) -> Float[Tensor, "T D"]:
        device, parts = self.device, self.workers.parts
        if self.packing == "single" and microbatch.token_count < microbatch.sample_tokens:
            raise ValueError("a microbatch with shared prompts, and a model packed by 'single'")
        if self.packing != "tiles" and parts.size > 1:
            raise ValueError(f"packed by {self.packing!r}, samples cannot be divided")
        extra: dict[str, Any] = {}
        if self.packing == "mask":
            extra["attention_mask"] = self._masks(microbatch)
        elif self.packing != "single":
            plan = SharedPromptAttention(microbatch, device, parts)
            extra["attention_mask"] = hf.no_mask(device)
            extra["gspo_plan"] = FlexAttention(plan) if self.packing == "flex" else plan
        inputs = self._inputs(microbatch)
        lengths = [*microbatch.lengths[:-1]] if self.packing == "single" else []
        lengths.append(inputs.shape[2] - sum(lengths))  # with padding, if there is any
        hidden = []
        for tokens, positions in inputs.split(lengths, dim=2):
            given = {"input_ids": tokens, "position_ids": positions} | extra
            hidden.append(self.backbone(use_cache=False, **given).last_hidden_state[0])
        if parts.size > 1 and (choices := self.routers.watched) is not None:
            choices.join(microbatch.token_count, parts)
        return hidden[0][: microbatch.token_count] if len(hidden) == 1 else torch.cat(hidden)

    def _inputs(self, microbatch: Microbatch) -> Int[Tensor, "2 1 t"]:
        """Tokens and positions of this process's part, padded; what the routers see is noted."""
        parts, tokens = self.workers.parts, microbatch.token_count
        inputs = self._there(torch.stack([microbatch.tokens, microbatch.positions]))
        inputs = parts.take(inputs)
        padding = -inputs.shape[2] % self.multiple
        if (choices := self.routers.watched) is not None:
            choices.first, more = parts.real(tokens)
            choices.padding = padding + more
        return functional.pad(inputs, (0, padding)) if padding else inputs

    def _masks(self, microbatch: Microbatch) -> Any:
        """Make the T x T mask in the form that the model's attention takes: one for each layer type
        of a model that has several, or one for all layers."""
        config = self.lm.config.get_text_config()
        window: Any = getattr(config, "sliding_window", None)
        until = torch.from_numpy(SharedPromptAttention(microbatch).until).to(self.device)
        positions = microbatch.positions[0].to(self.device)
        embeddings = self.lm.get_input_embeddings()(microbatch.tokens.to(self.device)).detach()

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query < until[key]

        def near(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query < until[key]) & (positions[query] < positions[key] + window)

        types = getattr(config, "layer_types", None)
        if types is not None and "sliding_attention" not in types:
            window = None  # the config names one, but no layer has it
        if types is not None and window is not None:
            return {
                "full_attention": hf.causal_mask(config, embeddings, seen),
                "sliding_attention": hf.causal_mask(config, embeddings, near),
            }
        return hf.causal_mask(config, embeddings, seen if window is None else near)
