"""Record which experts the routers of an MoE model choose, or replay a choice.

An expert choice is the K expert numbers of one token in one MoE layer, in the router's order.
transformers names the router modules of a model (`_can_record_outputs["router_logits"]`), and such
a router picks its experts by `torch.topk` inside its forward. So it is enough to wrap the
`forward` of each router: inside it, torch's function mode sees that one call. Gate values stay
live, and a router in half precision computes its logits in float32 all the same.

    with policy.routers.watch(replay) as choices:   # None: only record
        scored = policy.logprobs(microbatch)
    choices.preferred(), choices.used()             # [T, N, K]: T tokens, N layers, K of E experts

Layers that are recomputed in the backward pass find their choices again (`recompute`), so backward
may run after the block, and other forward passes in between.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from gspo.core.errors import ConfigError, DataError, ModelError, NumericsError
from gspo.kernels.hf import find_routers
from gspo.kernels.token_parts import TokenParts

_HALF = (torch.bfloat16, torch.float16)
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Routers:
    """The routers of one model, in the order of its layers; none in a dense model.

    Attributes:
        modules: the N routers.
        experts: E, how many each of them chooses from; 0 in a dense model.
    """

    def __init__(self, lm: PreTrainedModel, source: str):
        routers = find_routers(lm)
        self.modules = [router for router, _ in routers]
        self.model = f"{type(lm).__name__} ({source})"
        self.experts = _count(self.modules[0], lm.config.get_text_config()) if self.modules else 0
        # By thread, since microbatches are computed side by side.
        self._watched: dict[int, ExpertChoices | None] = {}
        for layer, (router, index) in enumerate(routers):
            router.forward = functools.partial(self._run, layer, index, router.forward)

    def require(self, what: str) -> None:
        """Refuse `what` if the model has no routers that can be watched.

        Raises:
            ConfigError: a dense model, or one whose router modules transformers doesn't name.
        """
        if not self.modules:
            raise ConfigError(
                f"{what} asked of a dense model: {self.model} has no experts, or no router that "
                "transformers names (_can_record_outputs['router_logits']); leave the option out"
            )

    @contextmanager
    def watch(
        self,
        replay: Integer[Tensor, "T N K"] | None = None,
        *,
        balance: Float[Tensor, "N E"] | None = None,
        copies: Int[Tensor, " T"] | None = None,
        strict: bool = True,
    ) -> Iterator[ExpertChoices]:
        """Record every choice of experts inside the block, or replay one.

        Args:
            replay: experts to use; the router chooses for a token whose numbers are negative.
            balance: weight of each expert's router probability in `ExpertChoices.balance`; takes
                `copies` with it.
            copies: how often each token counts in sums; None: once.
            strict: refuse a router whose choice cannot be seen. If not strict,
                `ExpertChoices.complete` says so. A replay is always strict.

        Raises:
            ModelError: strict, and a router without exactly one top-k over its experts.
            DataError: `replay` has other tokens or experts per token, or was not consumed whole.
            NumericsError: router logits that are not finite.
        """
        choices = ExpertChoices(self, replay, balance, copies)
        with self._watching(choices):
            yield choices
        choices.check(strict or replay is not None)

    @property
    def watched(self) -> ExpertChoices | None:
        """What this thread's forward passes are recorded in; None: nothing is."""
        return self._watched.get(threading.get_ident())

    def recompute(self) -> tuple[Any, Any]:
        """`context_fn` of torch's checkpoint: a recomputed layer takes its earlier choices.

        They are rewound to the first tokens of this layer; the block's own record stays as it is.
        """
        return nullcontext(), self._watching(self.watched and self.watched.rewound())

    @contextmanager
    def _watching(self, choices: ExpertChoices | None) -> Iterator[None]:
        thread = threading.get_ident()
        before = self._watched.get(thread)
        self._watched[thread] = choices
        try:
            yield
        finally:
            self._watched[thread] = before

    def _run(self, layer: int, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the `forward` of a router watched, and its products in float32: digits that bfloat16
        doesn't have decide between near-equal experts."""
        router = self.modules[layer]
        given = (*args, *kwargs.values(), *router.parameters())
        half = any(isinstance(x, Tensor) and x.dtype in _HALF for x in given)
        choices = self.watched
        if choices is not None:
            choices.layer, choices.columns = layer, _count(router) or self.experts
            choices.calls = 0
        with _Float32Products() if half else nullcontext(), choices or nullcontext():
            output = forward(*args, **kwargs)
        if choices is not None:
            choices.note(output[index] if isinstance(output, tuple) else output)
        if half and isinstance(router, nn.Linear) and isinstance(output, tuple):
            # Llama 4 multiplies what its experts are given by these scores, and casts nothing.
            output = tuple(value.to(args[0].dtype) for value in output)
        return output


class _Float32Products(TorchFunctionMode):
    """Linear layers compute in float32, from weights and inputs of whatever type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            args = tuple(value if value is None else value.float() for value in args)
        return func(*args, **(kwargs or {}))


class ExpertChoices(TorchFunctionMode):
    """The choices of N routers among E experts, K for each of T tokens, in one forward pass.

    Filled by `Routers.watch`. A router may be called several times; its tokens follow each other.
    Inside a router this is torch's function mode, which sees the one top-k whose rows are tokens
    and whose columns are the experts. Group-limited routers (DeepSeek-V3's) also rank groups of
    experts; those calls pass through.

    Attributes:
        balance: sum over layers and tokens of the weighted router probabilities, with gradient;
            0 without weights. A token counts as often as there are `copies` of it.
        complete: the choice of every router could be seen. Known when the block has ended.
        first: place in the microbatch of the first token that the routers see.
        padding: tokens at the end of a call that are not recorded.
    """

    def __init__(
        self,
        routers: Routers,
        replay: Integer[Tensor, "T N K"] | None,
        weights: Float[Tensor, "N E"] | None,
        copies: Int[Tensor, " T"] | None,
    ):
        super().__init__()
        layers, experts = len(routers.modules), routers.experts
        self.balance: Tensor | float = 0.0
        self.complete = layers > 0
        self._routers, self._experts = routers, experts
        # One byte up to 256 experts: the choices of a rollout batch can be gigabytes.
        self._dtype = torch.uint8 if experts <= 256 else torch.int16
        self._replay, self._weights, self._copies = replay, weights, copies
        self._routed = [0] * layers  # tokens of each layer so far
        self._preferred: list[list[Tensor]] = [[] for _ in range(layers)]
        self._used: list[list[Tensor]] = [[] for _ in range(layers)]
        self._finite: list[tuple[int, Tensor]] = []
        self._unseen: tuple[int, int] | None = None
        self.layer = self.columns = self.calls = 0  # of the router that runs
        self.padding = self.first = 0

    def rewound(self) -> ExpertChoices:
        """Make the choices of a layer that is recomputed: the same replay, from here on."""
        again = ExpertChoices(self._routers, self._replay, self._weights, self._copies)
        again._routed, again.padding = list(self._routed), self.padding
        again.first = self.first
        return again

    def __getstate__(self) -> dict[str, Any]:
        """What another process is told of them: not the model, and no gradient."""
        balance = self.balance.detach() if isinstance(self.balance, Tensor) else self.balance
        return self.__dict__ | {"_routers": None, "_replay": None, "balance": balance}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return out
        scores = args[0] if args else kwargs["input"]
        if scores.dim() != 2 or scores.shape[-1] != self.columns:
            return out
        self.calls += 1
        real = len(scores) - self.padding
        preferred = used = out.indices[:real]
        layer, start = self.layer, self.first + self._routed[self.layer]
        self._routed[layer] += len(preferred)
        if self._replay is not None:
            wanted = self._replay[start : start + len(preferred), layer]
            if wanted.shape != preferred.shape:
                raise DataError(
                    f"expert choices of {tuple(wanted.shape)} tokens and experts were to be "
                    f"replayed in MoE layer {layer}, which routes {tuple(preferred.shape)}"
                )
            wanted = wanted.to(preferred.device, torch.long)
            used = torch.where((wanted < 0).any(-1, keepdim=True), preferred, wanted)
            chosen = torch.cat([used, out.indices[real:]])
            out = torch.return_types.topk((scores.gather(-1, chosen), chosen))  # pyright: ignore[reportCallIssue]
        self._preferred[layer].append(preferred.to(self._dtype))
        self._used[layer].append(used.to(self._dtype))
        return out

    def note(self, logits: Float[Tensor, "n E"]) -> None:
        """Note that a router has run, with these logits."""
        layer, logits = self.layer, logits[: len(logits) - self.padding]
        if self.calls != 1:
            self._unseen = self._unseen or (layer, self.calls)
            return
        self._finite.append((layer, logits.detach().isfinite().all()))
        if self._weights is not None and self._copies is not None:
            # Also if recomputed: checkpoint wants the same tensors saved, in the same order.
            probabilities = logits.float().softmax(-1)
            end = self.first + self._routed[layer]
            copies = self._copies[end - len(logits) : end].to(logits.device, torch.float32)
            weights = self._weights[layer].to(logits.device)
            self.balance = self.balance + copies @ probabilities @ weights

    def join(self, tokens: int, parts: TokenParts) -> None:
        """After the pass: put together what was chosen for all parts of so many tokens."""
        if not (self.complete and self._unseen is None and all(self._preferred)):
            return
        own = torch.stack([torch.cat(calls) for calls in (*self._preferred, *self._used)], 1)
        own = torch.cat([own, own.new_zeros(self.padding, *own.shape[1:])])
        whole = parts.join(own.int())[:tokens].to(self._dtype).unbind(1)  # gloo knows no int16
        layers = len(self._preferred)
        self._preferred, self._used = [[c] for c in whole[:layers]], [[c] for c in whole[layers:]]
        self._routed = [tokens] * layers
        finite = parts.sum(torch.stack([f for _, f in self._finite]).float()) == parts.size
        self._finite = [(layer, f) for (layer, _), f in zip(self._finite, finite, strict=True)]
        if isinstance(self.balance, Tensor):
            self.balance = parts.sum(self.balance)

    def check(self, strict: bool) -> None:
        """Refuse, after the forward pass, what was left over or could not be seen.

        Raises:
            ModelError, DataError, NumericsError: see `Routers.watch`.
        """
        expected = max(self._routed, default=0) if self._replay is None else len(self._replay)
        model = self._routers.model
        whole = all(tokens == expected for tokens in self._routed)
        self.complete &= self._unseen is None and whole
        if strict and self._unseen is not None:
            layer, calls = self._unseen
            raise ModelError(
                f"{model}: the router of MoE layer {layer} makes {calls} top-k choices of its "
                "experts in its forward; they are recorded and replayed if it is 1"
            )
        # One read from the device, not one per layer.
        finite = torch.stack([f for _, f in self._finite]).tolist() if self._finite else []
        if not all(finite):
            layer, _ = self._finite[finite.index(False)]
            raise NumericsError(f"{model}: router logits of MoE layer {layer} are NaN or infinite")
        if strict and not whole:
            raise DataError(
                f"{model}: its MoE layers routed {self._routed} tokens, but each was to route "
                f"{expected}; a replay must be consumed whole"
            )

    def preferred(self) -> Integer[Tensor, "T N K"]:
        """Return the experts that the routers preferred: uint8 up to 256 experts, int16 above."""
        return torch.stack([torch.cat(calls) for calls in self._preferred], 1)

    def used(self) -> Integer[Tensor, "T N K"]:
        """Return the experts that computed, replayed or preferred; same type."""
        return torch.stack([torch.cat(calls) for calls in self._used], 1)

    def loads(self) -> Int[Tensor, "N E"]:
        """Count the tokens that each expert of each layer computed, each as often as its copies."""
        used, experts = self.used().long(), self._experts
        tokens, layers, _ = used.shape
        copies = used.new_ones(tokens) if self._copies is None else self._copies.long()
        copies = copies.to(used.device, non_blocking=True)[:, None, None].expand(used.shape)
        slots = used + experts * torch.arange(layers, device=used.device)[:, None]
        loads = used.new_zeros(layers * experts)  # not bincount, for which the host waits
        return loads.scatter_add_(0, slots.flatten(), copies.flatten()).view(layers, experts)


def _count(*owners: Any) -> int:
    """Read the number of experts of the first router or config that names one; else 0."""
    values = (getattr(owner, name, None) for owner in owners for name in _COUNTS)
    return next((value for value in values if isinstance(value, int)), 0)
