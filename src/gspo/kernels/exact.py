"""Give each row of a model's products the same bits, whatever rows are computed beside it.

A product of 3 rows and one of 300 rows may sum in different orders; torch's vectorised functions
treat the last few numbers of a tensor otherwise than the rest; with several threads, MKL cuts some
sums in two. So passes get a number of tokens that is a multiple of some number, each expert gets at
least so many tokens, and linear layers for which that is not enough are computed in another way:
in float32 by oneDNN, whose products were the same from 2 rows on for every shape and number of
threads that was tried; in bfloat16 (oneDNN's on AMX are not) in blocks of the same number of rows.

`measure` finds out what the loaded model needs, with this machine, library and number of threads.
That nothing else makes engine and trainer differ is proved afterwards, end to end
(`serve.selfcheck`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gspo.kernels.hf import backbone, no_mask, pad_experts
from gspo.kernels.logprob import CPU_BLOCK, Head, full_logits
from gspo.kernels.projection import project
from gspo.kernels.running_softmax import VECTOR
from gspo.kernels.tile_attention import attend

MULTIPLES = (8, 16, 32, 64)
_EXPERT_ROWS = (4, 8, 16, 32, 64)
_FEW = 16  # a linear layer that needs more rows than this is computed in another way
_BLOCK = 64  # rows
_TOKENS = 512
_MANY = (640, 1024, 2048, 4096)
"""Tokens of large microbatches, in which products may take other kernels: in bfloat16 on AMX the
576 x 576 of SmolLM2 does from 576 rows on. In float32 none was seen to; the most is tried."""


@dataclass(frozen=True)
class Part:
    """Modules of one kind and shape, and what they need.

    Attributes:
        name: of the first of them.
        kind: name of their class.
        multiple: the rows of a call must be a multiple of this; None: none of `MULTIPLES` helps.
        how: what was changed, or "".
    """

    name: str
    kind: str
    multiple: int | None
    how: str = ""


_Call = tuple[str, list[nn.Module], tuple[Tensor, ...]]


@torch.no_grad()
def measure(lm: Any, head: Head) -> list[Part]:
    """Measure each kind of module of a model, and change those that need it.

    Args:
        lm: the model. Its experts may be padded from now on, its linear layers replaced.
        head: its vocabulary projection.
    """
    calls = list(_calls(lm))
    experts = [call for call in calls if is_experts(call[1][0])]
    linear = [call for call in calls if isinstance(call[1][0], nn.Linear)]
    rest = [call for call in calls if call not in experts and call not in linear]
    # Blocks contain the others, so they come last.
    return [
        *(_settle_linear(call) for call in linear),
        *(_settle_experts(call) for call in experts),
        *(Part(name, _kind(same), _needed(same[0], inputs)) for name, same, inputs in rest),
        _attention(lm.config.get_text_config()),
        _head(head),
    ]


def _attention(config: Any) -> Part:
    """One token of each of several sequences that are alike, against many tokens of one."""
    heads = config.num_attention_heads
    share = heads // (getattr(config, "num_key_value_heads", None) or heads)
    depth = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    rows, keys, values = torch.randn(3, 1, 1, _BLOCK * share, depth, generator=generator)
    keys, values = keys[:, :, :_BLOCK], values[:, :, :_BLOCK]
    many, _ = attend(rows, keys, values, None, None)
    alike = [x.expand(_BLOCK, -1, -1, -1) for x in (keys, values)]
    each, _ = attend(rows.view(_BLOCK, 1, share, depth), alike[0], alike[1], None, None)
    same = torch.equal(each.view(many.shape), many)
    return Part(f"heads of {depth}", "attention", MULTIPLES[0] if same else None)


def _head(head: Head) -> Part:
    """Logits of few rows over the whole vocabulary, against many rows over a block of it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, head.weight.shape[1], generator=generator)
    block = min(CPU_BLOCK[0], head.size)
    spans = [slice(0, block), slice((head.size - 1) // block * block, head.size)]
    pairs = [(span, project(hidden, head.weight[span], None, None)) for span in spans]
    for multiple in MULTIPLES:
        few = [
            full_logits(hidden[:count], replace(head, bias=None, softcap=None, scale=1.0))
            for count in (multiple, 2 * multiple)
        ]
        if all(torch.equal(x[:, s], w[: len(x)]) for x in few for s, w in pairs):
            return Part("lm_head", "head", multiple)
    return Part("lm_head", "head", None)


def undo(lm: Any) -> None:
    """Compute a model's modules as before `measure`."""
    for module in lm.modules():
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        if hasattr(module, "gspo_rows"):
            del module.gspo_rows, module.forward
        elif forward in (_by_blocks, _by_one_dnn):
            del module.forward


def is_experts(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel")  # transformers' mark of such a module


def _is_half(module: nn.Module) -> bool:
    return next(module.parameters()).dtype != torch.float32


def _kind(modules: list[nn.Module]) -> str:
    return type(modules[0]).__name__


def _settle_linear(call: _Call) -> Part:
    name, modules, inputs = call
    multiple, how = _needed(modules[0], inputs), ""
    half = _is_half(modules[0])
    if multiple is None or multiple > _FEW or _changes_with_many(modules[0], inputs):
        for module in modules:
            module.forward = MethodType(_by_blocks if half else _by_one_dnn, module)
        how = f"blocks of {_BLOCK} rows" if half else "oneDNN"
        multiple = _needed(modules[0], inputs)
    # A function of its output, such as sigmoid, must find whole vectors only. Measuring it is not
    # enough: rounding to bfloat16 hides a difference most of the time.
    vector = VECTOR * torch.get_num_threads()
    whole = vector // math.gcd(vector, cast(nn.Linear, modules[0]).out_features)
    return Part(name, _kind(modules), None if multiple is None else math.lcm(multiple, whole), how)


def _settle_experts(call: _Call) -> Part:
    name, modules, inputs = call
    multiple, rows = None, 0
    for rows in _EXPERT_ROWS:
        for module in modules:
            pad_experts(module, rows)
        multiple = _needed(modules[0], inputs)
        if multiple is not None and multiple <= _FEW:
            break
    if _changes_with_many(modules[0], inputs):
        multiple = None
    return Part(name, _kind(modules), multiple, f"at least {rows} tokens each")


def _calls(lm: Any) -> Iterator[_Call]:
    """Yield the modules of each kind with the inputs that one has in a pass over random tokens."""
    calls: dict[object, _Call] = {}
    names = {module: name for name, module in lm.named_modules()}

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = (*inputs, *named.values())
        by_token = [x for x in values if isinstance(x, Tensor) and _TOKENS in x.shape[:2]]
        if named or not by_token or len(by_token) != len(values):
            return
        shapes = tuple(tuple(p.shape) for p in module.parameters())
        kind = (type(module), shapes, *(tuple(x.shape) for x in by_token))
        given = tuple(x.detach().clone() for x in by_token)
        calls.setdefault(kind, (names[module], [], given))[1].append(module)

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in lm.modules()]
    generator = torch.Generator().manual_seed(0)
    size = lm.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(size, (1, _TOKENS), generator=generator).to(lm.device)
    # Positions that begin again: short samples, so that any context holds them.
    positions = (torch.arange(_TOKENS, device=lm.device) % 16)[None]
    try:
        backbone(lm)(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=no_mask(lm.device),
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    yield from calls.values()


def _needed(module: nn.Module, inputs: tuple[Tensor, ...]) -> int | None:
    """Find the smallest multiple of rows at which rows have the bits of a call of many rows."""
    whole = _first(module(*inputs))
    return next((m for m in MULTIPLES if _same(module, inputs, whole, m)), None)


def _same(module: nn.Module, inputs: tuple[Tensor, ...], whole: Tensor, multiple: int) -> bool:
    several = range(multiple, 4 * multiple + 1, multiple)
    for count in sorted({*several, 64, 96, 128, 192, 256, 384}):
        first = (_TOKENS - count) // 2
        part = _first(module(*(_rows(x, first, count) for x in inputs)))
        if count % multiple == 0 and not torch.equal(part, _rows(whole, first, count)):
            return False
    return True


def _changes_with_many(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether rows have other bits in calls of many more tokens."""
    whole = _first(module(*inputs))
    half = torch.is_autocast_enabled(inputs[0].device.type)
    for count in _MANY if half else _MANY[-1:]:
        many = []
        for x in inputs:
            at = x.shape.index(_TOKENS)
            many.append(torch.cat([x] * -(-count // _TOKENS), at).narrow(at, 0, count))
        part = _first(module(*many)).narrow(whole.shape.index(_TOKENS), 0, _TOKENS)
        if not torch.equal(part, whole):
            return True
    return False


def _rows(x: Tensor, first: int, count: int) -> Tensor:
    return x.narrow(x.shape.index(_TOKENS), first, count)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _by_blocks(self: nn.Linear, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
    """A linear layer whose products all have the same number of rows."""
    rows = x.reshape(-1, x.shape[-1])
    blocks = functional.pad(rows, (0, 0, 0, -len(rows) % _BLOCK)).split(_BLOCK)
    out = torch.cat([functional.linear(block, self.weight, self.bias) for block in blocks])
    return out[: len(rows)].view(*x.shape[:-1], -1)


def _by_one_dnn(self: nn.Linear, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
    """A linear layer that is computed by oneDNN instead of MKL."""
    return _OneDnnLinear.apply(x, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needed = ctx.needs_input_grad
        return (
            grad @ weight if needed[0] else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
            rows.sum(0) if ctx.biased and needed[2] else None,
        )
