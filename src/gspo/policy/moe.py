"""MoE routers of any transformers model: observe their choice of experts, or replay one.

transformers names a model's router modules itself (`_can_record_outputs["router_logits"]`), and
such a router picks its experts by `torch.topk` inside its own forward. So two hooks around each
router are enough: between them, torch's function mode sees that one call. The library stays as it
is, gate values stay live, and a router in half precision is lifted to float32 on the way.

    with policy.routing.observe(routes) as tape:   # routes: replay them; None: only watch
        scored = forward(policy, microbatch)
    tape.used(), tape.own()                        # [T, layers, k]

Layers that are recomputed in the backward pass find their tape again (`recompute`), so backward
may run after the block, and other forward passes in between.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gspo.core.errors import ConfigError, ModelError
from gspo.kernels.hf import router_classes
from gspo.policy.expert_tape import Tape

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Routing:
    """The routers of one model, in the order of its layers; none in a dense model.

    Attributes:
        routers: the modules.
        experts: how many each of them chooses from; 0 in a dense model.
    """

    def __init__(self, lm: nn.Module, source: str):
        found = find_routers(lm)
        self.routers = [router for router, _ in found]
        self._logits_at = [index for _, index in found]
        self._architecture = type(lm).__name__
        self._source = source
        config = getattr(lm, "config", None)
        text = config.get_text_config() if config is not None else None
        self._counted = _count(text)
        own = _count(self.routers[0]) if self.routers else None
        self.experts = (own or self._counted or 0) if self.routers else 0
        self._states: dict[int, _State] = {}
        for layer, router in enumerate(self.routers):
            router.register_forward_pre_hook(
                functools.partial(self._before, layer), with_kwargs=True
            )
            # First out, last in: a second Routing on the same model nests inside this one.
            router.register_forward_hook(
                functools.partial(self._after, layer), prepend=True, always_call=True
            )

    @property
    def _state(self) -> _State:
        """Of this thread: rows are computed side by side."""
        return self._states.setdefault(threading.get_ident(), _State())

    def require(self, what: str) -> None:
        """Refuse `what` where there is nothing to route.

        Raises:
            ConfigError: a dense model.
            ModelError: experts, but no router modules that transformers names.
        """
        if self.routers:
            return
        if (self._counted or 0) > 1:
            raise ModelError(
                f"{what}: {self._architecture} ({self._source}) has {self._counted} experts, but "
                "transformers names no router module of it (_can_record_outputs['router_logits'])"
            )
        raise ConfigError(
            f"{what} asked of a dense model: {self._architecture} ({self._source}) has no experts "
            "to route to; leave the option out"
        )

    @contextmanager
    def observe(
        self,
        routes: Integer[Tensor, "T N K"] | None = None,
        *,
        balance: Float[Tensor, "N E"] | None = None,
        copies: Int[Tensor, " T"] | None = None,
        strict: bool = True,
    ) -> Iterator[Tape]:
        """Record every choice of experts inside the block, or replay `routes`.

        Args:
            routes: experts of each token and layer to replay; a negative row is left to the router.
            balance: weight of each expert's router probability in `tape.balance`.
            copies: how often each token counts in the tape's sums; None: once.
            strict: refuse a router whose choice cannot be seen. Otherwise `tape.seen` says so.

        Raises:
            ModelError: strict, and a router without exactly one top-k over its experts.
            DataError: `routes` don't fit the model, or were not consumed whole.
            NumericsError: router logits that are not finite.
        """
        tape = Tape(len(self.routers), self.experts, routes, balance, copies)
        with self._with(tape):
            yield tape
        tape.check(f"{self._architecture} ({self._source})", strict or routes is not None)

    def recompute(self) -> tuple[Any, Any]:
        """`context_fn` of torch's checkpoint: a recomputed layer meets the tape of its forward.

        The rewound tape starts where this layer's tokens started and records nothing again.
        """
        tape = self._state.tape
        return nullcontext(), self._with(None if tape is None else tape.rewound())

    @contextmanager
    def _with(self, tape: Tape | None) -> Iterator[None]:
        state = self._state
        before, state.tape = state.tape, tape
        try:
            yield
        finally:
            state.tape = before

    def _before(self, layer: int, router: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden = args[0] if args else next(iter(kwargs.values()))
        stack, tape, choice = ExitStack(), self._state.tape, None
        kind = hidden.device.type
        weight = next(router.parameters(), None)
        if weight is None or weight.dtype == torch.float32:
            # A choice between near-equal experts is decided by digits that bfloat16 doesn't have.
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            args = tuple(_lifted(value) for value in args)
            kwargs = {name: _lifted(value) for name, value in kwargs.items()}
        if tape is not None:
            choice = stack.enter_context(_Choice(tape, layer, _count(router) or self.experts))
        self._state.open.append((stack, tape, choice))
        return args, kwargs

    def _after(self, layer: int, router: nn.Module, args: Any, output: Any) -> None:
        stack, tape, choice = self._state.open.pop()
        stack.close()
        # No output: the forward raised, or a recomputation stopped early because it had enough.
        if output is None or tape is None or choice is None:
            return
        logits = output[self._logits_at[layer]] if isinstance(output, tuple) else output
        tape.note(layer, choice.calls, logits)


@dataclass
class _State:
    """What one thread is in: its tape, and the routers whose forward has begun."""

    tape: Tape | None = None
    open: list[tuple[ExitStack, Tape | None, _Choice | None]] = field(default_factory=list)


class _Choice(TorchFunctionMode):
    """Inside one router: the one top-k whose rows are tokens and whose columns are the experts.

    Group-limited routers (DeepSeek-V3's) also rank groups of experts; those calls pass through.
    """

    def __init__(self, tape: Tape, layer: int, experts: int):
        super().__init__()
        self.tape, self.layer, self.experts = tape, layer, experts
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        if scores.dim() != 2 or scores.shape[-1] != self.experts:
            return func(*args, **kwargs)
        self.calls += 1
        if self.tape.routes is None:
            out = func(*args, **kwargs)
            self.tape.choose(self.layer, out.indices)
            return out
        with torch.no_grad():
            own = func(*args, **kwargs).indices
        used = self.tape.choose(self.layer, own)
        return torch.return_types.topk((scores.gather(-1, used), used))  # pyright: ignore[reportCallIssue]


def find_routers(lm: nn.Module) -> list[tuple[nn.Module, int]]:
    """Router modules of a model, each with the place of its logits in its output.

    Adapters don't hide them: peft wraps modules, and what it wraps stays a submodule.
    """
    out: dict[nn.Module, int] = {}
    for model in lm.modules():
        named = router_classes(model)
        for spec in named if isinstance(named, list) else [named]:
            target = getattr(spec, "target_class", spec)
            if not isinstance(target, type):
                continue
            inside = getattr(spec, "layer_name", None)
            for name, module in model.named_modules():
                fits = inside is None or f".{inside.strip('.')}." in f".{name}."
                if isinstance(module, target) and fits:
                    out.setdefault(module, getattr(spec, "index", 0))
    return list(out.items())


def _count(config: Any) -> int | None:
    """Number of experts, as a router or a config names it."""
    values = (getattr(config, name, None) for name in _COUNTS)
    return next((value for value in values if isinstance(value, int)), None)


def _lifted(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
