"""What the routers chose in one forward pass, and what they are to choose."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from gspo.core.errors import DataError, ModelError, NumericsError


def route_dtype(experts: int) -> torch.dtype:
    """The smallest type of an expert's number: one byte up to 256 experts.

    >>> route_dtype(256), route_dtype(257)
    (torch.uint8, torch.int16)
    """
    return torch.uint8 if experts <= 256 else torch.int16


class Tape:
    """The choices of N routers among E experts, K for each of T tokens.

    Filled by `Routing.observe`. A router may be called several times; its tokens follow each other.

    Attributes:
        routes: [T, N, K] to be replayed, or None. Rows with a negative number are the router's own.
        balance: sum over layers and tokens of the weighted router probabilities, with gradient;
            0 without weights. A token counts as often as there are `copies` of it.
        seen: every router's choice could be seen.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        routes: Integer[Tensor, "T N K"] | None = None,
        weights: Float[Tensor, "N E"] | None = None,
        copies: Int[Tensor, " T"] | None = None,
    ):
        self.routes = routes
        self.copies = copies
        self.balance: Tensor | float = 0.0
        self.seen = layers > 0
        self._experts = experts
        self._weights = weights
        self._dtype = route_dtype(experts)
        self._at = [0] * layers
        self._own: list[list[Tensor]] = [[] for _ in range(layers)]
        self._used: list[list[Tensor]] = [[] for _ in range(layers)]
        self._finite: list[tuple[int, Tensor]] = []
        self._blind: tuple[int, int] | None = None
        self._again = False
        if routes is not None and routes.shape[1] != layers:
            raise DataError(f"routes of {routes.shape[1]} layers; the model routes in {layers}")
        if routes is not None and routes.numel() and int(routes.max()) >= experts:
            raise DataError(f"routes name expert {int(routes.max())}; the model has {experts}")

    def rewound(self) -> Tape:
        """For a layer that is recomputed: the same routes from here on, nothing recorded."""
        tape = Tape(len(self._at), self._experts, self.routes, self._weights, self.copies)
        tape._at = list(self._at)
        tape._again = True
        return tape

    def choose(self, layer: int, own: Int[Tensor, "n k"]) -> Int[Tensor, "n k"]:
        """The experts that the router is to use, given those that it prefers."""
        start = self._at[layer]
        self._at[layer] = start + own.shape[0]
        used = own if self.routes is None else self._replayed(layer, start, own)
        if not self._again:
            self._own[layer].append(own.detach().to(self._dtype))
            if self.routes is not None:
                self._used[layer].append(used.to(self._dtype))
        return used

    def _replayed(self, layer: int, start: int, own: Tensor) -> Tensor:
        assert self.routes is not None
        wanted = self.routes[start : start + own.shape[0], layer]
        if wanted.shape != own.shape:
            raise DataError(
                f"routes of {tuple(wanted.shape)} tokens and experts were to be replayed in MoE "
                f"layer {layer}, which routes {tuple(own.shape)}"
            )
        wanted = wanted.to(own.device, torch.long)
        return torch.where((wanted < 0).any(-1, keepdim=True), own, wanted)

    def note(self, layer: int, calls: int, logits: Float[Tensor, "n E"]) -> None:
        """A router has run: how many top-k calls it made, and its logits."""
        if calls != 1:
            self._blind = self._blind or (layer, calls)
            return
        if not self._again:
            self._finite.append((layer, logits.detach().isfinite().all()))
        if self._weights is not None:
            # Also when recomputed: checkpoint wants the same tensors saved, in the same order.
            probabilities = logits.float().softmax(-1)
            weights = self._weights[layer].to(logits.device)
            self.balance = self.balance + self._counted(layer, probabilities) @ weights

    def _counted(self, layer: int, values: Float[Tensor, "n E"]) -> Float[Tensor, " E"]:
        """Sum over the tokens that the layer has just routed, each as often as it has copies."""
        if self.copies is None:
            return values.sum(0)
        start = self._at[layer] - len(values)
        return self.copies[start : self._at[layer]].to(values.device, values.dtype) @ values

    def check(self, model: str, strict: bool) -> None:
        """The forward pass is over: refuse what was left over, or could not be seen.

        Raises:
            ModelError, DataError, NumericsError: see `Routing.observe`.
        """
        if self._blind is not None:
            self.seen = False
            if strict:
                layer, calls = self._blind
                raise ModelError(
                    f"{model}: the router of MoE layer {layer} makes {calls} top-k choices of its "
                    "experts in its own forward; routes are recorded and replayed where it is 1"
                )
        bad = next((layer for layer, finite in self._finite if not bool(finite)), None)
        if bad is not None:
            raise NumericsError(
                f"{model}: the router logits of MoE layer {bad} are NaN or infinite: "
                "the weights, or what flows into the router, are broken"
            )
        if self.seen and len(set(self._at)) != 1:
            self.seen = False
            if strict:
                raise DataError(f"{model}: its MoE layers routed {self._at} tokens: not the same")
        if self.routes is not None and self._at[0] != self.routes.shape[0]:
            raise DataError(
                f"{model}: {self._at[0]} of {self.routes.shape[0]} tokens' routes were replayed; "
                "a replay must be consumed whole"
            )

    def own(self) -> Integer[Tensor, "T N K"]:
        """What the routers preferred."""
        return _stacked(self._own)

    def used(self) -> Integer[Tensor, "T N K"]:
        """The experts that computed."""
        return _stacked(self._own if self.routes is None else self._used)

    def loads(self) -> Int[Tensor, "N E"]:
        """Tokens that each expert of each layer computed, each as often as it has copies."""
        used = self.used().long()
        copies = used.new_ones(len(used)) if self.copies is None else self.copies.to(used.device)
        each = copies.repeat_interleave(used.shape[2])
        return torch.stack(
            [
                each.new_zeros(self._experts).index_add_(0, chosen.flatten(), each)
                for chosen in used.unbind(1)
            ]
        )


def _stacked(layers: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(parts) for parts in layers], dim=1)


def changed_slots(a: Integer[Tensor, "T N K"], b: Integer[Tensor, "T N K"]) -> Int[Tensor, "T N"]:
    """How many of the experts in `a` are not among those in `b`, whatever their order.

    >>> changed_slots(torch.tensor([[[0, 3]]]), torch.tensor([[[3, 2]]]))
    tensor([[1]])
    """
    return (a[..., :, None] != b[..., None, :]).all(-1).sum(-1)


def as_array(routes: Integer[Tensor, "T N K"], experts: int) -> np.ndarray:
    """Routes as they are stored and sent: one byte a slot up to 256 experts."""
    return routes.to("cpu", route_dtype(experts)).numpy()
